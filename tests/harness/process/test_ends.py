"""How a training process waits for a device, leaves, and what is known of one that crashed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from harness.engines.base import ProcessEngine
from harness.process import exit_markers
from harness.process.waiting import WaitedTooLong, wait_until

LIMIT_S = 60
STUCK = """
import threading
{start}
def fail():
    threading.Thread(target=threading.Event().wait).start()
    print("said before")
    raise ValueError("the reason")
{end}
"""


def test_signals_are_handled_while_a_device_hangs() -> None:
    handled: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: handled.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(WaitedTooLong, match=r"waited 0\.2 s \(engine\.timeout_s\) for the others"):
            wait_until(lambda: False, 0.2, "the others")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert handled == [signal.SIGALRM]


def test_what_is_done_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    wait_until(lambda: True, 0.0, "nothing")
    assert pauses == []
    answers = iter([False, False, True])
    wait_until(lambda: next(answers), 60.0, "a little")
    assert pauses == [20e-6, 40e-6]


def test_the_flags_of_a_step_name_the_process_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags on a GPU whose event is never done; then on one whose event is."""
    answers = iter([False] * 10_000)

    class Event:
        def record(self) -> None: ...

        def query(self) -> bool:
            return next(answers)

    host = SimpleNamespace(copy_=lambda flags, non_blocking: None, tolist=lambda: [0.0])
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: host)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    flags: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"), shape=(1,), dtype=torch.float32)
    monkeypatch.setattr(dist, "all_reduce", lambda *words, **options: SimpleNamespace(wait=lambda: None))
    engine: Any = SimpleNamespace(world_size=2, _timeout_s=0.05)
    pending = ProcessEngine.reduce_flags(engine, flags)
    with pytest.raises(WaitedTooLong, match="another process has not joined them, or its device is still"):
        pending()
    answers = iter([True])
    assert pending() == [0.0]
    # One process waits for its device alone, however far that is behind.
    answers = iter([False] * 100 + [True])
    alone: Any = SimpleNamespace(world_size=1, _timeout_s=0.0)
    assert ProcessEngine.reduce_flags(alone, flags)() == [0.0]


def test_words_of_an_exit_are_said() -> None:
    code = "import sys; from harness.process.leaving import leave_after; leave_after(lambda: sys.exit('no such file'))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert (done.returncode, done.stderr) == (1, "no such file\n")


def test_an_exception_ends_the_process_though_a_thread_hangs() -> None:
    start, end = "from harness.process.leaving import leave_after", "leave_after(fail)"
    code = STUCK.format(start=start, end=end)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 3
    assert done.stdout == "said before\n"
    assert done.stderr.splitlines()[-1] == "ValueError: the reason"


def test_the_interpreters_own_end_would_wait_for_that_thread() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, "-c", STUCK.format(start="", end="fail()")], capture_output=True, timeout=2
        )


@pytest.mark.parametrize(("value", "code"), [(0, 0), (2, 2), ("sys.exit(75)", 75)])
def test_the_exit_code_is_that_of_the_work(value: object, code: int) -> None:
    text = f"import sys; from harness.process.leaving import leave_after; leave_after(lambda: {value})"
    assert subprocess.run([sys.executable, "-c", text], timeout=LIMIT_S).returncode == code


@pytest.mark.parametrize(
    ("end", "part"),
    [
        ("os.abort()", r"rank 3 crashed in native code \(Aborted\)"),
        ("os.kill(os.getpid(), 9)", r"rank 3 ended unexpectedly \(killed, or out of memory\)"),
    ],
)
def test_a_crash_is_told_from_a_kill(end: str, part: str, tmp_path: Path) -> None:
    text = f"import os\nfrom harness.process import exit_markers\nwith exit_markers.marked():\n    {end}"
    environ = {**os.environ, exit_markers.FOLDER_VARIABLE: str(tmp_path), "RANK": "3"}
    done = subprocess.run([sys.executable, "-c", text], env=environ, timeout=LIMIT_S, capture_output=True)
    assert done.returncode < 0
    missing = exit_markers.missing_ranks(tmp_path)
    assert re.fullmatch(part, exit_markers.describe_missing(missing))
    assert ("line 4 in <module>" in missing[3]) == ("abort" in end)
