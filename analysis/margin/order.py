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

    Shares are of the starts from which the two differ by over 1 %; "equal to 1 %" is the share of the others.

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
    row: dict[str, Any] = {"gap at equal loss": label, "of the starts": words, "starts": len(known)}
    row |= _counted(f"share at ln L = {level:g}", "equal to 1 %", known)
    constants = [(a.predicted, b.predicted) for a, b in pairs]
    predicted = [(a, b) for a, b in constants if a is not None and b is not None]
    row["starts with constants"] = len(predicted)
    return row | _counted("share by the constants", "constants equal to 1 %", predicted)


def _counted(key: str, ties: str, values: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    """Return the share of pairs whose first is smaller, with interval, of those that differ; and the share of ties."""
    apart = [(a, b) for a, b in values if not math.isclose(a, b, rel_tol=EQUAL, abs_tol=1e-12)]
    tied = 1.0 - len(apart) / len(values) if values else None
    if not apart:
        return {key: None, f"{key} low": None, f"{key} high": None, ties: tied}
    return {**_interval(key, sum(a < b for a, b in apart), len(apart)), ties: tied}


def _interval(key: str, count: int, of: int) -> dict[str, float]:
    value, low, high = share(count, of)
    return {key: value, f"{key} low": low, f"{key} high": high}


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return in words whether the order depends on the start.

    It does if a pair of optimizers has both orders; otherwise the one order of the first pair is named. Pairs that are
    equal from most starts are passed over.
    """
    shares = [next(key for key in row if key.startswith("share at")) for row in rows]
    differing = [
        (row, key) for row, key in zip(rows, shares) if row["equal to 1 %"] < 0.5 and row[key] is not None
    ]
    if not differing:
        return ""
    row, key = next(((r, k) for r, k in differing if 0.0 < r[k] < 1.0), differing[0])
    untied = round(row["starts"] * (1.0 - row["equal to 1 %"]))
    label, words = row["gap at equal loss"], row["of the starts"]
    interval = f"[{row[f'{key} low']:.0%}, {row[f'{key} high']:.0%}]"
    if 0.0 < row[key] < 1.0:
        return (
            f" At equal loss the order depends on the start: {label} from {row[key]:.0%} {interval} of the {untied} "
            f"starts {words} where the two differ by over 1 %."
        )
    label = label if row[key] == 1.0 else " less than ".join(reversed(label.split(" less than ")))
    return (
        f" At equal loss these starts give one order: {label} from all {untied} starts {words} where the two "
        "differ by over 1 %; another law of starts may give the other."
    )
