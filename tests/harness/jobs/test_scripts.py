"""Batch scripts: what bash makes of them, whatever stands in the words; the examples in slurm/."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.config import cluster
from harness.errors import InputError
from harness.jobs import scripts, slurm
from harness.jobs.scripts import Job, Kind
from harness.process import exit_markers

HOSTILE = [
    "name='a \"b\" $HOME `id`'",
    "data.files=[/tmp/a b,*]",
    "x=$(touch /tmp/no)",
    "y='\\'",
    "{{ job }}",
    "z=#!%j",
]


def _job(**changes: object) -> Job:
    return Job(**{"name": "n", "about": ["what"], "words": ["a=1"], "run": "/runs/r", **changes})  # pyright: ignore[reportArgumentType]


def _render(kind: Kind = "train", *words: str, **changes: object) -> str:
    return scripts.render(kind, _job(**changes), cluster.load(["cluster=local_ci", *words]))


def _directives(text: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE)
    assert len({key for key, _ in found}) == len(found), "a directive twice"
    return dict(found)


@pytest.mark.parametrize("variable", [exit_markers.FOLDER_VARIABLE, exit_markers.ERROR_VARIABLE])
@pytest.mark.parametrize("kind", ["train", "sweep"])
def test_a_job_sets_what_its_processes_read(kind: Kind, variable: str) -> None:
    assert re.search(rf"^export .*\b{variable}=", _render(kind), re.MULTILINE)


@pytest.mark.parametrize("kind", ["train", "sweep"])
def test_compiled_kernels_outlive_a_job(kind: Kind) -> None:
    text = _render(kind)
    assert "caches=${OPTBENCH_CACHE:-$HOME/.cache/optbench}/compiled" in text
    # A user's own folder is kept.
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert f"export {name}=${{{name}:-$caches/" in text
    assert not re.search(r"rm -r.*caches", text)


def test_words_reach_the_run_unchanged() -> None:
    text = _render(words=HOSTILE)
    block = text[text.index("words=(") : text.index("\nfolder=")]
    said = subprocess.run(
        ["bash", "-c", block + '\nprintf "%s\\0" "${words[@]}"'], capture_output=True, check=True, text=True
    )
    assert said.stdout.split("\0")[:-1] == HOSTILE


def test_unquoted_words_would_not() -> None:
    # Negative control of the test above.
    block = "words=(" + " ".join(HOSTILE[:2]) + ")"
    said = subprocess.run(
        ["bash", "-c", block + '\nprintf "%s\\0" "${words[@]}"'], capture_output=True, check=False, text=True
    )
    assert said.stdout.split("\0")[:-1] != HOSTILE[:2]


@pytest.mark.parametrize("kind", ["train", "sweep", "analysis"])
@pytest.mark.parametrize("name", ["local_ci", "generic_gpu", "preemptible", "container"])
def test_every_script_is_bash(kind: Kind, name: str) -> None:
    config = cluster.load(
        [f"cluster={name}", "cluster.nodes=2", "cluster.exclude_bad_nodes=true", "cluster.srun=['--x=y']"]
    )
    text = scripts.render(
        kind, _job(words=HOSTILE, grid="/g", script="/s", successors="/a", dependents="/b"), config
    )
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "None" not in text


def test_directives_say_what_the_cluster_says() -> None:
    text = _render(
        "train",
        *[
            "cluster.nodes=4",
            "cluster.gpus=8",
            "cluster.gpu_type=h100",
            "cluster.account=mine",
            "cluster.memory=0",
        ],
        *["cluster.exclusive=true", "cluster.extra={reservation: 'a b', no-kill: true, hold: false}"],
    )
    found = _directives(text)
    assert found["nodes"] == "4"
    assert found["gpus-per-node"] == "h100:8"
    assert found["mem"] == "0"
    assert found["time"] == "0-00:10:00"
    assert found["reservation"] == "'a b'"
    assert found["signal"] == "B:USR1@120"
    assert (found["exclusive"], found["no-kill"], "hold" in found) == ("", "", False)
    # A report needs neither the GPUs nor the nodes of a run.
    report = _directives(_render("analysis", "cluster.nodes=4", "cluster.gpus=8"))
    assert (report["nodes"], "gpus-per-node" in report, "signal" in report) == ("1", False, False)


def test_the_container_is_entered_on_the_nodes_and_slurm_is_asked_outside() -> None:
    text = _render("train", "cluster.container=[apptainer,exec,'my image.sif']")
    (launch,) = [line for line in text.splitlines() if "accelerate.commands.launch" in line]
    # Inside of single quotes for bash -c, so quotes of its own are escaped.
    assert launch.strip().startswith("apptainer exec '\\''my image.sif'\\'' python -m accelerate")
    assert all("apptainer" not in line for line in text.splitlines() if "scontrol" in line)


def test_what_slurm_would_misread_is_refused() -> None:
    with pytest.raises(InputError, match="line break"):
        _render("train", 'cluster.partition="a\nb"')
    with pytest.raises(InputError, match="has its own cluster key"):
        _render("train", "cluster.extra={nodes: 3}")


def test_a_misspelt_name_in_a_template_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.sbatch.j2").write_text("{{ job.nmae }}")
    monkeypatch.setattr(scripts, "template_root", lambda: tmp_path)
    with pytest.raises(jinja2.UndefinedError, match="nmae"):
        _render()


@given(st.sets(st.integers(0, 60), min_size=1), st.one_of(st.none(), st.integers(1, 9)))
def test_rows_of_an_array_there_and_back(rows: set[int], throttle: int | None) -> None:
    text = scripts.array_of(rows, throttle)
    assert slurm.expanded(text) == sorted(rows)
    assert ("%" in text) == (throttle is not None)


def test_examples_are_what_the_templates_make() -> None:
    folder = scripts.template_root().parent
    for name, text in scripts.example_texts().items():
        assert (folder / name).read_text() == text, (
            f"python -m harness.jobs.scripts  # {name} is older than its template"
        )
    assert {path.name for path in folder.glob("*.sbatch")} == set(scripts.example_texts())
