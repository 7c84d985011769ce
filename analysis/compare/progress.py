"""Show the progress of a command that trains many runs.

On a terminal (or in a notebook with ipywidgets) it is one live line; in a log file one line per run that ended.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from analysis import formatting
from analysis.runs import reading
from harness.record.readers import Status
from harness.visible import visible

POLL_S = 0.5
"""Seconds between two readings of the current run's step."""


class Verbosity(IntEnum):
    """Amount of output before a command's result."""

    QUIET = 0
    """Only runs that did not finish."""
    NORMAL = 1
    """One line of progress, and one per run."""
    VERBOSE = 2
    """Also the output of each run."""


class _Current(NamedTuple):
    """A run that is being trained: its label, folder and steps, and the step that its folder had at first."""

    label: str
    folder: Path
    steps: int
    first: int


class SessionProgress:
    """Progress of runs that are trained one after the other, or side by side in threads.

    Args:
        steps: total of all runs.
        runs: number of runs.
        verbosity: QUIET shows runs that did not finish; VERBOSE has no live line, because the runs have their own.
        to_stderr: standard output is reserved for one JSON document.
        steps_later: steps of runs after these, for the estimate of the remaining time.
    """

    def __init__(
        self, steps: int, runs: int, *, verbosity: Verbosity, to_stderr: bool, steps_later: int = 0
    ) -> None:
        self._steps, self._runs, self._later = steps, runs, steps_later
        self._verbosity = verbosity
        self._console = Console(stderr=to_stderr, highlight=False, soft_wrap=True)
        self._began = time.monotonic()
        self._done = 0
        self._current: dict[int, _Current] = {}
        self._over = threading.Event()
        self._bar: Progress | None = None
        if verbosity is Verbosity.NORMAL and _is_live(self._console):
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[text]}", markup=False),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=max(1, steps), text="")
            self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._bar is not None:
            self._thread.join()
            self._bar.stop()

    def begin(self, number: int, folder: Path, steps: int) -> None:
        """Show which run is being trained.

        Args:
            number: from 1.
            folder: of the run.
            steps: of the run.
        """
        label = f"[{number}/{self._runs}] {folder.name}"
        self._current[number] = _Current(label, folder, steps, _step(folder))
        if self._verbosity is Verbosity.VERBOSE:
            self._print(label)
        if self._bar is not None:
            self._bar.update(self._task, description=visible(self._label()), text="starting")

    def end(self, number: int, result: str, *, is_finished: bool) -> None:
        """Show how a run ended.

        Args:
            number: as for `begin`.
            result: state, time and loss, or the reason for its end.
            is_finished: True if it reached its last step.
        """
        ended = self._current.pop(number)
        self._done += ended.steps
        left = self._left(self._further())
        ending = f"; about {left} left" if left and self._verbosity is not Verbosity.QUIET else ""
        if not is_finished or self._verbosity is not Verbosity.QUIET:
            self._print(f"{ended.label}: {result}{ending}")
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=visible(self._label()), text="")

    def _print(self, line: str) -> None:
        self._console.print(visible(line), markup=False)

    def _left(self, further: int) -> str:
        """Return the estimated remaining time; empty if nothing is left or known."""
        done = self._done + further
        rest = self._steps - done + self._later
        if done <= 0 or rest <= 0:
            return ""
        return formatting.seconds(float(round((time.monotonic() - self._began) / done * rest)))

    def _watch(self) -> None:
        assert self._bar is not None
        while not self._over.wait(POLL_S):
            current = dict(self._current)
            if not current:
                continue
            further = self._further()
            left = self._left(further)
            steps = ", ".join(f"step {_step(run.folder)}/{run.steps}" for run in current.values())
            text = steps + (f", about {left} left" if left else "")
            self._bar.update(self._task, completed=self._done + further, text=text)

    def _label(self) -> str:
        return ", ".join(run.label for run in dict(self._current).values())

    def _further(self) -> int:
        """Return the steps of the current runs since they began."""
        total = 0
        for run in dict(self._current).values():
            step = _step(run.folder)
            # A run that restarts is below the step of its last attempt.
            total += step - run.first if step >= run.first else step
        return total


def _step(folder: Path) -> int:
    step = reading.number(reading.record(folder / "status.json", Status, []).get("step"))
    return int(step) if step == step else 0


def _is_live(console: Console) -> bool:
    has_widgets = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    return has_widgets or (console.is_terminal and not console.is_jupyter)
