"""`optbench submit sweep`: which arrays are queued after which results. SLURM is a list of what was queued; the runs
of an array are written by a stand-in whose loss is a parabola in the logarithm of the learning rate. The same with a
real slurmctld: tests/slurm/test_jobs.py."""

from __future__ import annotations

import copy
import json
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from analysis.submit import command
from analysis.tuning import command as sweep_command
from harness.config import compose, sources
from harness.errors import InputError
from harness.jobs import grid, slurm, submit
from harness.jobs.submit import SubmitRequest
from harness.preparation import Prepared
from tests.analysis.stand_in import SMALL, Launcher

BEST = {"adamw": 0.004, "sumo": 0.064}
CLUSTER = ["cluster=local_ci", "cluster.processes=1"]


def parabola(run: Prepared) -> float:
    rate = run.config.optimizer.lr
    assert rate is not None
    return 3.0 + 0.2 * math.log2(rate / BEST[run.config.optimizer.name]) ** 2


@dataclass
class Queue:
    """What was queued: (job, script, flags); ``alive``: jobs that have not ended."""

    jobs: list[tuple[str, Path, tuple[str, ...]]] = field(default_factory=list)
    alive: set[str] = field(default_factory=set)

    def submit(self, script: Path, *flags: str, cluster: Any = None) -> str:
        job = str(100 + len(self.jobs))
        self.jobs.append((job, script, flags))
        return job

    def tasks(self, jobs: list[str]) -> dict[str, Any]:
        kind = type("Task", (), {"is_over": False, "state": "RUNNING"})
        return {job: kind() for job in jobs if job.partition("_")[0] in self.alive}


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    made = Queue()
    monkeypatch.setattr(slurm, "require", lambda: None)
    monkeypatch.setattr(slurm, "try_out", lambda *_: None)
    monkeypatch.setattr(slurm, "submit", made.submit)
    monkeypatch.setattr(slurm, "tasks", made.tasks)
    known: dict[str, sources.Composed] = {}

    def composed(selections: dict[str, str]) -> sources.Composed:
        key = repr(selections)
        if key not in known:
            known[key] = sources.compose(selections)
        return copy.deepcopy(known[key])

    monkeypatch.setattr(compose, "compose", composed)
    return made


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    small = [word for word in SMALL if not word.startswith("world_size")]
    middles = ["adamw.lr=0.004", "sumo.lr=0.016"]
    return ["adamw", "sumo", "trials=3", "seeds=1", f"runs_dir={tmp_path / 'runs'}", *small, *middles]


def call(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert command.main(["sweep", *words, "--json"]) == code
    out = capsys.readouterr().out
    return json.loads(out) if out else {}


def train(
    queued: dict[str, Any], end: Callable[[Prepared], float] = parabola, fate: dict[str, Any] | None = None
) -> None:
    """Do what the array does: train its rows."""
    launcher = Launcher(end=end, fate=fate or {})
    rows = grid.read(Path(queued["folder"]) / "slurm" / "grid.jsonl")
    request = SubmitRequest(command.cluster.load(CLUSTER), "", say=lambda _: None)
    for entry in queued["rows"]:
        run, _ = submit.prepared(rows[entry["row"]].words, request, writes_folder=False)
        launcher.start(run)
        (run.folder / "DONE").touch()


def following(queued: dict[str, Any]) -> list[str]:
    """The words of the job that is queued after an array."""
    text = Path(queued["then"][0]["script"]).read_text()
    words = shlex.split(text.split("words=(\n")[1].split("\n)")[0])
    assert words[:2] == ["submit", "sweep"]
    return words[2:]


def names(queued: dict[str, Any]) -> list[str]:
    return [row["name"] for row in queued["rows"]]


def test_trials_then_an_extension_then_the_best_on_fresh_seeds(
    queue: Queue, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = call(capsys, *words, "group=g", *CLUSTER, "--then", "margin optimizer=gd")
    assert names(first) == [f"{arm}-trial{n}" for n in (1, 2, 3) for arm in ("adamw", "sumo")]
    ((_, _, no_flags), (_, _, flags)) = queue.jobs
    assert (no_flags, flags) == ((), ("--dependency=afterany:100",))
    train(first)
    # SUMO's best is four times its middle, AdamW's is its middle: one more trial for both, twice.
    second = call(capsys, *following(first))
    assert names(second) == ["adamw-trial4", "sumo-trial4"]
    train(second)
    third = call(capsys, *following(second))
    assert names(third) == ["adamw-trial5", "sumo-trial5"]
    train(third)
    last = call(capsys, *following(third))
    assert last["folder"] == str(tmp_path / "runs" / "g")
    assert names(last) == [f"{arm}-seed1" for arm in ("adamw", "sumo")]
    assert [Path(job["script"]).stem for job in last["then"]] == ["report", "margin"]
    ledger = json.loads((tmp_path / "runs" / "g" / "tuning.json").read_text())
    best = {arm["label"]: arm["trials"][arm["best"] - 1]["values"]["lr"] for arm in ledger["arms"]}
    assert best == {"adamw": 0.004, "sumo": 0.064}
    assert all(arm["budget"]["trials"] == 5 for arm in ledger["arms"])
    rows = grid.read(Path(last["folder"]) / "slurm" / "grid.jsonl")
    assert {word for row in rows for word in row.words if word.startswith("optimizer.lr=")} == {
        "optimizer.lr=0.004",
        "optimizer.lr=0.064",
    }
    train(last)
    assert call(capsys, *words, "group=g", *CLUSTER)["job"] is None, "everything is finished"


def test_the_trials_are_those_of_a_sweep_on_one_machine(
    queue: Queue, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queued = call(capsys, *words, "group=g", *CLUSTER)
    capsys.readouterr()
    sweep_command.main([*words, "group=g", "world_size=1", "--dry-run", "--json"])
    local = json.loads(capsys.readouterr().out)["tuning"]["arms"]
    rows = {row.name: row for row in grid.read(Path(queued["folder"]) / "slurm" / "grid.jsonl")}
    for arm in local:
        for trial in arm["trials"]:
            assert rows[trial["run"]].identity == trial["identity"]


def test_the_same_command_queues_nothing_twice_and_next_waits_for_the_trials(
    queue: Queue, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = call(capsys, *words, "group=g", *CLUSTER)
    queue.alive = {"100"}
    again = call(capsys, *words, "group=g", *CLUSTER)
    assert (again["job"], len(again["skipped"])) == (None, 6)
    with pytest.raises(InputError, match="is too early: 6 trials wait or run"):
        call(capsys, *following(first))
    assert len(queue.jobs) == 2


def test_a_failed_trial_is_repeated_by_the_user_and_not_by_the_job(
    queue: Queue, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = call(capsys, *words, "group=g", *CLUSTER)
    train(first, fate={"sumo-trial2": "failed"})
    (Path(first["folder"]) / "sumo-trial2" / "DONE").unlink()
    last = call(capsys, *following(first))
    assert names(last) == [f"{arm}-seed1" for arm in ("adamw", "sumo")]
    repeated = call(capsys, *words, "group=g", *CLUSTER)
    assert names(repeated) == ["sumo-trial2"]


def test_all_trials_diverged(
    queue: Queue, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = call(capsys, *words, "extend=0", "group=g", *CLUSTER)
    train(first, fate=dict.fromkeys(names(first), "diverged"))
    for name in names(first):
        (Path(first["folder"]) / name / "DONE").unlink(missing_ok=True)
    capsys.readouterr()
    assert command.main(["sweep", *following(first)]) == 1
    assert "no trial of any optimizer ended with a finite loss" in capsys.readouterr().err
    assert len(queue.jobs) == 2, "nothing is queued"
    ledger = json.loads((tmp_path / "runs" / "g" / "tuning.json").read_text())
    states = [trial["state"] for arm in ledger["arms"] for trial in arm["trials"]]
    assert states == ["diverged"] * 6, "extend=0 adds no trial"
    assert (tmp_path / "runs" / "g" / "tuning.md").is_file()


def test_a_study_file_that_is_edited_after_it_was_queued(
    queue: Queue,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The queued job keeps the words of the file; the edited file is refused, and nothing is overwritten."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "configs" / "study" / "mine.yaml"
    path.parent.mkdir(parents=True)
    text = "optimizers: [adamw, sumo]\nspace: {adamw.lr: [0.002, 0.004], sumo.lr: [0.032, 0.064]}\n"
    path.write_text(text)
    others = [word for word in words[2:] if not word.startswith(("trials", "adamw", "sumo"))]
    first = call(capsys, "study=mine", *others, "group=g", *CLUSTER)
    train(first)
    path.write_text(text.replace("0.002", "0.001"))
    before = {p: p.read_bytes() for p in Path(first["folder"]).rglob("summary.json")}
    with pytest.raises(InputError, match="adamw-trial1"):
        call(capsys, "study=mine", *others, "group=g", *CLUSTER)
    assert {p: p.read_bytes() for p in Path(first["folder"]).rglob("summary.json")} == before
    last = call(capsys, *following(first))
    assert len(last["rows"]) == 2


def test_the_group_of_a_sweep_without_one_is_pinned(
    queue: Queue, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = call(capsys, *words, *CLUSTER)
    group = Path(first["folder"]).name.removesuffix("-trials")
    assert f"group={group}" in following(first)


def test_unequal_budgets_and_next_without_a_sweep_are_refused(queue: Queue, words: list[str]) -> None:
    with pytest.raises(InputError, match="tuning budgets must be equal"):
        command.main(["sweep", "adamw", "sumo", "trials=3", "adamw.lr=1e-3,2e-3", *CLUSTER])
    with pytest.raises(InputError, match="follows the trials of a sweep"):
        command.main(["compare", "adamw", "sumo", "--next", *CLUSTER])
    assert queue.jobs == []


def test_a_dry_run_writes_nothing(
    queue: Queue, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = call(capsys, *words, "group=g", *CLUSTER, "--dry-run")
    assert "#SBATCH --array=0-5" in shown["text"]
    assert not (tmp_path / "runs").exists()
    assert queue.jobs == []
