"""Runs that share processes: each has the weights and the record that it has in processes of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from harness.checkpoint.files import Saved
from harness.checkpoint.store import Store
from harness.config import checks, compose
from harness.jobs import launch, warm, warm_worker
from harness.jobs.outcome import RunOutcome
from harness.preparation import prepare
from harness.process import resident_memory
from harness.protocols import MetricRow
from harness.record import readers
from tests.harness.running import small, write_documents

SUMO = ("optimizer=sumo", "optimizer.rank=8", "seed=1")
OTHER = ("optimizer=adamw", "seed=2", "batch_size=32", "seq_len=64", "precision=fp32", "max_loss_rise=5")
ENDLESS = ("steps=100000", "eval.every=null", "schedule=constant", "moments.every=null", "log_every=1")

pytestmark = pytest.mark.skipif(not resident_memory.can_reset(), reason="runs share processes on Linux")


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., RunOutcome]:
    corpus = write_documents(tmp_path)

    def start(name: str, *words: str) -> RunOutcome:
        run = prepare(small(corpus, tmp_path / "runs", f"name={name}", *words), say=print)
        return launch.start(run)

    return start


def _rows(folder: Path) -> list[MetricRow]:
    return readers.metrics(folder / "metrics.jsonl")[0]


def _weights(outcome: RunOutcome) -> dict[str, torch.Tensor]:
    store = Store(outcome.folder)
    saved = Saved(store.folder(store.steps()[0]))
    try:
        return {name: saved.whole(name, "weight").clone() for name in saved.names("weight")}
    finally:
        saved.close()


def _same(one: RunOutcome, two: RunOutcome) -> bool:
    first, second = _weights(one), _weights(two)
    assert first
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _measured(outcome: RunOutcome) -> list[tuple[object, ...]]:
    rows = _rows(outcome.folder)
    return [
        (row["step"], row["train/loss"], row.get("val/loss"), row["grad_norm"], row["lr"]) for row in rows
    ]


def _peak(outcome: RunOutcome) -> float:
    return max(float(row["memory/peak_bytes"] or 0) for row in _rows(outcome.folder))


def _processes() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "harness.jobs.warm_worker" in p.cmdline()]


@contextmanager
def _signalled(folder: Path, send: Callable[[], None]) -> Iterator[None]:
    """Send once the run in ``folder`` has written rows."""

    def wait_and_send() -> None:
        while not (folder / "metrics.jsonl").exists() or len(_rows(folder)) < 2:
            time.sleep(0.05)
        send()

    thread = threading.Thread(target=wait_and_send, daemon=True)
    thread.start()
    yield
    thread.join()


@pytest.mark.launch
@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_later_run_equals_the_first_one_of_fresh_processes(
    engine: str, start: Callable[..., RunOutcome]
) -> None:
    shared = ("world_size=2", f"engine={engine}")
    with warm.sharing():
        first = start("first", *shared, *SUMO)
        pids = {process.pid for process in _processes()}
        other = start("other", *shared, *OTHER)
        later = start("later", *shared, *SUMO)
        assert {process.pid for process in _processes()} == pids
    assert [run.state for run in (first, other, later)] == ["finished"] * 3
    assert len(pids) == 2
    assert _same(first, later)
    assert _measured(first) == _measured(later)
    assert not _same(first, other)
    # A run's peak is its own, though the run between had a larger one; libraries loaded since are in it.
    assert _peak(later) == pytest.approx(_peak(first), rel=0.05)
    assert _processes() == []


@pytest.mark.slow
@pytest.mark.launch
def test_a_run_that_ends_badly_takes_no_other_run_along(
    start: Callable[..., RunOutcome], tmp_path: Path
) -> None:
    runs = tmp_path / "runs" / "default"
    with warm.sharing():
        first = start("first", *SUMO)
        (process,) = _processes()
        diverged = start(
            "diverged", "optimizer=adamw", "optimizer.lr=1e30", "steps=40", "max_skipped_steps=2"
        )
        with _signalled(runs / "stopped", lambda: os.kill(os.getpid(), signal.SIGTERM)):
            stopped = start("stopped", *ENDLESS)
        later = start("later", *SUMO)
        assert _processes() == [process]
        with _signalled(runs / "killed", process.kill):
            killed = start("killed", *ENDLESS)
        last = start("last", *SUMO)
    assert (diverged.state, diverged.exit_code) == ("diverged", 3)
    assert (stopped.state, stopped.exit_code) == ("interrupted", 75)
    assert Store(stopped.folder).steps()
    assert (killed.state, killed.exit_code) == ("failed", 3)
    assert "ended unexpectedly" in killed.reason
    assert _same(first, later)
    assert _same(first, last)
    assert _measured(first) == _measured(later) == _measured(last)


@pytest.mark.parametrize(
    "words",
    [
        ("engine=zero1", "world_size=2"),
        ("optimizer=torch.optim.SGD", "optimizer.lr=0.1"),
        ("time_limit=1h",),
        ("profile=true",),
        ("model.compile=true",),
        ("steps=10000000",),
    ],
)
def test_runs_that_leave_traces_get_processes_of_their_own(words: tuple[str, ...]) -> None:
    assert warm.is_shareable(checks.check(compose.load(["world_size=1"]), environ={}, devices=0))
    given = list(words) if "world_size=2" in words else ["world_size=1", *words]
    assert not warm.is_shareable(checks.check(compose.load(given), environ={}, devices=0))


def test_a_process_is_put_back_as_it_was() -> None:
    # In a process of its own: what other tests left in this one (threads, a process group) must not decide.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        executor.submit(_change_and_restore).result()


def _change_and_restore() -> None:
    before = warm_worker.ProcessState()
    state, handler = torch.get_rng_state(), signal.getsignal(signal.SIGTERM)
    torch.manual_seed(5)
    os.environ["OPTBENCH_TEST_LEFT"] = "1"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert before.restore()
    assert torch.equal(torch.get_rng_state(), state)
    assert "OPTBENCH_TEST_LEFT" not in os.environ
    assert signal.getsignal(signal.SIGTERM) is handler
    torch.nn.functional.linear = lambda *args: None
    assert not before.restore()


def test_a_peak_is_that_of_one_run() -> None:
    from harness.memory_phases import peak_bytes

    before, device = warm_worker.ProcessState(), torch.device("cpu")
    block = torch.ones(64 * 2**20)
    high = peak_bytes(device)
    del block
    before.reset_peak()
    assert peak_bytes(device) < high - 200e6
