"""A training process sees that the command which started it is gone, and not before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from harness.process import parent
from tests.harness.running import small, write_documents

OPTBENCH = [sys.executable, "-m", "harness.cli", "train"]
STARTED = "import sys; from harness.jobs import forks; forks.is_possible = lambda: False; "
STARTED += "from harness import cli; sys.exit(cli.main(['train', *sys.argv[1:]]))"
"""`optbench train` as on GPUs: it starts programs instead of forking itself."""
LAUNCHER = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_machines=1",
    "--num_processes=2",
]
LAUNCHER += [
    "--mixed_precision=no",
    "--dynamo_backend=no",
    "--main_process_port=29737",
    "-m",
    "harness.train",
]
ENDLESS = ["steps=100000", "eval.every=null", "moments.every=null", "schedule=constant", "name=run"]
LIMIT_S = 120


def test_a_process_is_there_until_it_ends_also_as_a_zombie() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    known = f"{child.pid}:{parent.start_of(child.pid)}"
    assert not parent.is_gone(known)
    assert not parent.is_gone(parent.environment()[parent.VARIABLE])
    # Its number given to a process that began at another time.
    assert parent.is_gone(f"{child.pid}:1")
    child.kill()
    _wait(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
    assert parent.is_gone(known)
    child.communicate()
    assert parent.is_gone(known)
    assert not parent.is_gone("nonsense")


def test_a_process_that_trains_nothing_yet_ends_at_once() -> None:
    """As one that still imports torch: there is nothing to save."""
    code = (
        "import subprocess, sys\n"
        "from harness.process import parent\n"
        "import os; os.environ |= parent.environment()\n"
        "child = 'import time; from harness.process import parent; parent.watch(); print(1, flush=True); '\n"
        "child += 'time.sleep(60)'\n"
        "print(subprocess.Popen([sys.executable, '-c', child]).pid, flush=True); input()"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert command.stdout is not None
    child = psutil.Process(int(command.stdout.readline()))
    assert command.stdout.readline() == "1\n"
    assert child.is_running()
    command.kill()
    command.communicate()
    _wait(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text"))


def _started(
    words: list[str], run: Path, command: list[str] = OPTBENCH, **options: object
) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """`optbench train` with two rows, and the processes that it started."""
    process = subprocess.Popen(
        [*command, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,  # pyright: ignore[reportArgumentType, reportCallIssue]
    )
    _wait(lambda: _step(run) >= 2 or process.poll() is not None)
    assert process.poll() is None, process.communicate()[0]
    return process, psutil.Process(process.pid).children(recursive=True)


def _step(run: Path) -> int:
    try:
        return int(json.loads((run / "status.json").read_text())["step"])
    except (OSError, ValueError):
        return 0


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("command", "world_size"),
    [
        (OPTBENCH, 1),
        pytest.param(OPTBENCH, 2, marks=pytest.mark.slow),
        pytest.param([sys.executable, "-c", STARTED], 1, marks=pytest.mark.slow),
        pytest.param([sys.executable, "-c", STARTED], 2, marks=pytest.mark.slow),
        pytest.param(LAUNCHER, 2, marks=pytest.mark.slow),
    ],
    ids=["one", "two", "started-one", "started-two", "launcher"],
)
def test_killing_optbench_ends_its_processes_with_a_checkpoint(
    command: list[str], world_size: int, corpus: Path, tmp_path: Path
) -> None:
    """With two that are started, torch's elastic agent is between, which does not notice."""
    run = tmp_path / "default" / "run"
    words = small(corpus, tmp_path, *ENDLESS, f"world_size={world_size}")
    process, below = _started(words, run, command, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    servers = [one for one in below if "harness.jobs.fork_server" in one.cmdline()]
    assert len(servers) == (world_size + 1 if command is OPTBENCH else 0)
    assert all("-P" in one.cmdline() for one in servers)
    process.kill()
    process.communicate()
    psutil.wait_procs(below, timeout=LIMIT_S)
    assert not [one for one in below if one.is_running()]
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "interrupted"
    assert ("the end of its launcher" if command is LAUNCHER else "the end of optbench") in status[
        "attempts"
    ][-1]["reason"]
    assert (run / "REQUEUE").read_text() == f"{status['step']}\n"
    assert (run / "checkpoints" / "latest").read_text() == f"step_{status['step']:08d}\n"


@pytest.mark.slow
@pytest.mark.launch
def test_control_under_nohup_a_closed_terminal_stops_nothing(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "default" / "run"
    words = small(corpus, tmp_path, *ENDLESS)
    ignoring, _ = _started(words, run, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    ignoring.send_signal(signal.SIGHUP)
    before = _step(run)
    _wait(lambda: _step(run) > before + 4)
    assert ignoring.poll() is None
    ignoring.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM" in ignoring.communicate(timeout=LIMIT_S)[0]


@pytest.mark.launch
def test_a_closed_terminal_stops_a_run(corpus: Path, tmp_path: Path) -> None:
    """SIGHUP, and standard output and error that take nothing any more."""
    run = tmp_path / "default" / "run"
    ours, theirs = os.openpty()
    # The tests themselves may run under nohup, whose children ignore SIGHUP.
    process = subprocess.Popen(
        [*OPTBENCH, *small(corpus, tmp_path, *ENDLESS)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    os.close(theirs)
    seen = b""
    while b"loss" not in seen:
        seen += os.read(ours, 4096)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    try:
        assert process.wait(LIMIT_S) == 75
    finally:
        process.kill()
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "interrupted"
    assert "SIGHUP (the terminal was closed)" in status["attempts"][-1]["reason"]
    assert (run / "REQUEUE").exists()
