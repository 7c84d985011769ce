"""Search spaces of a tuning study: values of each option, and the order of the trials. All sampling is seeded.

Several options at once are sampled by a scrambled Halton sequence (Halton, Numer. Math. 2 (1960) 84-90), as
tuning rules for training benchmarks do: the first n points do not depend on how many are drawn.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.errors import InputError

FACTOR = 2.0
"""Ratio of neighbouring learning rates in the default ladder."""
OUTER = 0.1
"""Share of a range, in logarithm, that counts as its edge."""
_RANGE = re.compile(r"([^.]+(?:\.[^.]+)?)\.\.([^.]+(?:\.[^.]+)?)")
_OPEN, _CLOSE = "[{(", "]})"

Values = dict[str, str]
"""Option → value as typed, without `optimizer.`."""


@dataclass(frozen=True)
class Axis:
    """One tuned option: listed values, or a range on a logarithmic scale.

    Attributes:
        key: option, without `optimizer.`.
        values: as typed; empty: a range.
        low, high: ends of the range; NaN where values are listed.
    """

    key: str
    values: tuple[str, ...] = ()
    low: float = math.nan
    high: float = math.nan

    def at(self, share: float) -> str:
        """Return the value at a share in [0, 1) of the axis; for a range also at 1."""
        if self.values:
            return self.values[int(share * len(self.values))]
        return spelled(self.low * (self.high / self.low) ** share)


def spelled(value: float) -> str:
    """Format a number with six digits, as on the command line."""
    return f"{value:.6g}"


def number(value: str) -> float:
    """Return the number that a text states; NaN for any other text."""
    try:
        return float(value)
    except ValueError:
        return math.nan


def parse(key: str, option: str, text: str) -> Axis | None:
    """Parse the values of an option; return None for a single value.

    Args:
        key: as typed, for errors.
        option: without `optimizer.`.
        text: ``1e-4,3e-4`` or ``1e-4..1e-2``.

    Raises:
        InputError: an empty or repeated value, or an invalid range.
    """
    values = listed(text)
    if len(values) > 1:
        seen = [number(value) if math.isfinite(number(value)) else value for value in values]
        if "" in values or len(set(seen)) < len(seen):
            what = "has an empty value" if "" in values else "names a value twice"
            raise InputError(key, text, what, allowed="different values, as in 1e-4,3e-4,1e-3")
        return Axis(option, tuple(values))
    if ".." not in text or text[:1] in "'\"":
        return None
    match = _RANGE.fullmatch(text)
    low, high = (number(match[1]), number(match[2])) if match else (math.nan, math.nan)
    if not 0 < low < high < math.inf:
        allowed = "LOW..HIGH with 0 < LOW < HIGH (a logarithmic scale)"
        raise InputError(key, text, "is not a range", allowed=allowed, fix=f"{key}=1e-4..1e-2")
    return Axis(option, low=low, high=high)


def listed(text: str) -> list[str]:
    """Split a text at the commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if letter in "'\"":
            quote = "" if letter == quote else quote or letter
        elif not quote:
            depth += (letter in _OPEN) - (letter in _CLOSE)
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def size(axes: Sequence[Axis]) -> int | None:
    """Return the number of points of a space of listed values; None if it has a range."""
    return math.prod(len(axis.values) for axis in axes) if all(axis.values for axis in axes) else None


def points(label: str, axes: Sequence[Axis], trials: int, seed: int) -> list[Values]:
    """Return the trials of one optimizer in order.

    One axis: its values, or evenly spaced points of its range, from the middle outwards. Several axes: all
    combinations of listed values if their number is that of the trials, else quasi-random points without repetition.

    Raises:
        InputError: the number of points does not match the trials, so that budgets would not be equal.
    """
    known = size(axes)
    if known is not None and (known < trials or (len(axes) == 1 and known != trials)):
        text = " ".join(f"{label}.{axis.key}={','.join(axis.values)}" for axis in axes)
        have = f"{known} setting{'s' if known != 1 else ''}"
        reason = f"has {have}, and every optimizer gets trials={trials}: tuning budgets must be equal"
        raise InputError(f"{label} space", text, reason, fix=f"trials={known}, or {trials} settings here")
    if len(axes) == 1:
        (axis,) = axes
        values = axis.values or [axis.at(i / (trials - 1)) for i in range(trials)]
        return [{axis.key: value} for value in from_centre(values)]
    if known == trials:
        grid = itertools.product(*(axis.values for axis in axes))
        return [{axis.key: value for axis, value in zip(axes, point, strict=True)} for point in grid]
    return _sampled(axes, trials, seed)


def _sampled(axes: Sequence[Axis], trials: int, seed: int) -> list[Values]:
    # scipy takes a second to import, which an invalid argument does not need.
    from scipy.stats import qmc

    # Every supported scipy accepts "seed"; its new name "rng" exists only from 1.15 on.
    sequence = qmc.Halton(len(axes), scramble=True, seed=seed)  # pyright: ignore[reportCallIssue]
    points: dict[tuple[str, ...], None] = {}
    while len(points) < trials:
        (share,) = sequence.random(1)
        points.setdefault(tuple(axis.at(float(s)) for axis, s in zip(axes, share, strict=True)))
    return [{axis.key: value for axis, value in zip(axes, point, strict=True)} for point in points]


def from_centre(values: Sequence[str]) -> list[str]:
    """Sort values from the middle outwards."""
    middle = (len(values) - 1) / 2
    order = sorted(range(len(values)), key=lambda i: (abs(i - middle), i))
    return [values[i] for i in order]


def ladder(centre: Mapping[str, float], trials: int) -> list[Values]:
    """Return learning rates around the default from the centre outwards: 1, 1/2, 2, 1/4, 4, … times the default.

    Args:
        centre: ``lr``, and rates that keep their ratio to it (``aux_lr``).
        trials: number of settings.
    """
    powers = [(i + 1) // 2 * (-1 if i % 2 else 1) for i in range(trials)]
    return [{key: spelled(rate * FACTOR**power) for key, rate in centre.items()} for power in powers]


def beyond(best: Values, tried: Sequence[float], costs: Sequence[float]) -> Values:
    """Return one more point of a ladder: beyond the edge, or between the best and its better neighbour.

    Args:
        best: the best setting so far.
        tried: its learning rates so far, in any order.
        costs: of these rates, lower is better; infinite for a diverged trial.
    """
    rate = number(best["lr"])
    order = sorted(zip(tried, costs, strict=True))
    place = [value for value, _ in order].index(rate)
    if place == 0:
        factor = 1 / FACTOR
    elif place == len(order) - 1:
        factor = FACTOR
    else:
        neighbour = min(order[place - 1], order[place + 1], key=lambda entry: entry[1])[0]
        factor = math.sqrt(neighbour / rate)
    return {key: spelled(number(value) * factor) for key, value in best.items()}


def edges(best: Values, tried: Sequence[Values], axes: Sequence[Axis]) -> dict[str, str]:
    """Return the options whose best value is on an edge of the tried ones → "lowest" or "highest".

    A value of 0 is not an edge, because nothing is below it. Texts have no order and no edge.

    Args:
        best: the best setting.
        tried: all settings with a known outcome, including diverged ones.
        axes: the space; empty for the default ladder. With several axes, a range is judged by its own ends, which few
            samples reach.
    """
    tuned = [axis.key for axis in axes] or ["lr"]
    ranges = {axis.key: axis for axis in axes if not axis.values and len(axes) > 1}
    on_edge = {}
    for key in tuned:
        value, others = number(best[key]), sorted({number(point[key]) for point in tried})
        if not value or any(math.isnan(other) for other in others) or len(others) < 2:
            continue
        if axis := ranges.get(key):
            share = math.log(value / axis.low) / math.log(axis.high / axis.low)
            side = "lowest" if share < OUTER else "highest" if share > 1 - OUTER else ""
        else:
            side = {others[0]: "lowest", others[-1]: "highest"}.get(value, "")
        if side:
            on_edge[key] = side
    return on_edge
