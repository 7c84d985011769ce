"""Forked training processes: each run has the weights and the record that it has in programs of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from harness.checkpoint.files import Saved
from harness.checkpoint.store import Store
from harness.config import gpus
from harness.jobs import forks, launch
from harness.jobs.outcome import RunOutcome
from harness.preparation import prepare
from harness.protocols import MetricRow
from harness.record import readers
from tests.harness.running import small, write_documents

SUMO = ("optimizer=sumo", "optimizer.rank=8", "seed=1")
OTHER = ("optimizer=adamw", "seed=2", "batch_size=32", "seq_len=64", "precision=fp32", "max_loss_rise=5")
ENDLESS = ("steps=100000", "eval.every=null", "schedule=constant", "moments.every=null", "log_every=1")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")


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


def _server() -> psutil.Process:
    # A child has its own command line from `exec` on, which a loaded machine reaches late.
    end = time.monotonic() + 20
    while True:
        found = [p for p in psutil.Process().children() if "harness.jobs.fork_server" in p.cmdline()]
        if found or time.monotonic() > end:
            (server,) = found
            return server
        time.sleep(0.01)


def _ranks() -> list[psutil.Process]:
    """The training processes, in the order of their ranks."""
    return sorted(_server().children(), key=lambda process: process.pid)


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


@pytest.fixture(autouse=True, scope="module")
def _own_server() -> Iterator[None]:
    forks.close()
    yield
    forks.close()
    assert not [p for p in psutil.Process().children() if "harness.jobs.fork_server" in p.cmdline()]


@pytest.mark.launch
@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_later_run_of_a_server_equals_the_first(engine: str, start: Callable[..., RunOutcome]) -> None:
    shared = ("world_size=2", f"engine={engine}")
    first = start("first", *shared, *SUMO)
    server = _server()
    other = start("other", *shared, *OTHER)
    later = start("later", *shared, *SUMO)
    assert _server() == server
    assert _ranks() == []
    assert [run.state for run in (first, other, later)] == ["finished"] * 3
    assert _same(first, later)
    assert _measured(first) == _measured(later)
    assert not _same(first, other)
    # A run's peak is its own, though the run between had a larger one.
    assert _peak(later) == pytest.approx(_peak(first), rel=0.05)


@pytest.mark.launch
@pytest.mark.parametrize(
    "words",
    [
        ("world_size=1",),
        pytest.param(("world_size=2", "engine=ddp"), marks=pytest.mark.slow),
        pytest.param(("world_size=2", "engine=zero2"), marks=pytest.mark.slow),
    ],
)
def test_forks_train_as_programs_that_are_started(
    words: tuple[str, ...], start: Callable[..., RunOutcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    forked = start("forked", *words, *SUMO)
    assert _server()
    # As where there are GPUs; with two processes it starts `accelerate launch`.
    monkeypatch.setattr(forks, "is_possible", lambda: False)
    started = start("started", *words, *SUMO)
    assert forked.state == started.state == "finished"
    assert _same(forked, started)
    assert _measured(forked) == _measured(started)


@pytest.mark.launch
def test_a_run_that_ends_badly_takes_no_other_run_along(
    start: Callable[..., RunOutcome], tmp_path: Path
) -> None:
    runs = tmp_path / "runs" / "default"
    first = start("first", *SUMO)
    server = _server()
    diverged = start("diverged", "optimizer=adamw", "optimizer.lr=1e30", "steps=40", "max_skipped_steps=2")
    with _signalled(runs / "stopped", lambda: os.kill(os.getpid(), signal.SIGTERM)):
        stopped = start("stopped", *ENDLESS)
    with _signalled(runs / "killed", lambda: _ranks()[1].kill()):
        killed = start("killed", *ENDLESS, "world_size=2")
    assert _server() == server
    with _signalled(runs / "orphaned", server.kill):
        orphaned = start("orphaned", *ENDLESS)
    last = start("last", *SUMO)
    assert _server() != server
    assert (diverged.state, diverged.exit_code) == ("diverged", 3)
    assert (stopped.state, stopped.exit_code) == ("interrupted", 75)
    assert Store(stopped.folder).steps()
    assert (killed.state, killed.exit_code) == ("failed", 3)
    assert killed.reason.startswith("rank 1 ended unexpectedly")
    assert (orphaned.state, orphaned.exit_code) == ("failed", 3)
    assert _same(first, last)
    assert _measured(first) == _measured(last)


@pytest.mark.launch
def test_a_run_imports_what_it_uses(tmp_path: Path) -> None:
    """Not the model zoo, nor what other engines, other commands and W&B need."""
    code = (
        "import json, sys; from harness import worker; code = worker.main(sys.argv[1:]); "
        "print(json.dumps([code, list(sys.modules)]))"
    )
    words = small(write_documents(tmp_path), tmp_path / "runs", "steps=1", "moments.every=null")
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    models = {name.split(".")[2] for name in modules if name.startswith("transformers.models.")}
    assert models == {"auto", "llama"}
    packages = {name.partition(".")[0] for name in modules}
    assert packages >= {"torch", "transformers", "accelerate"}
    unwanted = {"analysis", "datasets", "deepspeed", "matplotlib", "pandas", "plotly", "wandb"}
    assert not packages & {*unwanted, "sklearn", "tensorboard", "wandb_workspaces"}


def test_a_server_is_replaced_where_the_environment_of_its_imports_differs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forks.close()
    forks.warm_up()
    server = _server()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    forks.warm_up()
    same = forks._take()
    assert _server() == server
    same.close()
    forks.warm_up()
    server = _server()
    monkeypatch.setenv("HF_HOME", "/elsewhere")
    other = forks._take()
    assert _server() != server
    other.close()


def test_on_gpus_processes_are_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert forks.is_possible()
    forks.close()
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(gpus, "DEVICE_FOLDER", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not forks.is_possible()
    forks.warm_up()
    assert not forks._idle
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert forks.is_possible()
