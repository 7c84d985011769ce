"""A pool of rank processes: a gloo group on this machine's CPUs that runs one function after the other.

Ranks are forks of one process that has imported torch and transformers; starting programs would take seconds each.
The tests use the same pool. Nothing here imports torch before a rank has started.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

from harness.process import termination

PRELOADED = ("harness.run", "transformers.models.llama.modeling_llama")
"""Imported once for all ranks."""
START_S = 180
TIMEOUT_S = 180
"""Time limit of one function, s. The first cell of an engine imports its libraries."""
GRACE_S = 15
"""Time, s, that the other ranks get once one has failed: most then wait for it in a collective."""
_STACK_S = 2
_WHILE_IMPORTED = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
"""Environment of the process that imports for all ranks: libraries start threads when they are loaded, and a fork has
none of them; they ask which device to use, and CUDA cannot be used in a fork once that has initialized it."""


class RanksFailed(Exception):
    """A function raised an exception on a rank; the message is the traceback of that rank."""


class RankLost(Exception):
    """A rank died or gave no answer in time; the message names the rank and holds the end of its log."""


class RankPool:
    """``world_size`` processes in one gloo group; after `close` or a lost rank, the next `run` starts new ones.

    Args:
        world_size: number of processes.
        folder: scratch folder of the processes: their group's store, their logs, their current folder.
        start: "module:function", called with (rank, folder) in each process before anything else.
        preload: modules that are imported once for all ranks; ignored where this process has started ranks before.
        grace_s: time that the other ranks get once one has failed, s.

    Raises:
        RankLost: a process did not start.
    """

    def __init__(
        self,
        world_size: int,
        folder: Path,
        start: str | None = None,
        *,
        preload: Sequence[str] = PRELOADED,
        grace_s: float | None = None,
    ) -> None:
        self.world_size = world_size
        self._preload, self._grace_s = preload, grace_s
        self._folder, self._start = folder, start
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        self._open()

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        # A new group must not find the keys of an earlier one, of this pool or of another in the folder.
        store = self._folder / f"store-{uuid.uuid4().hex}"
        context = _preloaded(self._preload)
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self.world_size, self._folder, store, self._start, theirs, dict(os.environ)),
                daemon=True,
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
        """Return False after `close`, and after ranks were lost."""
        return bool(self._processes)

    def run(self, target: str, *args: Any, what: str = "", timeout_s: float = TIMEOUT_S) -> list[Any]:
        """Call ``function(*args)`` on every rank and return the results by rank.

        Args:
            target: "module:function".
            args: picklable arguments.
            what: name of the work, for messages.
            timeout_s: time by which every rank must have answered, s.

        Raises:
            RanksFailed: the function raised on a rank; ranks that did not answer after that are ended.
            RankLost: a rank died or hangs; the pool is closed.
        """
        if not self.is_open:
            self._open()
        for pipe in self._pipes:
            pipe.send((target, args))
        return self._collect(what or target, timeout_s)

    def _collect(self, what: str, timeout_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        failed: dict[int, str] = {}
        waiting = set(range(self.world_size))
        deadline = time.monotonic() + timeout_s
        while waiting:
            left = deadline - time.monotonic()
            if left <= 0:
                self._raise_timeout(sorted(waiting), what, failed, timeout_s)
            for rank in self._ready(waiting, left):
                waiting.remove(rank)
                answer = self._answer(rank)
                if answer is None:
                    self._raise_death(rank, what, failed)
                is_good, value = answer
                if is_good:
                    results[rank] = value
                else:
                    failed[rank] = f"rank {rank} of {self.world_size}, {what}:\n{value}"
                    grace_s = GRACE_S if self._grace_s is None else self._grace_s
                    deadline = min(deadline, time.monotonic() + grace_s)
        if failed:
            raise RanksFailed(next(iter(failed.values())))
        return [results[rank] for rank in range(self.world_size)]

    def _ready(self, waiting: set[int], timeout_s: float) -> list[int]:
        """Return the ranks that answered or died within ``timeout_s``."""
        handles = {self._pipes[rank]: rank for rank in waiting}
        handles |= {self._processes[rank].sentinel: rank for rank in waiting}
        return sorted({handles[handle] for handle in wait(list(handles), timeout=timeout_s)})

    def _answer(self, rank: int) -> tuple[bool, Any] | None:
        """Return the (success, value) that a rank sent; None if it died before."""
        try:
            return self._pipes[rank].recv() if self._pipes[rank].poll() else None
        except (EOFError, OSError):
            return None

    def _raise_death(self, rank: int, what: str, failed: dict[int, str]) -> NoReturn:
        """Close the pool and raise the error for a rank that died."""
        self._processes[rank].join(_STACK_S)
        code = self._processes[rank].exitcode
        log = self._log(rank)
        self.close(kill=True)
        first = next(iter(failed.values()), "")
        raise RankLost(f"rank {rank} of {self.world_size} died (exit code {code}) in {what}\n{first}{log}")

    def _raise_timeout(
        self, waiting: Sequence[int], what: str, failed: dict[int, str], timeout_s: float
    ) -> NoReturn:
        """Close the pool and raise the error for ranks that gave no answer, with their stacks."""
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
        """End the processes, by force if ``kill``."""
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


def _preloaded(modules: Sequence[str]) -> Any:
    """Return a way to start processes as forks of one that has imported modules, once for all ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    kept = {name: os.environ.get(name) for name in _WHILE_IMPORTED}
    os.environ.update(_WHILE_IMPORTED)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _log_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def _serve(
    rank: int,
    world_size: int,
    folder: Path,
    store: Path,
    start: str | None,
    pipe: Connection,
    environment: Mapping[str, str],
) -> None:
    """Run the functions that come through ``pipe`` until it is closed."""
    _follow_server()
    # That of the server may be older.
    os.environ.clear()
    os.environ.update(environment)
    log = _log_path(folder, rank).open("w")
    # What libraries print must not reach a terminal or a JSON document; the log keeps the last output of a dead rank.
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log, all_threads=True)
    # Ctrl-C reaches the terminal's whole process group; the process that started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _set_environment(rank, world_size, folder)
    try:
        _join_group(rank, world_size, store)
        if start:
            _load(start)(rank, folder)
        # What was imported is left out of the collection that every run begins with (`harness.process.garbage`).
        gc.collect()
        gc.freeze()
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


def _follow_server() -> None:
    """Let this rank end with the fork server, and the server with the command, even while a rank computes for ever."""
    termination.die_with_parent()
    # The server ends when nobody holds the other end of this pipe. A rank is given a copy, because in general it may
    # start processes, too.
    server: Any = forkserver._forkserver  # pyright: ignore[reportAttributeAccessIssue]
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None


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
    # The user's own ./configs would change what is certified.
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


def _join_group(rank: int, world_size: int, store: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
