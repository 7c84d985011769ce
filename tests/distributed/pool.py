"""A pool of warm rank processes: real gloo process groups that run one function after the other.

Starting a process costs seconds (it imports torch), so the processes are started once per test session and
world size, and every test sends them a function.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_S = 120


class RankPool:
    """``world_size`` processes in one gloo group."""

    def __init__(self, world_size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.world_size = world_size
        self._pipes: list[Any] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, folder / f"store{world_size}", theirs), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(rank, *args)`` on every rank, results by rank.

        The function must stand at the top level of its file, which the ranks load by path. If one raises,
        its traceback is raised here.
        """
        for pipe in self._pipes:
            pipe.send((function.__code__.co_filename, function.__name__, args))
        results, problem = [], None
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_S):
                raise TimeoutError(f"rank {rank} of {self.world_size} gave no answer within {TIMEOUT_S} s")
            ok, value = pipe.recv()
            results.append(value)
            if not ok:
                problem = problem or f"rank {rank}: {value}"
        if problem:
            raise AssertionError(problem)
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.terminate()
            process.join(10)


def _serve(rank: int, world_size: int, store: Path, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ["ACCELERATE_USE_CPU"] = "true"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    modules: dict[str, Any] = {}
    while True:
        try:
            path, name, args = pipe.recv()
        except EOFError:
            return
        try:
            if path not in modules:
                modules[path] = _load(path)
            pipe.send((True, getattr(modules[path], name)(rank, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _load(path: str) -> Any:
    name = f"ranked_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
