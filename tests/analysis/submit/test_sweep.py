"""`optbench submit sweep`: which arrays are queued after which results. SLURM is a list of what was queued; the runs
of an array are written by a stand-in whose loss is a parabola in the logarithm of the learning rate. The same with a
real slurmctld: tests/slurm/test_sweeps.py."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from analysis.compare import sessions
from analysis.submit import command
from analysis.tuning import command as sweep_command
from harness.errors import InputError
from harness.jobs import grid, slurm, submit
from harness.jobs.submit import SubmitRequest
from harness.preparation import Prepared
from tests.analysis.stand_in import SMALL, Launcher, keep_compositions, parabola

BEST = {"adamw": 0.004, "sumo": 0.064}
TUNABLE = parabola(BEST)
CLUSTER = ["cluster=local_ci", "cluster.processes=1"]


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
    monkeypatch.setattr(slurm, "require_answer", lambda _: None)
    keep_compositions(monkeypatch)
    return made


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    small = [word for word in SMALL if not word.startswith("world_size")]
    middles = ["adamw.lr=0.004", "sumo.lr=0.016"]
    return ["adamw", "sumo", "trials=3", "seeds=1", f"runs_dir={tmp_path / 'runs'}", *small, *middles]


def call(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert command.main(["sweep", *words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def train(
    queued: dict[str, Any],
    end: Callable[[Prepared], float] = TUNABLE,
    fate: dict[str, Any] | None = None,
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
    queue.alive = {"100", "101"}
    again = call(capsys, *words, "group=g", *CLUSTER)
    assert (again["job"], len(again["skipped"]), again["then"]) == (None, 6, [])
    early = call(capsys, *following(first))
    assert (early["job"], early["then"]) == (None, [])
    assert len(queue.jobs) == 2


def test_trials_that_wait_or_run_without_a_job_after_them_get_one(
    queue: Queue, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the job after them is the one that asks, requeued."""
    first = call(capsys, *words, "group=g", *CLUSTER)
    queue.alive = {"100"}
    again = call(capsys, *following(first))
    assert (again["job"], [job["job"] for job in again["then"]]) == (None, ["102"])
    assert following(again) == following(first)
    assert queue.jobs[-1][2] == ("--dependency=afterany:100",)
    queue.alive = {"100", "102"}
    monkeypatch.setenv("SLURM_JOB_ID", "102")
    assert [job["job"] for job in call(capsys, *following(first))["then"]] == ["103"]


def test_trials_that_were_cancelled_or_interrupted_are_not_taken_as_failed(
    queue: Queue, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = call(capsys, *words, "group=g", *CLUSTER)
    ended = dict(first, rows=first["rows"][:3])
    train(ended, fate={names(ended)[2]: "interrupted"})
    (Path(first["folder"]) / names(ended)[2] / "DONE").unlink(missing_ok=True)
    stopped = call(capsys, *following(first), code=75)
    assert stopped["job"] is None
    assert "4 trials without a result" in stopped["reason"]
    assert len(queue.jobs) == 2
    _, continued = stopped["reason"].split("This continues: ")
    more = call(capsys, *shlex.split(continued)[3:])
    assert len(more["rows"]) == 4


def test_another_study_of_the_group_that_trains_does_not_hold_this_one(
    queue: Queue, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = call(capsys, *words, "extend=0", "group=g", *CLUSTER)
    train(first)
    call(capsys, "galore", *words[2:5], *[w for w in words[5:] if "sumo" not in w and "adamw" not in w],
         "galore.lr=0.01", "group=g", *CLUSTER)  # fmt: skip
    queue.alive = {"102"}
    assert names(call(capsys, *following(first))) == ["adamw-seed1", "sumo-seed1"]


def test_best_settings_that_train_are_neither_archived_nor_lose_their_place_in_the_ledger(
    queue: Queue, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = call(capsys, *words, "extend=0", "group=g", *CLUSTER)
    train(first)
    last = call(capsys, *following(first))
    home = tmp_path / "runs" / "g"
    before = json.loads((home / "tuning.json").read_text())["arms"]
    train(last)
    queue.alive = {last["job"]}
    # One more trial is better, so that another setting is the best one.
    BETTER = {"adamw": 0.016, "sumo": 0.064}
    for trial in ("adamw-trial1", "adamw-trial2", "adamw-trial3"):
        path = home.with_name("g-trials") / trial / "summary.json"
        summary = json.loads(path.read_text())
        rate = float(summary.get("lr") or 0.004)
        summary["val/loss"] = summary["final_val_loss"] = 3.0 + abs(math.log2(rate / BETTER["adamw"]))
        path.write_text(json.dumps(summary))
    with pytest.raises(InputError, match="waits or runs with other arguments"):
        call(capsys, *following(first))
    after = json.loads((home / "tuning.json").read_text())["arms"]
    assert [arm["confirmed"] for arm in after] == [arm["confirmed"] for arm in before]
    assert not [path for path in home.iterdir() if "replaced" in path.name]


def test_a_study_that_is_overwritten_trains_its_best_settings_again(
    queue: Queue, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = call(capsys, *words, "extend=0", "group=g", *CLUSTER)
    train(first)
    train(call(capsys, *following(first)))
    again = call(capsys, *words, "extend=0", "group=g", "overwrite=true", *CLUSTER)
    assert len(again["rows"]) == 6
    train(again)
    assert names(call(capsys, *following(again))) == ["adamw-seed1", "sumo-seed1"]


def test_the_job_after_the_trials_waits_for_the_groups_lock(
    queue: Queue,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = call(capsys, *words, "extend=0", "group=g", *CLUSTER)
    train(first)
    waits: list[float] = []
    lock = sessions.lock_group

    def noted(group: Path, timeout: float = 0) -> Any:
        waits.append(timeout)
        return lock(group, 0)

    monkeypatch.setattr(sessions, "lock_group", noted)
    call(capsys, *following(first))
    call(capsys, *words, "extend=0", "group=g", *CLUSTER)
    assert waits[0] > 60
    assert waits[1] == 0


def test_slurm_that_does_not_answer_is_no_end_of_the_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"12": "Invalid job id specified", "13": "Unable to contact slurm controller"}
    failed = lambda *words: subprocess.CompletedProcess(words, 1, "", answers[words[-1]])  # noqa: E731
    monkeypatch.setattr(slurm, "_call", failed)
    slurm.require_answer(["12_0"])
    with pytest.raises(InputError, match="job 13 has ended"):
        slurm.require_answer(["12", "13_4"])


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
