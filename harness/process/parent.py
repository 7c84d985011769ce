"""Notice that `optbench` or a launcher is gone, so that no training process outlives the command that started it.

A launcher between the two survives a SIGKILL of `optbench`, and a death signal (PR_SET_PDEATHSIG) would reach only
the launcher. So each training process watches both, by process id and start time. Torch-free.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import psutil

from harness.errors import ExitCode
from harness.process.stop import KILLED, Stop

VARIABLE = "OPTBENCH_PARENT"
"""Environment variable: ``pid:start`` of `optbench`; absent where a run is started otherwise."""
_LAUNCHED = "TORCHELASTIC_RUN_ID"
"""Environment variable that torchrun and `accelerate launch` set in the processes that they start and wait for."""
POLL_S = 1.0
PATIENCE_S = 600.0
"""How long a process that was asked to stop may take to save; a hanging one is killed then."""


def environment() -> dict[str, str]:
    """Return the environment variable by which processes that this one starts watch it."""
    return {VARIABLE: f"{os.getpid()}:{start_of(os.getpid())}"}


def start_of(pid: int) -> str | None:
    """Return the start time of a process, comparable on this machine until it reboots; None if it does not run."""
    try:
        # Not psutil's create_time: it depends on the clock, which may be set while a run trains.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, IndexError):
        return None
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.Error:
        return None


def is_gone(parent: str) -> bool:
    """Return True if the process that ``pid:start`` names has ended, also where its number was given anew."""
    pid, _, start = parent.partition(":")
    return pid.isdecimal() and start_of(int(pid)) != start


def watch() -> None:
    """Begin to watch `optbench` and the launcher, as far as they started this process; once per process."""
    if any(thread.name == VARIABLE for thread in threading.enumerate()):
        return
    parents = {}
    if VARIABLE in os.environ:
        parents["optbench"] = os.environ[VARIABLE]
    if _LAUNCHED in os.environ:
        parents["its launcher"] = f"{os.getppid()}:{start_of(os.getppid())}"
    if parents:
        Stop.look = staticmethod(partial(_gone, parents))
        threading.Thread(target=_watch, args=(parents,), name=VARIABLE, daemon=True).start()


def _gone(parents: Mapping[str, str]) -> str:
    """Return who of ``name → pid:start`` is gone, in words; "" if nobody is."""
    for name, parent in parents.items():
        if is_gone(parent):
            return f"the end of {name} (process {parent.partition(':')[0]} is gone)"
    return ""


def _watch(parents: Mapping[str, str]) -> None:
    while not (gone := _gone(parents)):
        time.sleep(POLL_S)
    Stop.abandoned = gone
    if not Stop.installed:
        # Nothing is trained yet.
        os._exit(ExitCode.RESUMABLE)
    time.sleep(PATIENCE_S)
    os._exit(KILLED + signal.SIGKILL)
