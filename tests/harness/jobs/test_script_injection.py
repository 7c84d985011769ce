"""No value leaves its place in a batch script: control characters are refused, all else is data."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis.submit import command as submit_command
from harness.config import cluster
from harness.config.cluster import ClusterConfig
from harness.errors import InputError
from harness.jobs import scripts
from harness.jobs.scripts import Job, Kind
from tests.harness.running import small, write_documents

BREAKING = [
    "\n",
    "\r",
    "\x00",
    "\x0b",
    "\x0c",
    "\x1b",
    "\x1c",
    "\x7f",
    "\x85",
    "\u2028",
    "\u2029",
    "\u202e",
    "\ud800",
]
PRINTABLE = [
    "$(touch canary)",
    "`touch canary`",
    "'; touch canary; '",
    '"; touch canary; "',
    "\\'; touch canary #",
    "a' --comment=injected 'b",
    "a\\",
    "#SBATCH --wrap=x",
    "--help",
    "-rf",
    "${IFS}&&touch canary",
    "{{ job }}%j",
    "näme ✓",
]
KINDS: list[Kind] = ["train", "sweep", "analysis"]


@functools.cache
def _local() -> ClusterConfig:
    return cluster.load(["cluster=local_ci", "cluster.python=python"])


def _job(**changes: Any) -> Job:
    values = {
        "name": "n",
        "about": ["what"],
        "words": ["a=1"],
        "run": "/runs/r",
        "grid": "/runs/g",
        "script": "/s",
    }
    return Job(**{**values, **changes})


@pytest.mark.parametrize("letter", BREAKING, ids=ascii)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "a{}b"), ("about", ["x", "a{}b"]), ("output", "/r{}un/%j.out"), ("folder", "/w{}ork"),
        ("words", ["a=1", "name=x{}touch canary"]), ("run", "/runs/r{}touch canary"), ("grid", "/g{}"),
        ("script", "/s{}s"), ("successors", "{}"), ("dependents", "/d{}\ntouch canary"),
    ],
)  # fmt: skip
def test_control_characters_of_a_job_are_refused(field: str, value: Any, letter: str) -> None:
    hostile = (
        [text.replace("{}", letter) for text in value] if isinstance(value, list) else value.format(letter)
    )
    for kind in KINDS:
        with pytest.raises(InputError, match="control character") as caught:
            scripts.render(kind, _job(**{field: hostile}), _local())
        assert letter not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    ["partition", "account", "qos", "constraint", "gpu_type", "memory", "python", "address_suffix", "logs", "name"],
)  # fmt: skip
@pytest.mark.parametrize("letter", ["\n", "\x85", "\u2028", "\x1b"], ids=ascii)
def test_control_characters_of_the_cluster_are_refused(key: str, letter: str) -> None:
    with pytest.raises(InputError, match=f"cluster.{key}.*control character"):
        cluster.load([f'cluster.{key}="a{letter}touch canary"', "cluster.gpus=1"])


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ('cluster.container=["a\nb"]', "cluster.container"),
        ('cluster.srun=["a\tb"]', "cluster.srun"),
        ('cluster.modules=["a\nb"]', "cluster.modules"),
        ('cluster.setup=["a\nb"]', "cluster.setup"),
        ('cluster.env={A: "a\nb"}', "cluster.env.A"),
        ('cluster.extra={comment: "a\nb"}', "cluster.extra.comment"),
        ("cluster.extra={outpu: y}", "is decided by the script"),
        ("cluster.env.AWS_SECRET_ACCESS_KEY=s3cr3t", "export AWS_SECRET_ACCESS_KEY in your shell"),
        ("cluster.env.wandb_api_key=s3cr3t", "export wandb_api_key"),
        ("cluster.env.DB_PASSWD=s3cr3t", "export DB_PASSWD"),
        ("cluster.env.HF_TOKENS=s3cr3t", "export HF_TOKENS"),
        ("cluster.env.X=hf_s3cr3tabcdefghijklmnop", "readable"),
        ("cluster.setup=['export DB_PASSWD=s3cr3t']", "export DB_PASSWD"),
        ("cluster.container=[docker,run,-e,'HF_TOKEN=s3cr3t']", "export HF_TOKEN"),
        ("cluster.container=[docker,login,--password,s3cr3t]", "cluster.container"),
        ("cluster.srun=['--export=ALL,WANDB_API_KEY=s3cr3t']", "export WANDB_API_KEY"),
        ("cluster.extra={export: 'ALL,MY_PRIVATE_KEY=s3cr3t'}", "export MY_PRIVATE_KEY"),
        ("cluster.logs=https://me:s3cr3t@host/logs", "cluster.logs"),
    ],
)
def test_what_no_script_may_hold(word: str, part: str) -> None:
    with pytest.raises(InputError) as caught:
        cluster.load([word])
    assert part in str(caught.value)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("flag", ["comment=x --output", "a\nb", "", "--", "ä"])
def test_flags_of_a_file_are_flags(flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "configs" / "cluster"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text(json.dumps({"name": "mine", "extra": {flag: "y"}}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is not an sbatch flag"):
        cluster.load(["cluster=mine"])


def test_control_references_to_a_secret_are_no_secret() -> None:
    config = cluster.load(
        ["cluster.setup=['export HF_TOKEN=$(cat ~/.token)']", "cluster.extra={export: 'ALL,HF_TOKEN'}"]
    )
    assert config.setup == ["export HF_TOKEN=$(cat ~/.token)"]


@pytest.mark.parametrize(
    "words",
    [
        ["runs_dir=/tmp/a\ntouch canary"], ["name=a\u2028b"], ["group=a\x85b"], ["+optimizer.note=a\rb"],
        ["cluster.logs=/tmp/a\nb"], ["margin", "out=a\nb"], ["--then", "margin out='a\nb'"],
        ["compare", "adamw", "sumo", "group=a\nb"], ["data.token=s3cr3t"], ["--then", "margin api_key=s3cr3t"],
    ],
)  # fmt: skip
def test_submit_refuses_them_before_it_does_anything(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        submit_command.main([*words, "--dry-run"])
    assert "s3cr3t" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_runs_dir_from_a_file_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As is the working folder, which nobody types."""
    words = [
        *small(write_documents(tmp_path, 40), tmp_path / "runs"),
        "cluster=local_ci",
        "cluster.processes=1",
    ]
    hostile = tmp_path / "a\ntouch canary"
    hostile.mkdir()
    monkeypatch.chdir(hostile)
    with pytest.raises(InputError, match="working folder"):
        submit_command.main([*words, "--dry-run"])
    assert not list(tmp_path.rglob("canary"))


STUB = """#!/usr/bin/env bash
# Of this test: python, srun and scontrol in one, which notes its words.
printf '%s\\0' "${0##*/}" "$@" '|' >> "$OPTBENCH_TEST_CALLS"
case "$*" in
  *harness.jobs.grid*) printf '%s\\0' "$OPTBENCH_TEST_FOLDER" "$OPTBENCH_TEST_WORD" ;;
  *"trap "*) touch "$OPTBENCH_TEST_FOLDER/DONE" ;;
  *hostnames*) echo localhost ;;
esac
"""


@pytest.fixture
def sandbox(tmp_path: Path) -> Callable[[str, Path, str], list[list[str]]]:
    """Runs a script on stubs of the programs that it calls; returns their words."""
    bin_folder, calls, errors = tmp_path / "bin", tmp_path / "calls", tmp_path / "errors"
    bin_folder.mkdir()
    for name in ("python", "srun", "scontrol"):
        (bin_folder / name).write_text(STUB)
        (bin_folder / name).chmod(0o755)

    def run(text: str, folder: Path, word: str) -> list[list[str]]:
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        with errors.open("w") as said_file:
            done = subprocess.run(
                ["bash", "-s"],
                input=text,
                text=True,
                # No pipe: a sleep that the script leaves behind would hold it open.
                stdout=subprocess.DEVNULL,
                stderr=said_file,
                cwd=work,
                timeout=60,
                env={
                    "PATH": f"{bin_folder}:{os.environ['PATH']}", "OPTBENCH_TEST_CALLS": str(calls),
                    "OPTBENCH_TEST_FOLDER": str(folder), "OPTBENCH_TEST_WORD": word, "TMPDIR": str(tmp_path),
                    "SLURM_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_NODELIST": "localhost",
                    "SLURMD_NODENAME": "localhost",
                },
                check=False,
            )  # fmt: skip
        assert done.returncode == 0, errors.read_text()
        assert not list(tmp_path.rglob("canary")), errors.read_text()
        said = [call.split("\0") for call in calls.read_text().split("\0|\0")[:-1]]
        calls.unlink()
        return said

    return run


@pytest.mark.parametrize("text", PRINTABLE)
@pytest.mark.parametrize("kind", KINDS)
def test_printable_hostile_values_are_data(
    kind: Kind, text: str, tmp_path: Path, sandbox: Callable[[str, Path, str], list[list[str]]]
) -> None:
    folder = tmp_path / "runs" / text.replace("/", "")
    folder.mkdir(parents=True)
    config = _local().model_copy(
        update={
            "env": {"VALUE": text},
            "container": ["env", f"INSIDE={text}"],
            "srun": [f"--comment={text}"],
            "account": text,
            "extra": {"reservation": text},
        }
    )
    job = _job(
        name=folder.name, about=[text], output=f"{folder}/%j.out", folder=str(folder), run=str(folder),
        words=[f"name={text}", text], grid=str(folder / "grid.jsonl"), script=str(folder / "s.sbatch"),
        successors=str(folder / "a"), dependents=str(folder / "b"),
    )  # fmt: skip
    script = scripts.render(kind, job, config)
    parsed = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert parsed.returncode == 0, parsed.stderr
    calls = sandbox(script, folder, f"name={text}")
    expected = [f"name={text}"] if kind == "sweep" else [f"name={text}", text]
    assert any(
        call[-len(expected) - (kind != "analysis") :][: len(expected)] == expected for call in calls
    ), calls
    assert any(f"--comment={text}" in call for call in calls if call[0] == "srun")
    if kind != "analysis":
        assert (folder / "slurm" / "events.tsv").exists()


def test_control_an_unquoted_value_would_be_executed(
    tmp_path: Path, sandbox: Callable[[str, Path, str], list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts.shlex, "quote", lambda text: text)
    folder = tmp_path / "runs"
    folder.mkdir()
    script = scripts.render("train", _job(words=["name=$(touch canary)"], run=str(folder)), _local())
    with pytest.raises(AssertionError):
        sandbox(script, folder, "")
    assert list(tmp_path.rglob("canary"))


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="needs sbatch, the oracle of its own directives")
def test_sbatch_reads_every_directive_as_one(tmp_path: Path) -> None:
    (tmp_path / "slurm.conf").write_text(
        "ClusterName=x\nSlurmctldHost=localhost\nAuthType=auth/none\nCryptoType=crypto/none\n"
        "SlurmctldPort=1\nMessageTimeout=1\nNodeName=localhost\nPartitionName=ci Nodes=ALL\n"
    )
    config = _local().model_copy(update={"account": "'\\\"` --wrap=x", "qos": "a\\"})
    for text in PRINTABLE:
        script = tmp_path / "a.sbatch"
        script.write_text(scripts.render("analysis", _job(name=text, folder=f"/w/{text}"), config))
        with subprocess.Popen(
            ["sbatch", "-vvv", str(script)],
            env={**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")},
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr is not None
            found: list[str] = []
            for line in process.stderr:
                if "Found in script, argument" in line:
                    found.append(line.split('argument "', 1)[1].rstrip("\n").removesuffix('"'))
                elif found:
                    break
            process.kill()
        assert {
            f"--job-name={text}",
            f"--chdir=/w/{text}",
            f"--account={config.account}",
            "--qos=a\\",
        } <= set(found)
        assert {one.partition("=")[0] for one in found} == {
            *(
                "--job-name",
                "--partition",
                "--account",
                "--qos",
                "--nodes",
                "--ntasks-per-node",
                "--cpus-per-task",
            ),
            *("--time", "--output", "--open-mode", "--requeue", "--chdir"),
        }
