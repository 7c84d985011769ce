"""`optbench diverge` from the command line: the document, the exit codes, bad input, and real runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from harness import cli
from harness.errors import InputError
from harness.verify.diverge import command
from harness.verify.diverge.envelope import ALPHA, Verdict, amplification
from harness.verify.diverge.session import Replayed
from harness.verify.diverge.trajectory import Trajectory
from harness.verify.pool import RankLost
from tests.harness.running import small, write_documents
from tests.harness.verify.diverge.problems import train
from tests.harness.verify.diverge.test_envelope import half
from tests.harness.verify.diverge.test_sources import run_folder

KEYS = {"inside", "p_value", "first_step", "parameter", "amplification", "schema_version"}


def rows(run: Trajectory) -> list[dict[str, object]]:
    return [{"step": s, "train/loss": run.losses[s], "grad_norm": run.gradient_norms[s]} for s in run.losses]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays of a small network instead of the run's."""

    def replayed(words: Sequence[str], steps: int, twins: int, *args: object) -> Replayed:
        run = train("adamw", steps=steps)
        moved = [train("adamw", seed, moves_weights=True, steps=steps) for seed in (1, 2)]
        twin = [train("adamw", seed, steps=steps) for seed in range(1, twins + 1)]
        return Replayed(run, twin, amplification(run, moved))

    monkeypatch.setattr(command, "replay_with_twins", replayed)


@pytest.mark.parametrize(("is_wrong", "code"), [(False, 0), (True, 1)])
def test_the_document_and_the_exit_code(
    is_wrong: bool, code: int, replays: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = run_folder(tmp_path / "a", *rows(train("adamw")))
    b = run_folder(tmp_path / "b", *rows(train("adamw", 50, change=half if is_wrong else None)))
    assert cli.main(["diverge", str(a), str(b), "--steps=12", "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document.keys() >= KEYS
    assert document["inside"] is not is_wrong
    assert (document["first_step"], document["run"]) == (4 if is_wrong else None, "RUN_B")
    assert document["amplification"] > 0
    assert (document["p_value"] < 0.05) is is_wrong
    assert cli.main(["diverge", str(a), str(b), "--steps=12"]) == code
    assert ("OUTSIDE" in capsys.readouterr().out) is is_wrong


@pytest.mark.parametrize(("smaller", "together"), [(0.03, 0.06), (0.02, 0.04), (0.6, 1.0)])
def test_the_p_value_of_the_pair_is_twice_the_smaller_one(smaller: float, together: float) -> None:
    """Each run can make the pair outside: at 5 % each, a tenth of right pairs would be."""
    replayed = Replayed(train("adamw", steps=1), [], {1: 2.0})
    for values in ((smaller, 0.9), (0.9, smaller)):
        own, theirs = (Verdict(p >= ALPHA / 2, p, 1.0, 2.0) for p in values)
        document = command.content(own, theirs, replayed)
        assert document["p_value"] == pytest.approx(together)
        assert document["inside"] is (together >= ALPHA)


@pytest.mark.parametrize(("words", "pairs"), [([], 1), (["--comparisons=12"], 12)])
def test_both_runs_are_judged_at_half_of_the_level_of_the_pair(
    words: list[str], pairs: int, replays: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def record(run: Trajectory, twins: Sequence[Trajectory], other: Trajectory, alpha: float) -> Verdict:
        asked.append(alpha)
        return Verdict(True, 0.5, 1.0, 2.0)

    monkeypatch.setattr(command, "judge", record)
    a = run_folder(tmp_path / "a", *rows(train("adamw")))
    assert cli.main(["diverge", str(a), str(a), "--steps=12", *words]) == 0
    assert asked == [ALPHA / pairs / 2] * 2


def test_a_run_that_its_own_replay_does_not_reproduce_is_named(
    replays: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = run_folder(tmp_path / "a", *rows(train("adamw", change=half)))
    b = run_folder(tmp_path / "b", *rows(train("adamw", 50)))
    assert cli.main(["diverge", str(a), str(b), "--steps=12", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["run"] == "RUN_A"


def test_runs_of_other_experiments_need_force(
    replays: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = run_folder(tmp_path / "a", *rows(train("adamw")))
    other = "steps: 100\noptimizer: {name: muon, lr: 0.01}\nseed: 4\n"
    b = run_folder(tmp_path / "b", *rows(train("adamw", 50)), config=other, identity="b")
    assert cli.main(["diverge", str(a), str(b)]) == 2
    assert "seed differs" in capsys.readouterr().err
    assert cli.main(["diverge", str(a), str(b), "--force", "--steps=12"]) == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "diverge: nothing needs two runs"),
        (["one"], "diverge: one needs two runs"),
        (["a", "b", "--twins=2"], "--twins: 2 is wrong; allowed: a whole number from 4 on"),
        (["a", "b", "--steps=0"], "--steps: 0 is wrong"),
        (["a", "b", "--comparisons=0"], "--comparisons: 0 is wrong; allowed: a whole number from 1 on"),
        (["a", "b", "--minutes=x"], "--minutes: x is wrong"),
        (["a", "b"], "RUN_A: a does not exist"),
    ],
)
def test_bad_words(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["diverge", *words]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(line)


def test_a_table_cannot_be_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything is replayed."""
    a = run_folder(tmp_path / "a", *rows(train("adamw")))
    table = tmp_path / "b.csv"
    table.write_text("step,train/loss\n1,8.5\n")
    assert cli.main(["diverge", str(a), str(table), "--replay"]) == 2
    assert "cannot be replayed here" in capsys.readouterr().err


def test_a_lost_replay_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose(*args: object) -> Replayed:
        raise RankLost("rank 0 of 1 died")

    monkeypatch.setattr(command, "replay_with_twins", lose)
    a = run_folder(tmp_path / "a", *rows(train("adamw")))
    assert cli.main(["diverge", str(a), str(a), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["message"] == "rank 0 of 1 died"


@pytest.mark.slow
def test_a_run_on_another_engine_is_inside_and_another_lr_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real runs: one process, two processes under fsdp2, and one with another learning rate, forced."""
    documents = write_documents(tmp_path)
    common = ["optimizer=sumo", "optimizer.rank=8", "steps=8", "log_every=1"]
    for name, words in {
        "one": ["optimizer.lr=0.02"],
        "two": ["optimizer.lr=0.02", "engine=fsdp2", "world_size=2"],
        "other": ["optimizer.lr=0.021"],
    }.items():
        assert cli.main(["train", *small(documents, tmp_path, *common, *words, f"name={name}")]) == 0
    capsys.readouterr()
    found = {path.parent.name: path.parent for path in tmp_path.rglob("config.yaml")}
    one, two, other = (str(found[name]) for name in ("one", "two", "other"))
    assert cli.main(["diverge", one, two, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["inside"] is True
    assert cli.main(["diverge", one, two, "--replay", "--json"]) == 0
    capsys.readouterr()
    assert cli.main(["diverge", one, other, "--force", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    # The first row is of the common initial weights.
    assert (document["first_step"], document["run"]) == (2, "RUN_B")


@pytest.mark.slow
def test_too_little_time_is_said_after_the_first_replay(tmp_path: Path) -> None:
    documents = write_documents(tmp_path)
    words = small(documents, tmp_path, "optimizer=adamw", "steps=4", "log_every=1", "name=one")
    assert cli.main(["train", *words]) == 0
    path = tmp_path / "default" / "one"
    with pytest.raises(InputError, match="is not enough for 8 twins"):
        command.main([str(path), str(path), "--minutes=0.0001"])
