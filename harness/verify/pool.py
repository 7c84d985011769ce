"""Warm rank processes: a gloo group on this machine's CPUs that runs one function after the other.

Starting a process costs seconds (it imports torch, transformers and DeepSpeed), a cell costs one or two.
Nothing here imports torch before a rank has started.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

START_S = 180
TIMEOUT_S = 180
"""For a cell. The first one of an engine imports its libraries."""
GRACE_S = 15
"""For the other ranks, once one has failed: most are then waiting for it in a collective."""
_STACK_S = 2


class RanksFailed(Exception):
    """A rank raised; the message is its traceback. Others may still be waiting for it: close the pool."""


class RankLost(Exception):
    """A rank died, or gave no answer in time; the message names it and holds what is known of where it was."""


class RankPool:
    """``world_size`` processes in one gloo group.

    Args:
        world_size: how many.
        folder: scratch of these processes: their group's store, logs, current folder.
        start: "module:function", called with (rank, folder) in each before anything else.

    Raises:
        RankLost: one did not start.
    """

    def __init__(self, world_size: int, folder: Path, start: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        self.world_size = world_size
        self._folder = folder
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, folder, start, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        try:
            self._collect("starting", START_S)
        except RanksFailed as error:
            self.close(kill=True)
            raise RankLost(str(error)) from None

    @property
    def is_open(self) -> bool:
        """False after `close`, and after ranks were lost."""
        return bool(self._processes)

    def run(self, target: str, *args: Any, what: str = "", timeout_s: float = TIMEOUT_S) -> list[Any]:
        """``function(*args)`` on every rank; results by rank.

        Args:
            target: "module:function".
            args: picklable.
            what: is being done, for messages.
            timeout_s: until every rank must have answered.

        Raises:
            RanksFailed: it raised on a rank.
            RankLost: a rank died or hangs; the pool is closed.
        """
        for pipe in self._pipes:
            pipe.send((target, args))
        return self._collect(what or target, timeout_s)

    def _collect(self, what: str, timeout_s: float) -> list[Any]:
        answers: dict[int, Any] = {}
        failed: dict[int, str] = {}
        waiting = set(range(self.world_size))
        deadline = time.monotonic() + timeout_s
        while waiting:
            left = deadline - time.monotonic()
            if left <= 0:
                self._give_up(sorted(waiting), what, failed, timeout_s)
            for rank in self._ready(waiting, left):
                waiting.remove(rank)
                answer = self._answer(rank)
                if answer is None:
                    self._bury(rank, what, failed)
                is_good, value = answer
                if is_good:
                    answers[rank] = value
                else:
                    failed[rank] = f"rank {rank} of {self.world_size}, {what}:\n{value}"
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failed:
            raise RanksFailed(next(iter(failed.values())))
        return [answers[rank] for rank in range(self.world_size)]

    def _ready(self, waiting: set[int], timeout_s: float) -> list[int]:
        """Ranks that have answered or died."""
        handles = {self._pipes[rank]: rank for rank in waiting}
        handles |= {self._processes[rank].sentinel: rank for rank in waiting}
        return sorted({handles[handle] for handle in wait(list(handles), timeout=timeout_s)})

    def _answer(self, rank: int) -> tuple[bool, Any] | None:
        """What a rank sent; None if it died before."""
        try:
            return self._pipes[rank].recv() if self._pipes[rank].poll() else None
        except (EOFError, OSError):
            return None

    def _bury(self, rank: int, what: str, failed: dict[int, str]) -> NoReturn:
        """A rank has died."""
        self._processes[rank].join(_STACK_S)
        code = self._processes[rank].exitcode
        log = self._log(rank)
        self.close(kill=True)
        first = next(iter(failed.values()), "")
        raise RankLost(f"rank {rank} of {self.world_size} died (exit code {code}) in {what}\n{first}{log}")

    def _give_up(
        self, waiting: Sequence[int], what: str, failed: dict[int, str], timeout_s: float
    ) -> NoReturn:
        """Ranks gave no answer."""
        if failed:
            self.close(kill=True)
            raise RanksFailed(next(iter(failed.values())))
        for rank in waiting:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(_STACK_S)
        logs = [f"rank {rank} of {self.world_size}:\n{self._log(rank)}" for rank in waiting]
        self.close(kill=True)
        hangs = ", ".join(f"rank {rank}" for rank in waiting)
        raise RankLost(
            f"{hangs} of {self.world_size} gave no answer within {timeout_s:.0f} s in {what}\n"
            + "\n".join(logs)
        )

    def _log(self, rank: int, lines: int = 60) -> str:
        path = _log_path(self._folder, rank)
        text = path.read_text(errors="replace") if path.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def close(self, kill: bool = False) -> None:
        """End the processes."""
        for pipe in self._pipes:
            if not kill:
                with suppress(OSError):
                    pipe.send(None)
            pipe.close()
        for process in self._processes:
            if not kill:
                process.join(5)
            if process.is_alive():
                process.kill()
                process.join(5)
        self._pipes, self._processes = [], []


def _log_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def _serve(rank: int, world_size: int, folder: Path, start: str | None, pipe: Connection) -> None:
    log = _log_path(folder, rank).open("w")
    # What libraries print must not reach a terminal or a JSON document; a dead rank's last words are in here.
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log, all_threads=True)
    # Ctrl-C reaches the whole terminal's group; the process that started us ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _set_environment(rank, world_size, folder)
    try:
        _join_group(rank, world_size, folder)
        if start:
            _load(start)(rank, folder)
        pipe.send((True, None))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        return
    while (job := _next(pipe)) is not None:
        target, args = job
        try:
            pipe.send((True, _load(target)(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    # Leaving the group in order aborts now and then, after all work is done (threads of gloo and FSDP).
    os._exit(0)


def _next(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return None


def _load(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def _set_environment(rank: int, world_size: int, folder: Path) -> None:
    cache = os.environ.get("OPTBENCH_CACHE")
    if cache:
        os.environ["OPTBENCH_CACHE"] = str(Path(cache).absolute())
    # A user's own ./configs would change what is certified.
    os.chdir(folder)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        ACCELERATE_USE_CPU="true",
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1",
    )


def _join_group(rank: int, world_size: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
