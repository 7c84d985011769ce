"""Runs side by side end as runs in turn do: same results, no run ends another, signals reach all, memory is checked."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from analysis.compare import arguments, command, side_by_side
from analysis.pages import screenshot
from analysis.runs.loading import load
from analysis.submit import command as submit_command
from analysis.tuning import command as tuning_command
from harness.errors import InputError
from harness.jobs import launch
from harness.jobs.outcome import RunOutcome
from harness.preparation import Prepared, prepare
from tests.analysis.stand_in import SMALL, Launcher, keep_compositions


class Meeting(Launcher):
    """A stand-in whose runs wait for each other, two at a time: it only returns if two are trained at once."""

    barrier = threading.Barrier(2, timeout=30)

    def start(self, run: Prepared, *, output: Any = None) -> RunOutcome:
        self.barrier.wait()
        return super().start(run, output=output)


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(screenshot, "browser", lambda: None)
    keep_compositions(monkeypatch)
    return ["adamw", "sumo", "seeds=2", f"runs_dir={tmp_path / 'runs'}", *SMALL]


def document(words: list[str], group: str, capsys: pytest.CaptureFixture[str], code: int) -> Any:
    assert command.main([*words, f"group={group}", "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    (only,) = found["comparison"]["sets"]
    return only["arms"], only["pairs"], [(run["folder"], run["state"]) for run in found["runs"]]


def test_results_are_those_of_runs_in_turn_and_a_failure_ends_no_other(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = []
    for group, launcher, extra in (("a", Launcher(), []), ("b", Meeting(), ["concurrency=2"])):
        launcher.fate = {"sumo-seed0": "failed"}
        monkeypatch.setattr(launch, "start", launcher.start)
        results.append(document([*words, *extra], group, capsys, 3))
        assert sorted(launcher.started) == ["adamw-seed0", "adamw-seed1", "sumo-seed0", "sumo-seed1"]
    assert results[0] == results[1]
    assert ("sumo-seed0", "failed") in results[1][2]


def test_a_sweep_side_by_side_has_the_ledger_of_one_in_turn(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledgers = []
    for group, launcher, extra in (("a", Launcher(), []), ("b", Meeting(), ["concurrency=2"])):
        monkeypatch.setattr(launch, "start", launcher.start)
        own = [*words, "lr=0.001,0.004", f"group={group}", *extra, "--quiet"]
        assert tuning_command.main(own) == 0
        ledgers.append(json.loads((tmp_path / "runs" / group / "tuning.json").read_text())["arms"])
    assert ledgers[0] == ledgers[1]


def test_an_exception_of_one_run_is_raised_after_the_others_ended(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = Launcher(fate={"adamw-seed0": MemoryError("of the test")})
    monkeypatch.setattr(launch, "start", launcher.start)
    with pytest.raises(MemoryError):
        command.main([*words, "group=g", "concurrency=2", "--quiet"])


def test_threads_are_divided_and_identities_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    plain = [f"runs_dir={tmp_path}", *(word for word in SMALL if not word.startswith("engine."))]
    run = prepare(plain, say=print, writes_folder=False)
    (shared,) = side_by_side.prepared([run], 3)
    assert shared.overrides[-1] == "engine.threads=2"
    assert prepare(shared.overrides, say=print, writes_folder=False).config == shared.config
    assert prepare(shared.overrides, say=print, writes_folder=False).identity == run.identity
    assert side_by_side.prepared([run], 1) == [run]
    own = prepare([*plain, "engine.threads=5"], say=print, writes_folder=False)
    assert side_by_side.prepared([own], 2) == [own]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert side_by_side.prepared([run], 3) == [run]


def test_runs_that_do_not_fit_are_refused_before_any_starts(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = Launcher()
    monkeypatch.setattr(launch, "start", launcher.start)
    run = prepare(words[3:], say=print, writes_folder=False)
    needed = side_by_side.needed_bytes(run.config)
    assert 450 * 2**20 < needed < 700 * 2**20, "a tiny model is mostly torch"
    free = type("Memory", (), {"available": int(2.5 * needed / (1 - side_by_side.KEEP_FREE))})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert command.main([*words, "group=g", "concurrency=2", "--quiet"]) == 0
    launcher.started.clear()
    with pytest.raises(InputError, match=r"concurrency: 4 needs about .* are free; fix: concurrency=2"):
        command.main([*words, "group=h", "concurrency=4"])
    assert not launcher.started


def test_bad_values_gpus_and_clusters_are_refused(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("0", "65", "two", ""):
        with pytest.raises(InputError, match=r"concurrency: .* 1 to 64"):
            arguments.plan(["adamw", f"concurrency={value}"])
    for name, own in (("compare", []), ("sweep", ["trials=2"])):
        with pytest.raises(InputError, match="jobs of an array"):
            submit_command.main([name, *words, *own, "group=g", "concurrency=2", "--dry-run"])
    monkeypatch.setattr(side_by_side, "visible_devices", lambda: 1)
    with pytest.raises(InputError, match="is for CPUs"):
        command.main([*words, "group=g", "concurrency=2"])


def test_a_signal_reaches_runs_of_all_threads_and_those_that_start_after_it(tmp_path: Path) -> None:
    received: list[tuple[str, signal.Signals]] = []
    begun, ended = threading.Barrier(3, timeout=30), threading.Event()

    def run(name: str, *, waits: bool) -> None:
        with launch.SignalForwarder(tmp_path) as forwarder:
            forwarder.connect(lambda number: received.append((name, number)))
            if waits:
                begun.wait()
                ended.wait(30)

    before = signal.getsignal(signal.SIGTERM)
    with launch.ThreadSignals() as signals:
        threads = [threading.Thread(target=run, args=(name,), kwargs={"waits": True}) for name in "ab"]
        for thread in threads:
            thread.start()
        begun.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received is signal.SIGTERM
        ended.set()
        for thread in threads:
            thread.join()
        late = threading.Thread(target=run, args=("late",), kwargs={"waits": False})
        late.start()
        late.join()
    assert sorted(received) == [(name, signal.SIGTERM) for name in ("a", "b", "late")]
    assert signal.getsignal(signal.SIGTERM) is before


def test_after_a_signal_no_other_run_starts(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopped(Launcher):
        def start(self, run: Prepared, *, output: Any = None) -> RunOutcome:
            self.fate[run.folder.name] = "interrupted"
            outcome = super().start(run, output=output)
            os.kill(os.getpid(), signal.SIGTERM)
            return outcome

    launcher = Stopped()
    monkeypatch.setattr(launch, "start", launcher.start)
    assert command.main([*words[:2], "seeds=8", *words[3:], "group=g", "concurrency=2"]) == 75
    assert len(launcher.started) < 16
    assert "resumes from here" in capsys.readouterr().out


@pytest.mark.slow
def test_trained_losses_are_bit_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screenshot, "browser", lambda: None)
    words = [
        "adamw",
        "sumo",
        "seeds=1",
        f"runs_dir={tmp_path}",
        "steps=3",
        *SMALL[1:],
        "checkpoint.every=null",
    ]
    losses = []
    for group, extra in (("a", []), ("b", ["concurrency=2"])):
        assert command.main([*words, f"group={group}", *extra, "--quiet"]) == 0
        losses.append({run.where: run.summary["val/loss"] for run in load(tmp_path / group)})
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
