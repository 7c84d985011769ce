"""Spectra of the moments: condition number, effective and stable rank, and the errors of the applied factor."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from harness.files import atomic
from harness.loop import Run
from harness.protocols import MOMENT_FIGURES, MetricRow
from harness.tracked_optimizer import tracked

BUDGET = 0.01
"""Share of the run's time that ``moments.every=auto`` may spend."""
ALLOWANCE_S = 5.0
"""Seconds up to which a probe of the 11th and the last step is made whatever its share is."""
TRUSTED_AFTER = 10
"""Steps until the time per step is known well enough."""


class Moments:
    """Adds ``moments/…`` to the row and writes moments.parquet, a row per layer.

    The first step is always probed. With ``every=auto`` the cost of each probe, on the slowest process, decides when
    the next one is affordable; all processes agree because they take the maximum. The last step is probed if that costs
    at most `ALLOWANCE_S`, or a share of the run within the budget; with a number of steps it always is.

    Args:
        run: assembled.
        folder: the run folder where this process is the one that writes it, else None.
    """

    def __init__(self, run: Run, folder: Path | None) -> None:
        self._run, self._folder = run, folder
        self._optimizer = tracked(run.optimizer)
        self._rules = {route.name: route.rule for route in self._optimizer.routes}
        self._every = run.config.moments.every
        self._next = 0
        self._spent = 0.0
        self._affords_last = True
        self._rows: list[dict[str, object]] = []

    def due(self, step: int) -> bool:
        if self._every is None or not self._optimizer.observes_moments:
            return False
        is_last = step + 1 == self._run.config.steps
        return step == 0 or step >= self._next or (is_last and self._affords_last)

    def before_update(self, step: int) -> None:
        self._optimizer.observe_moments(around=lambda: self._run.memory.phase("probes"))

    def state(self) -> dict[str, Any]:
        """Return when the next probe is affordable, and what the last ones cost."""
        return {"next": self._next, "spent": self._spent, "affords_last": self._affords_last}

    def restore(self, state: dict[str, Any], steps: int) -> str | None:
        """Continue from that; rank 0 takes the rows of its file up to there, or returns why they cannot be read."""
        self._next, self._spent = state["next"], state["spent"]
        # Checkpoints of versions that always probed the last step have no such entry.
        self._affords_last = state.get("affords_last", True)
        path = None if self._folder is None else self._folder / "moments.parquet"
        if path is None or not path.exists():
            return None
        try:
            if not path.is_file():
                raise OSError("it is not a file")
            rows = pq.read_table(path, schema=_SCHEMA).to_pylist()
            self._rows = [row for row in rows if row["step"] is not None and row["step"] <= steps]
        except (OSError, pa.ArrowException) as error:
            # The rows are a record of the past; the run itself does not need them.
            aside = path.with_name(f"{path.name}.unreadable")
            path.replace(aside)
            reason = " ".join(str(error).split())[:200]
            return f"{path.name} cannot be read ({reason}): it is now {aside.name}"
        return None

    def measure(self, step: int, row: MetricRow) -> None:
        begin = time.perf_counter()
        inside = self._optimizer.observation_seconds()
        self._run.clock.move("optimizer", "probes", inside)
        with self._run.clock.part("probes"), self._run.memory.phase("probes"):
            self._collect(step, row)
        self._schedule(step, inside + time.perf_counter() - begin)

    def _collect(self, step: int, row: MetricRow) -> None:
        layers = _on_host(self._optimizer.moment_figures())
        if self._optimizer.figures_are_divided and dist.is_initialized():
            layers = _of_all_processes(layers)
        for figure in MOMENT_FIGURES:
            values = [v for layer in layers.values() if math.isfinite(v := layer.get(figure, math.nan))]
            if values:
                row[f"moments/{figure}/median"] = statistics.median(values)
                row[f"moments/{figure}/max"] = max(values)
        if self._folder is not None:
            self._rows += [
                {
                    "step": step + 1,
                    "layer": name,
                    "rule": self._rules.get(name.split("[")[0], ""),
                    **_finite(layer),
                }
                for name, layer in layers.items()
            ]
            _write(self._folder / "moments.parquet", self._rows)

    def _schedule(self, step: int, cost: float) -> None:
        if isinstance(self._every, int):
            self._next = step + 1 + (-step - 2) % self._every  # steps count from 1 for people: n·every done
            return
        engine, elapsed = self._run.engine, self._run.state.wall_s
        if step < TRUSTED_AFTER:
            # The first row is not written yet.
            elapsed += max(0.0, self._run.clock.peek()["total"] - cost)
        cost_s, elapsed = engine.max(
            torch.tensor([cost, elapsed], dtype=torch.float64, device=engine.device)
        ).tolist()
        self._spent += cost_s
        step_s = max(elapsed, 1e-9) / (step + 1)
        is_cheap = cost_s <= ALLOWANCE_S
        self._affords_last = is_cheap or self._spent + cost_s <= BUDGET * step_s * self._run.config.steps
        affordable = math.ceil((self._spent + 2 * cost_s) / (BUDGET * step_s))
        # The first step is dearer than the others (allocation, compilation): what a step takes is only trusted
        # once a few have been timed. One more probe is set aside for the last step. As a bound it is good enough to
        # put off a probe that is expensive.
        if step < TRUSTED_AFTER:
            self._next = TRUSTED_AFTER if is_cheap else max(TRUSTED_AFTER, affordable)
        else:
            self._next = max(step + 1, affordable)


def _on_host(figures: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, dict[str, float]]:
    """Return the figures as numbers, in one copy from the device."""
    places = [(name, key) for name, values in figures.items() for key in values]
    if not places:
        return {}
    numbers = torch.stack([figures[name][key].double() for name, key in places]).tolist()
    layers: dict[str, dict[str, float]] = {name: {} for name in figures}
    for (name, key), number in zip(places, numbers):
        layers[name][key] = number
    return layers


def _of_all_processes(layers: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the layers that any process knows, in the order of their names (a collective).

    A moment that is small along the cut axis is whole on every process; the first one's figures are taken.
    """
    parts: list[dict[str, dict[str, float]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, layers)
    known = {name: layer for part in reversed(parts) for name, layer in part.items()}
    return {name: known[name] for name in sorted(known)}


def _finite(layer: dict[str, float]) -> dict[str, float | None]:
    return {key: layer[key] if math.isfinite(layer.get(key, math.nan)) else None for key in MOMENT_FIGURES}


_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("layer", pa.string()),
        ("rule", pa.string()),
        *((f, pa.float64()) for f in MOMENT_FIGURES),
    ]
)


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    # Whole file each time: parquet cannot be appended to, and a killed run must leave a readable one.
    temporary = path.with_name(f".{path.name}.part")
    pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), temporary)
    atomic.sync_file(temporary)
    temporary.replace(path)
