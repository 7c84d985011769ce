"""The pool of rank processes for tests: `harness.verify.pool` with functions of test files."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from harness.verify import pool

PRELOADED = (*pool.PRELOADED, "harness.worker", "pandas", "wandb", "tests.distributed.frozen")
"""Imported once per test process for all processes that tests fork: ranks, runs and commands."""
_modules: dict[str, ModuleType] = {}


class RankPool(pool.RankPool):
    """``world_size`` warm processes in one gloo group, which tests send functions to."""

    def __init__(self, world_size: int, folder: Path) -> None:
        super().__init__(world_size, folder, preload=PRELOADED)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Call ``function(rank, *args)`` on every rank and return the results by rank.

        The function must be at the top level of its file, which the ranks load by path.

        Raises:
            AssertionError: the function raised on a rank; the message is its traceback.
        """
        file, name = function.__code__.co_filename, function.__name__
        try:
            return super().run("tests.distributed.pool:call", file, name, args, what=name)
        except pool.RanksFailed as error:
            raise AssertionError(str(error)) from None


def call(file: str, name: str, args: tuple[Any, ...]) -> Any:
    """Call a function of a test file with this process' rank and ``args``."""
    if file not in _modules:
        spec = importlib.util.spec_from_file_location(f"ranked_{os.path.basename(file)[:-3]}", file)
        assert spec is not None
        assert spec.loader is not None
        module = _modules[file] = importlib.util.module_from_spec(spec)
        # Dataclasses and pickles look their module up by name.
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return getattr(_modules[file], name)(int(os.environ["RANK"]), *args)
