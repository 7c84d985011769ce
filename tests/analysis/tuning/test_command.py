"""`optbench sweep` from its words to its exit codes.

Runs are trained by a stand-in for the launcher whose final loss is a parabola in the logarithm of the learning rate;
all else is real. One test trains real runs, and stops one of them with a signal.
"""

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from analysis.compare import command as compare_command
from analysis.pages import screenshot
from analysis.report import command as report_command
from analysis.runs import tuning_ledger
from analysis.tuning import command
from harness.config import derived_defaults
from harness.errors import InputError
from harness.jobs import launch
from harness.jobs.outcome import RunOutcome
from harness.preparation import Prepared
from tests.analysis.stand_in import SMALL, Launcher, keep_compositions, parabola
from tests.harness import warm

BEST = {"adamw": 0.004, "sumo": 0.064, "muon": 0.02}
"""Learning rate with the lowest loss: AdamW's is the middle of its ladder, SUMO's two steps above it."""
TUNABLE = parabola(BEST)


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    fake = Launcher(end=TUNABLE)
    monkeypatch.setattr(launch, "start", fake.start)
    monkeypatch.setattr(screenshot, "browser", lambda: None)
    keep_compositions(monkeypatch)
    return fake


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    middles = ["adamw.lr=0.004", "sumo.lr=0.016"]
    return [
        "adamw",
        "sumo",
        "trials=3",
        "seeds=2",
        "group=g",
        f"runs_dir={tmp_path / 'runs'}",
        *SMALL,
        *middles,
    ]


def sweep(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    assert command.main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def arms_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {arm["label"]: arm for arm in document["tuning"]["arms"]}


def codes(document: dict[str, Any]) -> set[str]:
    return {warning["code"] for warning in document["warnings"]}


def test_equal_budgets_then_the_best_of_each_on_fresh_seeds(
    launcher: Launcher, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = sweep([*words, "extend=0"], capsys)
    trials = [f"{label}-trial{n}" for n in (1, 2, 3) for label in ("adamw", "sumo")]
    fresh = [f"{label}-seed{n}" for n in (1, 2) for label in ("adamw", "sumo")]
    assert launcher.started == [*trials, *fresh]
    arms = arms_of(document)
    assert [arm["budget"]["trials"] for arm in arms.values()] == [3, 3]
    assert arms["adamw"]["budget"]["seconds"] == pytest.approx(3 * 200 * 0.12)
    assert [t["values"]["lr"] for t in arms["adamw"]["trials"]] == [0.004, 0.002, 0.008]
    assert (arms["adamw"]["best"], arms["adamw"]["edges"]) == (1, {})
    assert (arms["sumo"]["best"], arms["sumo"]["edges"]) == (3, {"lr": "highest"})
    # Only fresh seeds are compared, at the best setting; the trials are elsewhere.
    assert {(run["seed"], run["summary"]["lr"]) for run in document["runs"]} == {
        (seed, lr) for seed in (1, 2) for lr in (0.004, 0.032)
    }
    rows = document["comparison"]["sets"][0]["table"]["rows"]
    assert [row["lr_standing"] for row in rows] == ["tuned (3 trials)"] * 2
    assert "edge_of_space" in codes(document)
    assert not codes(document) & {"untuned_lr", "unequal_tuning", "tuning_seed", "failed_trials"}
    home = tmp_path / "runs" / "g"
    assert json.loads((home / "tuning.json").read_text()) == document["tuning"]
    assert "| sumo | 3 | lr=0.032 |" in (home / "tuning.md").read_text()
    assert "Loss over learning rate" in (home / "report.html").read_text()
    # `optbench report` knows it, too, also above both folders, and leaves the trials out.
    assert report_command.main([str(tmp_path / "runs"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert len(again["runs"]) == 4
    assert any("6 tuning trials, not compared" in warning["message"] for warning in again["warnings"])


def test_on_an_edge_every_optimizer_gets_more_trials_not_only_the_one(
    launcher: Launcher, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    document = sweep(words, capsys)
    arms = arms_of(document)
    assert [arm["budget"]["trials"] for arm in arms.values()] == [5, 5]
    assert [t["values"]["lr"] for t in arms["sumo"]["trials"]] == [0.016, 0.008, 0.032, 0.064, 0.128]
    assert arms["sumo"]["best"] == 4
    assert arms["sumo"]["edges"] == {}
    # AdamW's best was inside: its trials go between it and its better neighbour.
    assert all(0.002 < t["values"]["lr"] < 0.008 for t in arms["adamw"]["trials"][3:])
    assert "edge_of_space" not in codes(document)
    # The same command again trains nothing.
    launcher.started.clear()
    assert arms_of(sweep(words, capsys)) == arms
    assert launcher.started == []


@pytest.mark.parametrize("place", ["sumo-trial4", "adamw-seed2"])
def test_what_is_interrupted_goes_on_where_it_was(
    launcher: Launcher, words: list[str], place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.fate = {place: KeyboardInterrupt()}
    document = sweep(words, capsys, 75)
    before = list(launcher.started)
    assert before[-1] == place
    assert document["tuning"]["arms"]
    launcher.fate, launcher.started = {}, []
    arms = arms_of(sweep(words, capsys))
    assert launcher.started[0] == place
    assert set(launcher.started) & set(before) == {place}
    assert [arm["budget"]["trials"] for arm in arms.values()] == [5, 5]


def test_a_diverged_trial_counts_and_is_not_tried_again(
    launcher: Launcher, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.fate = {"sumo-trial3": "diverged"}
    arms = arms_of(sweep(words, capsys))
    assert arms["sumo"]["budget"]["states"] == {"finished": 2, "diverged": 1}
    assert arms["sumo"]["budget"]["trials"] == 3
    assert arms["sumo"]["trials"][2]["loss"] is None
    assert (arms["sumo"]["best"], arms["sumo"]["edges"]) == (1, {}), "what diverged bounds the space"
    launcher.started.clear()
    sweep(words, capsys)
    assert launcher.started == []


def test_a_failed_trial_leaves_unequal_budgets_that_are_said_and_mended(
    launcher: Launcher, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.fate = {"sumo-trial3": "vanished"}
    document = sweep(words, capsys, 3)
    assert {"unequal_tuning", "failed_trials"} <= codes(document)
    (said,) = [w["message"] for w in document["warnings"] if w["code"] == "unequal_tuning"]
    assert "adamw tuned (3 trials); sumo tuned (2 trials)" in said
    # Tried again it ends lower than the best so far: the runs of the old best make room.
    launcher.fate, launcher.started = {}, []
    folder = next(Path(w.partition("=")[2]) for w in words if w.startswith("runs_dir=")) / "g-trials"
    (folder / "sumo-trial3").rename(folder / ".sumo-trial3.failed")  # the real launcher goes on in the folder
    document = sweep(words, capsys)
    assert launcher.started[0] == "sumo-trial3"
    assert "sumo-seed1" in launcher.started
    assert arms_of(document)["sumo"]["best"] == 4
    assert not codes(document) & {"unequal_tuning", "failed_trials"}


def test_an_optimizer_without_a_finite_trial_is_answered_no(
    launcher: Launcher, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.fate = {f"sumo-trial{n}": "diverged" for n in range(1, 6)}
    document = sweep(words, capsys, 1)
    arms = arms_of(document)
    assert arms["sumo"]["best"] is None
    assert [arm["budget"]["trials"] for arm in arms.values()] == [5, 5]
    assert arms["sumo"]["trials"][3]["values"]["lr"] == 0.004, "lower than all that diverged"
    assert "no_finite_trial" in codes(document)
    launcher.fate |= {f"adamw-trial{n}": "diverged" for n in range(1, 6)}
    document = sweep([word.replace("group=g", "group=h") for word in words], capsys, 1)
    assert document["runs"] == []


def test_a_third_optimizer_joins_later(
    launcher: Launcher, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep([*words, "extend=0"], capsys)
    launcher.started.clear()
    document = sweep(["muon", *words[2:-2], "extend=0"], capsys)
    assert launcher.started == [*(f"muon-trial{n}" for n in (1, 2, 3)), "muon-seed1", "muon-seed2"]
    assert list(arms_of(document)) == ["adamw", "sumo", "muon"]
    assert "unequal_tuning" not in codes(document)
    # The second learning rate that comes with Muon's default keeps its ratio to the first.
    default = derived_defaults.default_learning_rate("muon", 1_840_256)
    assert default is not None
    assert default.aux_lr is not None
    for trial in arms_of(document)["muon"]["trials"]:
        ratio = trial["values"]["aux_lr"] / trial["values"]["lr"]
        assert ratio == pytest.approx(default.aux_lr / default.lr, rel=1e-5)


def test_a_given_rate_of_embeddings_moves_with_the_ladder(
    launcher: Launcher, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    middles = ["sumo.lr=0.016", "muon.lr=0.02", "muon.aux_lr=0.005"]
    document = sweep(["muon", *words[1:-2], *middles, "extend=0"], capsys)
    tried = [trial["values"] for trial in arms_of(document)["muon"]["trials"]]
    assert tried == [{"lr": rate, "aux_lr": rate / 4} for rate in (0.02, 0.01, 0.04)]
    # Control: sumo's lr is given alone, and embeddings follow it.
    assert all(trial["values"].keys() == {"lr"} for trial in arms_of(document)["sumo"]["trials"])


def test_runs_on_the_seed_of_the_trials_are_said(
    launcher: Launcher, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Negative control: a comparison that takes in the seed that chose the setting."""
    document = sweep([*words, "extend=0"], capsys)
    assert "tuning_seed" not in codes(document)
    plain = [word for word in words[:-1] if not word.startswith(("trials=", "seeds="))]
    assert compare_command.main([*plain, "sumo.lr=0.032", "seeds=1", "--json"]) == 0
    assert "tuning_seed" in codes(json.loads(capsys.readouterr().out))


def test_a_dry_run_trains_and_writes_nothing(
    launcher: Launcher, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = sweep([*words, "--dry-run"], capsys)
    assert document["cost"]["runs"] == {"trials": 6, "at_most_added": 4, "fresh": 4}
    assert document["cost"]["tokens_per_run"] == 20 * 2 * 32
    assert command.main([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "6 trials (seed 0) and 4 runs on fresh seeds 1 and 2, and up to 4 more trials" in out
    assert launcher.started == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "bad", ["sumo.rnak=3,4,5", "sumo.rank=16,32,100000", "stesp=5", "batch_size=0", "betas=1,2,3"]
)
def test_bad_input_of_any_trial_starts_nothing_and_leaves_nothing(
    launcher: Launcher, words: list[str], bad: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError):
        command.main([*words, bad])
    assert launcher.started == []
    assert not (tmp_path / "runs").exists()


def test_runs_of_another_command_are_found_before_the_trials_are_spent(
    launcher: Launcher, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = [word for word in words if not word.startswith(("trials=", "seeds="))]
    assert compare_command.main([*plain, "seed=2", "seeds=1", "--json"]) == 0
    launcher.started.clear()
    with pytest.raises(InputError, match=r"group: g already has .*adamw-seed2 of another command"):
        command.main(words)
    assert launcher.started == []


TRIAL = tuning_ledger.Trial(
    1, {"lr": 0.1, "basis": "svd"}, "failed", f"no {Path.home()}/x", math.nan, math.nan, "a-trial1", "1f"
)
ARM = tuning_ledger.TunedArm("a", "adamw", {"lr": "ladder"}, (TRIAL,), 1, {"lr": "lowest"}, 0, ("2f",))


def test_a_ledger_is_read_as_it_was_written_and_a_damaged_one_is_none(tmp_path: Path) -> None:
    (row,) = tuning_ledger.to_json([ARM])
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps({"arms": [row]}))
    (arm,) = tuning_ledger.read(tmp_path)
    assert tuning_ledger.to_json([arm]) == [row]
    wrong = [
        {"best": "x"},
        {"best": 2},
        {"edges": {"rank": "highest"}},
        {"trials": 3},
        {"trials": [{}]},
        {"space": 1},
    ]
    wrong += [{"trials": [{**row["trials"][0], "values": None}]}]
    texts = [
        "{",
        "{}",
        '{"arms": {"a": 1}}',
        '{"arms": [3]}',
        *(json.dumps({"arms": [{**row, **w}]}) for w in wrong),
    ]
    for text in texts:
        path.write_text(text)
        assert tuning_ledger.read(tmp_path) == [], text


def test_what_leaves_the_machine_names_none_of_its_places() -> None:
    assert str(Path.home()) not in str(tuning_ledger.public(ARM))


@pytest.mark.launch
def test_real_runs_one_of_them_stopped_by_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHROMIUM", "none")
    runs = tmp_path / "runs"
    small = [word for word in SMALL if not word.startswith("steps")]
    words = ["sweep", "adamw", "lr=1e-3,4e-3", "seeds=1", "steps=24", "group=g", f"runs_dir={runs}", *small]
    words += ["--json", "eval.every=null", "moments.every=null", "log_every=1"]
    second = runs / "g-trials" / "adamw-trial2" / "metrics.jsonl"
    command = warm.Command(*words)
    until = time.monotonic() + warm.LIMIT_S
    while not (second.exists() and second.stat().st_size) and time.monotonic() < until:
        time.sleep(0.02)
    command.send_signal(signal.SIGTERM)
    out, err = command.communicate()
    assert command.returncode == 75, err
    (arm,) = json.loads(out)["tuning"]["arms"]
    assert [trial["state"] for trial in arm["trials"]] == ["finished", "interrupted"]
    done = warm.run(*words)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    (arm,) = document["tuning"]["arms"]
    assert [trial["state"] for trial in arm["trials"]] == ["finished", "finished"]
    assert all(math.isfinite(trial["loss"]) for trial in arm["trials"])
    assert len(json.loads((second.parent / "status.json").read_text())["attempts"]) == 2
    (run,) = document["runs"]
    assert (run["seed"], run["state"]) == (1, "finished")
    assert run["summary"]["lr"] == arm["trials"][arm["best"] - 1]["values"]["lr"]


@pytest.mark.slow
def test_a_kill_at_any_write_of_the_ledger_loses_nothing(
    launcher: Launcher, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL before or after the n-th rename in the study's folder, 15 rounds with n growing; then to the end."""
    small = [word.replace("trials=3", "trials=2").replace("seeds=2", "seeds=1") for word in words]
    small += ["extend=0", "--quiet"]
    home, started = tmp_path / "runs" / "g", tmp_path / "started.txt"
    began = launcher.start

    def start(run: Prepared, *, output: Any = None) -> RunOutcome:
        with started.open("a") as file:
            file.write(run.folder.name + "\n")
        return began(run, output=output)

    launch.start = start  # the fixture puts the real one back
    kills = 0
    for round_ in range(15):
        child = os.fork()
        if child == 0:
            try:
                _kill_at_rename(home, round_ // 2 + 1, is_after=round_ % 2 == 1)
                command.main(small)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        if (home / "tuning.json").exists():
            ledger = json.loads((home / "tuning.json").read_text())
            assert {arm["label"] for arm in ledger["arms"]} == {"adamw", "sumo"}
    assert kills >= 10
    document = sweep([word for word in small if word != "--quiet"], capsys)
    names = started.read_text().split()
    assert sorted(names) == sorted(set(names)), "a finished run was made again"
    arms = arms_of(document)
    assert [arm["budget"]["states"] for arm in arms.values()] == [{"finished": 2}] * 2
    whole = sweep([word.replace("group=g", "group=h") for word in small if word != "--quiet"], capsys)
    facts = ("best", "edges", "seed", "space")
    for label, arm in arms_of(whole).items():
        assert {key: arm[key] for key in facts} == {key: arms[label][key] for key in facts}
        assert [trial["loss"] for trial in arm["trials"]] == [
            trial["loss"] for trial in arms[label]["trials"]
        ]


def _kill_at_rename(folder: Path, number: int, *, is_after: bool) -> None:
    """Let this process be killed at its ``number``-th rename of a file in ``folder``."""
    rename, count = os.replace, 0

    def replace(source: Any, target: Any, **options: Any) -> None:
        nonlocal count
        count += Path(target).parent == folder
        is_it = Path(target).parent == folder and count == number
        if is_it and not is_after:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target, **options)
        if is_it:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
