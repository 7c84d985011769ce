"""Damaged files under slurm/, folders that cannot be written: one line each, nothing cancelled by mistake."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import cli
from harness.config import compose
from harness.errors import InputError
from harness.jobs import grid, leases, slurm, submission, submit
from harness.jobs.submission import JOURNAL, Submission
from harness.record.folder import RunFolder
from tests.harness.running import small, write_documents

FILES = {
    "slurm/jobs.jsonl": '{"job": "12", "kind": "train", "script": "s", "rows": [], "submitted": "2026-01-01"}\n',
    "slurm/events.tsv": "2026-01-01T00:00:00Z\t12\t0\tstarted\ttext\n",
    "slurm/grid.jsonl": '{"words": ["a=1"], "row": 0, "name": "run", "folder": "run", "identity": "x"}\n',
    "../.run.lease": '{"job": "12", "token": "abc", "taken": 1.0}',
}
DAMAGE: list[Callable[[bytes], bytes]] = [
    lambda data: b"",
    lambda data: data[: len(data) // 2],
    lambda data: b"\x00\xff\xfe" * 40,
    lambda data: data.replace(b"12", b"--user=root"),
    lambda data: data.replace(b"12", b"12 13"),
    lambda data: data.replace(b"12", "\u0661\u0662".encode()),
    lambda data: b"[" * 5000,
    lambda data: b'{"job": {"a": []}, "rows": 3, "words": 4}\n' * 3,
    lambda data: data.replace(b"12", b"9" * 4000),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that a job trained, next to another one that is whole."""
    for name in ("run", "whole"):
        folder = RunFolder(tmp_path / "runs" / "group" / name, compose.load(["steps=10"]), "0" * 12)
        folder.set_state("interrupted", step=3, reason="stopped")
        folder.close()
    run = tmp_path / "runs" / "group" / "run"
    (run / "slurm").mkdir()
    for name, text in FILES.items():
        (run / name).write_text(text)
    return run


@pytest.mark.parametrize("name", FILES)
def test_status_shows_all_other_runs(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = random.Random(0)
    whole = (run / name).read_bytes()
    flipped = []
    for _ in range(20):
        data = bytearray(whole)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        flipped.append(bytes(data))
    for data in [damage(whole) for damage in DAMAGE] + flipped:
        (run / name).write_bytes(data)
        assert cli.main(["status", str(run.parents[1]), "--json"]) in (0, 2), data
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err, data
        document = json.loads(shown.out)
        assert "group/whole" in {one["name"] for one in document.get("runs", [])} or document["error"], data


def test_no_damage_makes_an_argument_of_a_job(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's number goes to scancel and squeue as a word: "--user=root" there would cancel everything."""
    asked: list[tuple[str, ...]] = []

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        asked.append(words)
        return subprocess.CompletedProcess(words, 1, "", "")

    monkeypatch.setattr(slurm, "_call", call)
    monkeypatch.setattr(slurm, "is_here", lambda: True)
    for name, text in FILES.items():
        for job in ("--user=root", "12 13", "", "12_", "1e3", "١٢", "-1", "12\n13"):
            (run / name).write_text(text.replace("12", job, 1))
        assert all(entry.job.isascii() for entry in Submission(run).jobs())
        cli.main(["status", str(run.parents[1])])
        cli.main(["status", str(run.parents[1]), "--cancel", "run"])
        (run / name).write_text(text)
    words = [word for call in asked for word in call[1:]]
    assert not [word for word in words if "user" in word or " " in word or not word]


@pytest.mark.parametrize("name", [JOURNAL, submission.EVENTS, grid.FILE])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "slurm" / name).unlink(missing_ok=True)
    os.mkfifo(run / "slurm" / name)
    assert cli.main(["status", str(run.parents[1]), "--json"]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["3", "[]", '{"job": 3}', '{"job": ["--user"], "token": 1}', '{"job": "-u", "token": 1}']
)
def test_a_damaged_lease_reaches_no_command_of_slurm(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_call", lambda *words: pytest.fail(f"called {words}"))
    monkeypatch.setattr(slurm, "is_here", lambda: True)
    path = tmp_path / "a.lease"
    path.write_text(text)
    lease = leases.holder(path)
    job = "12 13" if lease is None else lease.job
    if lease is None or lease.job != "3":
        assert slurm.tasks([job]) == {}
        with pytest.raises(InputError, match="is not the number of a job"):
            slurm.cancel(job)


@pytest.mark.parametrize("key", ["runs_dir", "cluster.logs"])
def test_submit_to_a_folder_that_cannot_be_made_is_one_line(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file in its place stops root, too; a full quota fails at the same calls."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(slurm, "require", lambda: None)
    monkeypatch.setattr(slurm, "try_out", lambda text, cluster: None)
    monkeypatch.setattr(slurm, "tasks", lambda jobs: {})
    words = [
        *small(write_documents(tmp_path, 40), tmp_path / "runs"),
        "cluster=local_ci",
        "cluster.processes=1",
    ]
    words = [word for word in words if not word.startswith(f"{key}=")] + [
        f"{key}={tmp_path / 'file' / 'runs'}"
    ]
    assert cli.main(["submit", *words]) == 2
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1].startswith(key), shown.err
    assert "Traceback" not in shown.err


def test_a_full_disk_at_the_last_moment_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The quota ends while the script is written: nothing is queued. Root has no quota here, hence the stand-in."""

    def full(*_: object) -> None:
        raise OSError(122, "Disk quota exceeded")

    for name, value in {
        "require": lambda: None,
        "try_out": lambda *_: None,
        "tasks": lambda jobs: {},
    }.items():
        monkeypatch.setattr(slurm, name, value)
    words = [
        *small(write_documents(tmp_path, 40), tmp_path / "runs"),
        "cluster=local_ci",
        "cluster.processes=1",
    ]
    assert cli.main(["submit", *words, "--dry-run"]) == 0
    submitted: list[object] = []
    monkeypatch.setattr(slurm, "submit", lambda *words, **_: submitted.append(words) or "12")
    with monkeypatch.context() as patched:
        patched.setattr(submit.atomic, "write_text", full)
        assert cli.main(["submit", *words]) == 2
    assert "Disk quota exceeded" in capsys.readouterr().err.splitlines()[-1]
    assert submitted == []
    # One moment later the job is queued: saying so matters more than the entry.
    monkeypatch.setattr(Submission, "add", full)
    assert cli.main(["submit", *words]) == 0
    shown = capsys.readouterr()
    assert "job 12 is queued, but could not be recorded (Disk quota exceeded)" in shown.err
    assert shown.out.startswith("job 12\n")
