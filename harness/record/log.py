"""What a person sees of a running run: messages, and a progress bar in a terminal or lines elsewhere. Rank 0 alone."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from harness.console import show_control_characters
from harness.protocols import MetricRow
from harness.record.schema import TASK_METRICS

Say = Callable[[str], None]
SLOW = 1.5
"""Ratio to the median of the others from which a process is called slow: clocks and caches differ by less."""
SLOW_ROWS = 3
"""In so many rows one after the other: any process has a slow moment."""


class Log:
    """Prints messages and keeps them in the run folder's log.txt."""

    def __init__(self, keep: Say | None, *, silent: bool = False) -> None:
        self.console = Console(file=sys.stderr, quiet=silent, highlight=False, soft_wrap=True)
        show_control_characters(self.console)
        self._keep = keep

    def say(self, text: str) -> None:
        """Print a message to the terminal and to log.txt."""
        self.console.print(text, markup=False)
        self.keep_only(text)

    def keep_only(self, text: str) -> None:
        """Write a message to log.txt alone."""
        if self._keep is not None:
            self._keep(text)

    def show(self, renderable: object) -> None:
        """Print a rich table to the terminal, and as text to log.txt."""
        self.console.print(renderable)
        plain = Console(width=110, no_color=True)
        with plain.capture() as captured:
            plain.print(renderable)
        self.keep_only(captured.get())


class ProgressSink:
    """A line per row: step, loss, speed, time left."""

    def __init__(self, log: Log, steps: int) -> None:
        self._log, self._steps = log, steps
        self._bar: Progress | None = None
        self._val = ""
        self._slow: list[int] = []
        if log.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=log.console,
                transient=True,
            )
            self._task = self._bar.add_task("training", total=steps, text="")
            self._bar.start()

    def write(self, row: MetricRow) -> None:
        step, loss, speed, wall = (
            row[key] or 0 for key in ("step", "train/loss", "throughput/tokens_per_s", "wall_s")
        )
        if row.get("val/loss") is not None:
            self._val = f"  val {row['val/loss']:.4f}"
            # The metric of the run is the first one of the row.
            metric = next((key for key in row if key.removeprefix("val/") in TASK_METRICS), None)
            if metric is not None and (value := row[metric]) is not None:
                self._val += f"  {metric.removeprefix('val/')} {value:.4f}"
        text = f"loss {loss:.4f}{self._val}  {speed:,.0f} tokens/s"
        left = wall / step * (self._steps - step) if step else 0.0
        line = f"step {step:>{len(str(self._steps))}}/{self._steps}  {text}  eta {int(left) // 60}:{int(left) % 60:02d}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
            self._log.keep_only(line)
        else:
            self._log.say(line)
        self._watch_balance(row)

    def _watch_balance(self, row: MetricRow) -> None:
        ratio = row.get("balance/ratio")
        if ratio is None:
            return
        slowest = int(row["balance/slowest_rank"] or 0)
        self._slow = [*self._slow, slowest] if ratio >= SLOW and set(self._slow) <= {slowest} else []
        if len(self._slow) == SLOW_ROWS:
            self._log.say(
                f"rank {slowest} is slow: its data and forward passes take {ratio:.1f} times as long as those of the "
                "others, who wait for it"
            )

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
