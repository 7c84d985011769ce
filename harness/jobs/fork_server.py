"""The process that imports torch and transformers once and forks the training processes of one run after the other.

    python -P -m harness.jobs.fork_server FILE_DESCRIPTOR      # started by `harness.jobs.forks`

It starts no thread and computes nothing, so a fork of it is as good as a fresh process: each has its own random
states, process group, threads and memory, and whatever a run does to its processes ends with them.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle
from typing import Any, NamedTuple, NoReturn

from harness.process import garbage
from harness.process.leaving import leave_after
from harness.process.stop import SIGNALS, outlive_the_terminal

PRELOADED = ("harness.run", "harness.worker", "transformers.models.llama.modeling_llama")
"""What every run imports; classes of other models and DeepSpeed are imported by the runs that use them."""
LATER = ("pandas", "wandb")
"""What most runs import after their first step: imported here once no run waits, for the runs to come."""
IDLE_S = 300.0
"""Time without a run, s, after which the process ends: a notebook may stay open for days."""
_Handlers = Mapping[signal.Signals, Any]


class Job(NamedTuple):
    """One run.

    Attributes:
        words: arguments of `harness.worker.main`.
        environment: all variables of each process, by rank.
        folder: current folder.
    """

    words: Sequence[str]
    environment: Sequence[Mapping[str, str]]
    folder: str


def main(argv: Sequence[str]) -> int:
    """Fork the processes of each `Job` that comes through the pipe until it is closed, and return the exit code."""
    pipe = Connection(int(argv[0]))
    # SLURM signals every process of a step; this one ends with its pipe. A fork gets the handlers back.
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    with garbage.kept_while_importing():
        for name in PRELOADED:
            import_module(name)
    home, later = os.getcwd(), list(LATER)
    while True:
        while later and not pipe.poll(0):
            import_module(later.pop(0))
        if threading.active_count() > 1:
            raise RuntimeError(f"a fork would lose threads of imported modules: {threading.enumerate()}")
        # The collector would write into the pages of these objects, which each fork would have to copy then.
        gc.collect()
        gc.freeze()
        if not pipe.poll(IDLE_S):
            return 0
        try:
            job = pipe.recv()
            outputs = [recv_handle(pipe), recv_handle(pipe)]
            _train(pipe, Job(*job), outputs, handlers, home)
        except EOFError:
            return 0


def _train(pipe: Connection, job: Job, outputs: Sequence[int], handlers: _Handlers, home: str) -> None:
    """Fork the processes of a run, pass on signals, and send (rank, exit code) of each as it ends.

    Raises:
        EOFError: the command is gone; its processes notice that themselves (`harness.process.parent`).
    """
    processes = [
        get_context("fork").Process(target=_become_rank, args=(pipe, rank, job, outputs, handlers, home))
        for rank in range(len(job.environment))
    ]
    for process in processes:
        process.start()
    for output in outputs:
        os.close(output)
    pipe.send([process.pid for process in processes])
    left = {process.sentinel: rank for rank, process in enumerate(processes)}
    while left:
        for ready in wait([pipe, *left]):
            if isinstance(ready, int):
                rank = left.pop(ready)
                processes[rank].join()
                pipe.send((rank, processes[rank].exitcode))
                continue
            number = pipe.recv()
            # Not by the pids that the command knows: only here it is certain that they are still these processes.
            for rank in left.values():
                if (pid := processes[rank].pid) is not None and processes[rank].is_alive():
                    os.kill(pid, number)


def _become_rank(
    pipe: Connection, rank: int, job: Job, outputs: Sequence[int], handlers: _Handlers, home: str
) -> NoReturn:
    """Turn this fork into a training process, as a launcher would have started it, and never return."""
    pipe.close()
    os.dup2(outputs[0], 1)
    os.dup2(outputs[1], 2)
    os.environ.clear()
    os.environ.update(job.environment[rank])
    os.chdir(job.folder)
    # Where plug-ins are found (`harness.import_path`).
    sys.path[:] = [job.folder if entry == home else entry for entry in sys.path]
    sys.argv = ["harness.train", *job.words]
    for number, handler in handlers.items():
        signal.signal(number, handler)
    # As `harness.train`: until the run takes it over, Ctrl-C ends this process without a traceback. A launcher would
    # ignore USR1 until then, too.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    name_process(f"optbench-rank{rank}")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=stream.isatty())  # pyright: ignore[reportAttributeAccessIssue]
    outlive_the_terminal()
    from harness import worker

    leave_after(lambda: worker.main(job.words))


def name_process(name: str) -> None:
    """Set the name that `ps` and `top` show for this process, on Linux (at most 15 characters)."""
    set_name = 15
    ctypes.CDLL(None).prctl(set_name, name.encode(), 0, 0, 0)


if __name__ == "__main__":
    leave_after(lambda: main(sys.argv[1:]))
