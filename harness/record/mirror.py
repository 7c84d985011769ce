"""Start the mirror of a run in W&B beside the first steps, which need not wait for an import and a server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from harness.protocols import MetricRow
from harness.record.wandb import WandbSink


class Mirror:
    """A `WandbSink` that a thread opens; rows that come before wait for it, in their order.

    Args:
        open_sink: builds the sink, which reports its own failures.
        earlier: rows that the run folder holds from before.
    """

    def __init__(self, open_sink: Callable[[], WandbSink], earlier: Iterable[MetricRow]) -> None:
        self._waiting: list[MetricRow] = []
        self._sink: WandbSink | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(
            target=self._open, args=(open_sink, list(earlier)), name="W&B", daemon=True
        )
        self._thread.start()

    def write(self, row: MetricRow) -> None:
        """Log a row, at the latest when the sink is open."""
        with self._lock:
            if self._sink is None:
                self._waiting.append(row)
            else:
                self._sink.write(row)

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """Wait until all rows are logged, hand the summary over and close."""
        self._thread.join()
        if self._sink is not None:
            self._sink.finish(summary, exit_code)

    def _open(self, open_sink: Callable[[], WandbSink], earlier: list[MetricRow]) -> None:
        sink = open_sink()
        sink.catch_up(earlier)
        with self._lock:
            for row in self._waiting:
                sink.write(row)
            self._waiting.clear()
            self._sink = sink
