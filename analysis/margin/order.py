"""Over random starts: which of two optimizers has the smaller gap at equal loss, measured and by the closed forms.

At equal outputs u the gap is |b₂ - b₁|/(w₁ - w₂) with the same w₁ - w₂ to leading order, so that constants alone
decide: |w₁ + w₂ + b₂ - b₁|/2 for gradient descent, |b₂ - b₁| for sign and spectral descent. Both depend on the start.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from analysis.margin.trajectory import MarginRun, value_at_loss

EQUAL = 0.01
"""Relative difference up to which two gaps count as equal: gradient descent and its normalized form differ by less."""
FEWEST = 10
"""Starts below which no share is reported."""
SUBSETS = {"separated at step 0": True, "that separate": False}


def share(count: int, of: int) -> tuple[float, float, float]:
    """Return a share and its exact 95 % interval (Clopper and Pearson 1934)."""
    interval = stats.binomtest(count, of).proportion_ci(0.95, method="exact")
    return count / of, float(interval.low), float(interval.high)


def order_over_starts(runs: Sequence[MarginRun], level: float) -> list[dict[str, Any]]:
    """Return a row per pair of optimizers and subset of the starts that both separate.

    Args:
        runs: of all optimizers from the same random starts.
        level: ln of the loss at which gaps are compared.
    """
    by_name: dict[str, dict[int, MarginRun]] = {}
    for run in runs:
        if run.status in ("ok", "flat"):
            by_name.setdefault(run.optimizer, {})[run.run] = run
    rows = []
    for (first, ours), (second, theirs) in itertools.combinations(by_name.items(), 2):
        for words, at_once in SUBSETS.items():
            both = [
                (ours[n], theirs[n])
                for n in ours.keys() & theirs.keys()
                if not at_once or ours[n].facts.get("separated_at") == 0.0
            ]
            row = _row(f"{first} less than {second}", words, both, level)
            if row is not None:
                rows.append(row)
    return sorted(rows, key=lambda row: list(SUBSETS).index(row["of the starts"]))


def _row(
    label: str, words: str, pairs: Sequence[tuple[MarginRun, MarginRun]], level: float
) -> dict[str, Any] | None:
    gaps = [tuple(value_at_loss(run.rows, level, "gap") for run in pair) for pair in pairs]
    known = [(a, b) for a, b in gaps if a is not None and b is not None]
    if len(known) < FEWEST:
        return None
    equal = [math.isclose(a, b, rel_tol=EQUAL, abs_tol=1e-12) for a, b in known]
    smaller = sum(a < b for (a, b), same in zip(known, equal) if not same)
    row: dict[str, Any] = {"gap at equal loss": label, "of the starts": words, "starts": len(known)}
    row |= _interval(f"share at ln L = {level:g}", smaller, len(known))
    row["equal to 1 %"] = sum(equal) / len(known)
    constants = [(a.predicted, b.predicted) for a, b in pairs]
    predicted = [(a, b) for a, b in constants if a is not None and b is not None]
    by_constants = sum(a < b and not math.isclose(a, b, rel_tol=EQUAL) for a, b in predicted)
    key = "share by the constants"
    row["starts with constants"] = len(predicted)
    empty = {key: None, f"{key} low": None, f"{key} high": None}
    return row | (_interval(key, by_constants, len(predicted)) if predicted else empty)


def _interval(key: str, count: int, of: int) -> dict[str, float]:
    value, low, high = share(count, of)
    return {key: value, f"{key} low": low, f"{key} high": high}


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the order of the first pair that is not equal from most starts, in words."""
    row = next((row for row in rows if row["equal to 1 %"] < 0.5), None)
    if row is None:
        return ""
    key = next(key for key in row if key.startswith("share at"))
    return (
        f" At equal loss the order depends on the start: {row['gap at equal loss']} from {row[key]:.0%} "
        f"[{row[f'{key} low']:.0%}, {row[f'{key} high']:.0%}] of the {row['starts']} starts {row['of the starts']}."
    )
