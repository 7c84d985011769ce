"""Judge a set of runs: one sentence that claims no more than the tests do.

A winner is named only if every run of every arm finished with the same budget, each pair has at least two common
seeds, and its loss is below the unigram entropy and below that of every other arm at a family-wise error of 5 %
(Holm).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from analysis import formatting
from analysis.comparison import statistics
from analysis.comparison.sets import ComparisonSet, unequal_budgets


@dataclass(frozen=True)
class Verdict:
    """The verdict of one set.

    ``kind`` is ``winner``, ``partial`` (the lowest arm is not distinguished from every other one),
    ``no_difference``, ``withheld`` (the runs do not allow a verdict), ``one_seed``, ``one_arm`` or ``nothing``.
    """

    kind: str
    headline: str
    detail: str
    """The numbers behind the headline; may be empty."""
    scope: str
    """Model size and budget for which the verdict holds."""
    winner: str | None = None
    common_seeds: int = 0
    """Smallest number of common seeds of any pair of arms."""
    seeds_needed: int | None = None
    """Seeds needed to detect 0.01 nats between two arms; None if unknown or more than 10,000."""
    obstacles: list[str] = field(default_factory=list)
    """Reasons why no winner can be named, whatever the losses are."""

    ranks: bool = False
    """True if the means may be ordered: several seeds, equal budgets, and a loss below the unigram entropy."""

    @property
    def sentence(self) -> str:
        """Headline and detail as one text."""
        return f"{self.headline} {self.detail}".strip()


def judge(comparison: ComparisonSet) -> Verdict:
    """Return the verdict of one set."""
    scope = f"Holds for {comparison.title}, at the learning rates in the table."
    ranked = comparison.ranked()
    if not ranked:
        return Verdict("nothing", "No run finished: there is nothing to compare.", "", scope)
    if len(comparison.arms) == 1:
        return _one_arm(comparison, scope)
    common = int(comparison.tests.n.min())
    if max(arm.final.n for arm in comparison.arms) < 2:
        detail = (
            "Runs that differ only in their seed also end at different losses, and one seed does not show by how "
            "much; use seeds=3 or more."
        )
        headline = "One seed per optimizer: nothing is ranked."
        return Verdict("one_seed", headline, detail, scope, common_seeds=common)
    needed = seeds_needed(comparison)
    missing, unequal = _missing(comparison), _unequal(comparison)
    leading, detail = _leader(comparison, needed)
    if missing or unequal:
        obstacles = [*missing, *unequal]
        headline = f"No winner is named: {formatting.listing(obstacles)}."
        if leading.startswith(("No ", "Only ")):
            leading = leading[0].lower() + leading[1:]
        detail = "" if unequal else f"Among the runs that finished: {leading} {detail}".strip()
        return Verdict("withheld", headline, detail, scope, None, common, needed, obstacles, not unequal)
    best = int(statistics.winners(comparison.tests, len(comparison.arms)))
    if best >= 0:
        return Verdict(
            "winner", leading, detail, scope, comparison.arms[best].label, common, needed, ranks=True
        )
    kind = "partial" if _beaten(comparison, ranked[0]) else "no_difference"
    return Verdict(kind, leading, detail, scope, None, common, needed, ranks=True)


def seeds_needed(comparison: ComparisonSet) -> int | None:
    """Return the seeds needed to detect 0.01 nats between two arms with 80 % power at Holm's first level.

    The standard deviation is that of the paired differences, pooled over the pairs of arms.
    """
    sds = comparison.tests.sd[np.isfinite(comparison.tests.sd)]
    if not len(sds):
        return None
    pooled = math.sqrt(float(np.mean(sds**2)))
    return statistics.seeds_needed(pooled, alpha=statistics.ALPHA / len(comparison.tests.pairs))


def _missing(comparison: ComparisonSet) -> list[str]:
    """Return the reasons that prevent a winner but leave the means comparable."""
    runs = [run for arm in comparison.arms for run in arm.runs]
    unfinished = sum(not run.finished for run in runs)
    reasons = [f"{unfinished} of {formatting.plural(len(runs), 'run')} did not finish"] if unfinished else []
    if int(comparison.tests.n.min()) < 2:
        reasons.append("two arms have fewer than two seeds in common")
    return reasons


def _unequal(comparison: ComparisonSet) -> list[str]:
    """Return the reasons that make the means incomparable."""
    reasons = unequal_budgets(comparison)
    best = comparison.arms[comparison.ranked()[0]]
    if best.final.mean >= comparison.entropy:
        reasons.append(
            f"no loss is below the unigram entropy of the corpus ({formatting.loss(comparison.entropy)} nats/token)"
        )
    return reasons


def _beaten(comparison: ComparisonSet, best: int) -> list[int]:
    """Return the arms that end higher than ``best`` by the Holm-adjusted test."""
    beaten = []
    for other in range(len(comparison.arms)):
        if other != best:
            index = comparison.pair(best, other)
            lower = comparison.tests.mean[index] * (1 if best < other else -1) < 0
            if lower and np.nan_to_num(comparison.tests.p_holm[index], nan=1.0) < statistics.ALPHA:
                beaten.append(other)
    return beaten


def _gap(comparison: ComparisonSet, best: int, other: int) -> float:
    """Return the mean over common seeds of loss(other) − loss(best); NaN without a common seed."""
    return float(comparison.tests.mean[comparison.pair(best, other)]) * (-1 if best < other else 1)


def _size(comparison: ComparisonSet, best: int, other: int) -> str:
    """Return the gap as text, e.g. ``0.030 nats/token below muon``."""
    gap, label = _gap(comparison, best, other), comparison.arms[other].label
    if math.isnan(gap):
        return f"from other seeds than {label}"
    return f"{formatting.significant(abs(gap))} nats/token {'below' if gap >= 0 else 'above'} {label}"


def _evidence(comparison: ComparisonSet, best: int, other: int) -> str:
    """Return e.g. ``95 % interval of the difference 0.027 to 0.032, 3 common seeds, Holm-adjusted p = 0.0014``."""
    index, tests = comparison.pair(best, other), comparison.tests
    gap, half, n = _gap(comparison, best, other), float(tests.half_width[index]), int(tests.n[index])
    if not math.isfinite(half):
        return f"{formatting.plural(n, 'common seed')}: no test"
    low, high = (
        formatting.significant(bound).replace("-", "−") for bound in (abs(gap) - half, abs(gap) + half)
    )
    p = formatting.p_value(float(tests.p_holm[index]))
    return f"95 % interval of the difference {low} to {high}, {n} common seeds, Holm-adjusted {p}"


def _leader(comparison: ComparisonSet, needed: int | None) -> tuple[str, str]:
    """Return headline and detail about the arm with the lowest mean and the arms that it is distinguished from."""
    ranked = comparison.ranked()
    best, others = ranked[0], ranked[1:]
    label, mean = comparison.arms[best].label, formatting.loss(comparison.arms[best].final.mean)
    if not others:
        return f"Only {label} has runs that finished.", ""
    beaten = _beaten(comparison, best)
    undecided = [i for i in others if i not in beaten]
    if not undecided:
        closest = min(others, key=lambda i: _gap(comparison, best, i))
        rest = ", the closest of the others" if len(others) > 1 else ""
        headline = f"{label} ends lowest, {_size(comparison, best, closest)}{rest}."
        return headline, f"Final loss {mean} nats/token; {_evidence(comparison, best, closest)}."
    near = undecided[0]
    names = formatting.listing([comparison.arms[i].label for i in undecided[:3]], "or")
    if len(undecided) > 3:
        names = f"{len(undecided)} of the {len(others)} others"
    detail = f"The mean of {label}, {mean}, is {_size(comparison, best, near)}: {_evidence(comparison, best, near)}."
    if beaten:
        below = [comparison.arms[i].label for i in beaten[:3]]
        if len(beaten) > 3:
            below.append(formatting.plural(len(beaten) - 3, "other"))
        detail += f" {label} ends below {formatting.listing(below)}."
    if needed:
        seeds = formatting.grouped(needed)
        detail += f" n = {seeds} seeds would show a difference of {statistics.RESOLUTION:g} nats/token."
    return f"No difference shown between {label} and {names}.", detail


def _one_arm(comparison: ComparisonSet, scope: str) -> Verdict:
    arm = comparison.arms[0]
    spread = ""
    if arm.final.n > 1:
        spread = (
            f" ± {formatting.significant(arm.final.half_width, 2)} (95 % interval over {arm.final.n} seeds)"
        )
    headline = f"One arm: {arm.label} ends at {formatting.loss(arm.final.mean)} nats/token{spread}."
    return Verdict("one_arm", headline, "There is no other arm to compare with.", scope)
