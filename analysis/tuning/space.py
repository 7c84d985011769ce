"""Search spaces: which values of which options are tried, and in which order. Nothing here draws without a seed.

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
"""From one learning rate of the default ladder to the next."""
OUTER = 0.1
"""A sample in the outer tenth of a range counts as one on its edge."""
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
        """The value at a share in [0, 1) of the axis; of a range 1 is allowed, too."""
        if self.values:
            return self.values[int(share * len(self.values))]
        return spelled(self.low * (self.high / self.low) ** share)


def spelled(value: float) -> str:
    """A number with six digits, as it is typed on the command line."""
    return f"{value:.6g}"


def number(value: str) -> float:
    """The number that a value is; NaN for any other word."""
    try:
        return float(value)
    except ValueError:
        return math.nan


def parse(key: str, option: str, text: str) -> Axis | None:
    """The axis that a word describes; None if it is a single value.

    Args:
        key: as typed, for errors.
        option: without `optimizer.`.
        text: ``1e-4,3e-4`` or ``1e-4..1e-2``.

    Raises:
        InputError: an empty or repeated value, or a range that is none.
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
        raise InputError(key, text, "is no range", allowed=allowed, fix=f"{key}=1e-4..1e-2")
    return Axis(option, low=low, high=high)


def listed(text: str) -> list[str]:
    """The values of a word: its parts between commas outside of brackets and quotes."""
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
    """How many points a space of listed values has; None if a range is among them."""
    return math.prod(len(axis.values) for axis in axes) if all(axis.values for axis in axes) else None


def points(label: str, axes: Sequence[Axis], trials: int, seed: int) -> list[Values]:
    """The trials of one optimizer in order.

    One axis: its values, or the range cut evenly, from the middle outwards. Several: all combinations of listed
    values if they are as many as the trials, else quasi-random points without repetition.

    Raises:
        InputError: the space has fewer points than trials, or one axis more: budgets would not be equal.
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
    # scipy takes a second to import, and words are checked before it is needed.
    from scipy.stats import qmc

    # "seed" is understood by every scipy that we allow, its new name "rng" only from 1.15 on.
    sequence = qmc.Halton(len(axes), scramble=True, seed=seed)  # pyright: ignore[reportCallIssue]
    found: dict[tuple[str, ...], None] = {}
    while len(found) < trials:
        (share,) = sequence.random(1)
        found.setdefault(tuple(axis.at(float(s)) for axis, s in zip(axes, share, strict=True)))
    return [{axis.key: value for axis, value in zip(axes, point, strict=True)} for point in found]


def from_centre(values: Sequence[str]) -> list[str]:
    """The middle first, then its neighbours, and the ends last."""
    middle = (len(values) - 1) / 2
    order = sorted(range(len(values)), key=lambda i: (abs(i - middle), i))
    return [values[i] for i in order]


def ladder(centre: Mapping[str, float], trials: int) -> list[Values]:
    """Learning rates a factor of `FACTOR` apart around the default, from the centre out: 1, 1/2, 2, 1/4, 4, …

    Args:
        centre: ``lr``, and the rates that go with it (``aux_lr``), which keep their ratio to it.
        trials: how many.
    """
    powers = [(i + 1) // 2 * (-1 if i % 2 else 1) for i in range(trials)]
    return [{key: spelled(rate * FACTOR**power) for key, rate in centre.items()} for power in powers]


def beyond(best: Values, tried: Sequence[float], losses: Sequence[float]) -> Values:
    """One more point of a ladder: past the edge if the best lies there, else halfway (in logarithm) to its better
    neighbour.

    Args:
        best: the best setting so far.
        tried: its learning rates so far, in any order.
        losses: of them; infinite where a trial diverged.
    """
    rate = number(best["lr"])
    order = sorted(zip(tried, losses, strict=True))
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
    """Options whose best value lies on an edge of what was tried → "lowest" or "highest".

    A value of 0 is no edge: there is nothing below it. Words have no order and no edge.

    Args:
        best: the best setting.
        tried: all settings whose outcome is known, diverged ones too.
        axes: the space, empty for the default ladder; of several axes a range is judged by its own ends, where a few
            samples never lie.
    """
    tuned = [axis.key for axis in axes] or ["lr"]
    ranges = {axis.key: axis for axis in axes if not axis.values and len(axes) > 1}
    found = {}
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
            found[key] = side
    return found
