"""What runs are compared by: the metric of their task, or else the validation loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from analysis import formatting
from analysis.runs.reading import number
from harness.tasks.metrics import METRICS, Better

FRACTION = "fraction"


@dataclass(frozen=True)
class Measure:
    """A figure of the last step, with its direction and unit."""

    name: str
    """``loss``, or a key of `harness.tasks.metrics.METRICS`."""
    better: Better
    unit: str
    """As summary.json has it: ``nats/token``, ``fraction``, or empty for a coefficient."""
    split: str = "val"
    """``val`` or ``train``."""

    @property
    def key(self) -> str:
        """Metric key in metrics.jsonl and summary.json."""
        return f"{self.split}/{self.name}"

    @property
    def is_loss(self) -> bool:
        """True for the validation loss."""
        return self.name == "loss"

    @property
    def sign(self) -> int:
        """−1 where lower is better, else 1: sign × value is higher for better runs."""
        return 1 if self.better == "higher" else -1

    @property
    def superlative(self) -> str:
        """``highest`` or ``lowest``, whichever is best."""
        return "highest" if self.better == "higher" else "lowest"

    @property
    def worse(self) -> str:
        """``lower`` or ``higher``, whichever is worse."""
        return "lower" if self.better == "higher" else "higher"

    @property
    def ahead(self) -> str:
        """``above`` or ``below``: where the better of two values is."""
        return "above" if self.better == "higher" else "below"

    @property
    def behind(self) -> str:
        """The opposite of `ahead`."""
        return "below" if self.better == "higher" else "above"

    @property
    def shown_name(self) -> str:
        """Name in words: ``exact match``."""
        return self.name.replace("_", " ")

    @property
    def title(self) -> str:
        """Split and name: ``validation loss``, ``validation exact match``."""
        return f"{'validation' if self.split == 'val' else 'training'} {self.shown_name}"

    @property
    def shown_unit(self) -> str:
        """Unit of `scale`d values."""
        return "%" if self.unit == FRACTION else self.unit

    @property
    def scale(self) -> float:
        """Factor from stored to shown values: fractions are shown in percent."""
        return 100.0 if self.unit == FRACTION else 1.0

    def number(self, value: float) -> str:
        """Format a value without its unit."""
        if self.unit == FRACTION:
            return f"{100 * value:.2f}" if value == value else formatting.MISSING
        return formatting.loss(value)

    def text(self, value: float) -> str:
        """Format a value with its unit: ``3.4012 nats/token``, ``80.14 %``."""
        return f"{self.number(value)} {self.shown_unit}".strip()

    def short(self, value: float) -> str:
        """Format a value, with % if it is a fraction, for a sentence that names the unit of the others elsewhere."""
        return self.text(value) if self.unit == FRACTION else self.number(value)

    def gap(self, value: float, digits: int = 3) -> str:
        """Format a difference without its unit."""
        return formatting.significant(self.scale * value, digits)

    @property
    def gap_unit(self) -> str:
        """Unit of a difference: fractions differ by points, of which 100 are the whole."""
        return "points" if self.unit == FRACTION else self.unit

    def gap_text(self, value: float, digits: int = 3) -> str:
        """Format a difference with its unit: ``0.030 nats/token``, ``2.4 points``."""
        unit = "point" if self.gap_unit == "points" and round(self.scale * value, 6) == 1 else self.gap_unit
        return f"{self.gap(value, digits)} {unit}".strip()


LOSS = Measure("loss", "lower", "nats/token")


_LOSS_UNITS = {"class": "nats/example", "number": "squared error", "text": "nats/token"}


def loss_beside(measure: Measure) -> Measure:
    """Return the validation loss of the runs that are compared by ``measure``, in its unit."""
    known = METRICS.get(measure.name)
    return LOSS if known is None else Measure("loss", "lower", _LOSS_UNITS[known.kind])


def measure_of(config: Mapping[str, Any], summary: Mapping[str, Any]) -> Measure:
    """Return what a run is compared by: the first of its summary's metrics, else its task's, else the loss.

    Args:
        config: resolved configuration; may be empty.
        summary: contents of summary.json; may be empty.
    """
    recorded = summary.get("metrics")
    if isinstance(recorded, dict):
        for name, facts in recorded.items():
            if isinstance(facts, dict) and facts.get("better") in ("higher", "lower"):
                return Measure(str(name), facts["better"], str(facts.get("unit") or ""))
    task = config.get("task")
    known = METRICS.get(str(task.get("metric"))) if isinstance(task, dict) else None
    return LOSS if known is None else Measure(known.name, known.better, known.unit)


def final_value(measure: Measure, summary: Mapping[str, Any]) -> float:
    """Return a measure as summary.json records it; NaN if it is absent or null."""
    if measure.is_loss:
        return number(summary.get(measure.key))
    metrics = summary.get("metrics")
    facts = metrics.get(measure.name) if isinstance(metrics, dict) else None
    return number(facts.get("value")) if isinstance(facts, dict) else math.nan
