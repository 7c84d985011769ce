"""`optbench submit` without a cluster: what it would submit, and what it refuses before that."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from harness import cli
from harness.jobs import grid
from harness.preparation import prepare
from harness.record.folder import RunFolder
from tests.harness.running import small, write_documents


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    base = small(write_documents(tmp_path, 60), tmp_path / "runs")
    return [word for word in base if not word.startswith("world_size")] + ["cluster=local_ci"]


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _submit(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(["submit", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_dry_run_prints_the_script_and_writes_nothing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # no SLURM needed
    before = _files(tmp_path)
    code, out, _ = _submit(capsys, *words, "optimizer=sumo", "optimizer.rank=4", "--dry-run")
    assert code == 0
    assert out.startswith("#!/usr/bin/env bash\n# optbench submit ")
    block = out[out.index("words=(") : out.index("\nfolder=")]
    assert "  optimizer=sumo\n" in block
    # The name that the run would have had, so that a later attempt finds this folder; the script knows the processes.
    assert "  name=llama_tiny-sumo-seed0-" in block
    assert "world_size" not in block
    # Resolved here for all attempts: the test's cluster has no GPUs.
    assert "  precision=fp32\n" in block
    gpus = ["cluster.gpus=1", "cluster.cpus=null", "cluster.processes=null"]
    assert "  precision=bf16\n" in _submit(capsys, *words, "optimizer=adamw", *gpus, "--dry-run")[1]
    assert "cluster" not in block
    assert _files(tmp_path) == before


def test_json_is_one_document(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _submit(capsys, *words, "name=a", "--dry-run", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["schema_version"] == 1
    assert document["job"] is None
    assert document["script"].endswith("/runs/default/a/slurm/submit.sbatch")
    assert document["text"].startswith("#!/usr/bin/env bash")


def test_a_comparison_is_an_array(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    more = ["group=g", "seeds=2", "cluster.throttle=3", "sumo.rank=4", "--dry-run", "--json"]
    code, out, _ = _submit(capsys, "compare", "adamw", "sumo", *words, *more)
    assert code == 0
    document = json.loads(out)
    names = [row["name"] for row in document["rows"]]
    assert names == ["adamw-seed0", "sumo-seed0", "adamw-seed1", "sumo-seed1"]
    assert "#SBATCH --array=0-3%3\n" in document["text"]
    assert f"/runs/g/slurm/{grid.FILE}" in document["text"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["world_size=3"],
            "disagrees with cluster.nodes × processes per node = 1 × 2 = 2; fix: leave it out",
        ),
        (["resume=false"], "resume: false would begin anew whenever the job is queued again"),
        (["optimzer=sumo"], "optimzer: sumo is for an unknown key; did you mean optimizer?"),
        (["cluster.nodes=3"], "batch_size: 8 is not divisible by world_size = 6"),
        (["clustr.nodes=3"], "clustr.nodes: 3 is for an unknown key"),
        (["--dryrun"], "did you mean --dry-run?"),
        (["--after", "x"], "--after: x is wrong; allowed: numbers of jobs"),
        (["--then", "marggin a=1"], "did you mean margin?"),
        (["--then", "compare adamw"], "is not a command of one node"),
    ],
)
def test_refusals(words: list[str], more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = _submit(capsys, *words, *more, "--dry-run")
    assert code == 2
    assert said in err.splitlines()[-1]


def test_a_command_that_is_no_job(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = _submit(capsys, "compar", "adamw", "--dry-run")
    assert code == 2
    assert "submit: compar cannot be a job; did you mean compare?" in err


def test_without_slurm_it_says_so(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    before = _files(tmp_path)
    code, _, err = _submit(capsys, *words)
    assert code == 2
    assert err.splitlines()[-1].startswith("submit: sbatch is not on PATH")
    assert _files(tmp_path) == before


def test_a_finished_run_is_refused_and_overwriting_it_is_for_the_submission(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepare([*words[:-1], "name=a", "world_size=2"], say=lambda text: None)
    RunFolder(run.folder, run.config, run.identity).end("finished", step=run.config.steps, reason="")
    code, _, err = _submit(capsys, *words, "name=a", "--dry-run")
    assert code == 2
    assert "is a finished run with these settings" in err
    code, out, _ = _submit(capsys, *words, "name=a", "overwrite=true", "--dry-run")
    assert code == 0
    # In the job it would be done again at every attempt.
    assert "  overwrite=true\n" not in out
    assert "  overwrite=false\n" in out
    assert (tmp_path / "runs/default/a/DONE").exists()


def test_any_other_command_with_its_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _submit(capsys, "report", "runs/a b", "--out", "x", "cluster.partition=p", "--dry-run")
    assert code == 0
    assert "words=(\n  report\n  'runs/a b'\n  --out\n  x\n)\nours harness.cli" in out
    assert "#SBATCH --partition=p\n" in out


def test_submitting_needs_no_torch() -> None:
    words = ["submit", "report", "x", "--dry-run"]
    code = f"import sys; from harness import cli; cli.main({words}); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_the_recipes_of_the_docs_are_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "slurm.md").read_text()
    lines = [
        line.removeprefix("$ optbench ") for line in page.splitlines() if line.startswith("$ optbench submit")
    ]
    assert len(lines) >= 6
    clusters = tmp_path / "configs" / "cluster"
    clusters.mkdir(parents=True)
    (mine,) = [block for block in page.split("```yaml\n")[1:] if "name: mine" in block]
    (clusters / "mine.yaml").write_text(mine.split("```")[0])
    (clusters / "spot.yaml").write_text("defaults: [preemptible, _self_]\nname: spot\n")
    monkeypatch.chdir(tmp_path)
    corpus = small(write_documents(tmp_path, 60), tmp_path / "runs")
    data = [word for word in corpus if word.startswith(("data", "model.config", "eval", "seq_len"))]
    for line in lines:
        more = {"compare": ["sumo.rank=8"], "sweep": []}.get(line.split()[1], ["optimizer.rank=8"])
        code, out, err = _submit(capsys, *shlex.split(line)[1:], *data, *more, "--dry-run")
        assert code == 0, err
        assert "#SBATCH --partition=gpu\n" in out or "cluster=spot" in line
