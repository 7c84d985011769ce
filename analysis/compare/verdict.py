"""What a set of runs shows, in one sentence that claims no more than the tests do.

A winner is named only if every run of every arm finished with the same budget, at least two seeds are common
to each pair, its loss is below that of every other arm at a family-wise error of 5 % (Holm), and below the
unigram entropy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from analysis import formatting
from analysis.compare import statistics
from analysis.compare.comparison import ComparisonSet, unequal_budgets


@dataclass(frozen=True)
class Verdict:
    """What a set shows.

    ``kind`` is ``winner``, ``partial`` (lowest, but not told apart from every arm), ``no_difference``,
    ``withheld`` (the runs don't allow a verdict), ``one_seed``, ``one_arm`` or ``nothing``.
    """

    kind: str
    headline: str
    detail: str
    """The figures behind the headline; may be empty."""
    scope: str
    """Size and budget that the verdict holds for."""
    winner: str | None = None
    common_seeds: int = 0
    """Fewest common seeds of any pair of arms."""
    seeds_needed: int | None = None
    """Seeds at which 0.01 nats would be shown between two arms; None if unknown or beyond 10,000."""
    obstacles: list[str] = field(default_factory=list)
    """Why no winner could be named whatever the losses are."""

    ranks: bool = False
    """Whether the means may be put in an order: several seeds, equal budgets, and something learned."""

    @property
    def sentence(self) -> str:
        """Headline and detail."""
        return f"{self.headline} {self.detail}".strip()


def judge(chosen: ComparisonSet) -> Verdict:
    """The verdict of one set."""
    scope = f"Holds for {chosen.title}, at the learning rates in the table."
    ranked = chosen.ranked()
    if not ranked:
        return Verdict("nothing", "No run finished: there is nothing to compare.", "", scope)
    if len(chosen.arms) == 1:
        return _one_arm(chosen, scope)
    common = int(chosen.tests.n.min())
    if max(arm.final.n for arm in chosen.arms) < 2:
        detail = (
            "Two runs that differ in their seed alone end apart too, and one seed can't tell by how much; "
            "seeds=3 or more would."
        )
        headline = "One seed per optimizer: nothing is ranked."
        return Verdict("one_seed", headline, detail, scope, common_seeds=common)
    needed = seeds_needed(chosen)
    missing, unequal = _missing(chosen), _unequal(chosen)
    leading, detail = _leader(chosen, needed)
    if missing or unequal:
        obstacles = [*missing, *unequal]
        headline = f"No winner is named: {formatting.listing(obstacles)}."
        if leading.startswith(("No ", "Only ")):
            leading = leading[0].lower() + leading[1:]
        said = "" if unequal else f"Among the runs that finished: {leading} {detail}".strip()
        return Verdict("withheld", headline, said, scope, None, common, needed, obstacles, not unequal)
    best = int(statistics.winners(chosen.tests, len(chosen.arms)))
    if best >= 0:
        return Verdict("winner", leading, detail, scope, chosen.arms[best].label, common, needed, ranks=True)
    kind = "partial" if _beaten(chosen, ranked[0]) else "no_difference"
    return Verdict(kind, leading, detail, scope, None, common, needed, ranks=True)


def seeds_needed(chosen: ComparisonSet) -> int | None:
    """Seeds that would show 0.01 nats between two arms at 80 % power, at the level of Holm's first step.

    The standard deviation is that of the paired differences, pooled over the pairs of arms.
    """
    sds = chosen.tests.sd[np.isfinite(chosen.tests.sd)]
    if not len(sds):
        return None
    pooled = math.sqrt(float(np.mean(sds**2)))
    return statistics.seeds_needed(pooled, alpha=statistics.ALPHA / len(chosen.tests.pairs))


def _missing(chosen: ComparisonSet) -> list[str]:
    """What keeps a winner from being named though the means may be looked at."""
    runs = [run for arm in chosen.arms for run in arm.runs]
    unfinished = sum(not run.finished for run in runs)
    found = [f"{unfinished} of {formatting.plural(len(runs), 'run')} did not finish"] if unfinished else []
    if int(chosen.tests.n.min()) < 2:
        found.append("two arms have fewer than two seeds in common")
    return found


def _unequal(chosen: ComparisonSet) -> list[str]:
    """What makes the order of the means say nothing."""
    found = unequal_budgets(chosen)
    best = chosen.arms[chosen.ranked()[0]]
    if best.final.mean >= chosen.entropy:
        found.append(
            f"no loss is below the unigram entropy of the corpus ({formatting.loss(chosen.entropy)} nats/token)"
        )
    return found


def _beaten(chosen: ComparisonSet, best: int) -> list[int]:
    """Arms that end higher than ``best`` by the Holm-adjusted test."""
    found = []
    for other in range(len(chosen.arms)):
        if other != best:
            index = chosen.pair(best, other)
            lower = chosen.tests.mean[index] * (1 if best < other else -1) < 0
            if lower and np.nan_to_num(chosen.tests.p_holm[index], nan=1.0) < statistics.ALPHA:
                found.append(other)
    return found


def _gap(chosen: ComparisonSet, best: int, other: int) -> float:
    """Mean over common seeds of loss(other) − loss(best); NaN without a common seed."""
    return float(chosen.tests.mean[chosen.pair(best, other)]) * (-1 if best < other else 1)


def _size(chosen: ComparisonSet, best: int, other: int) -> str:
    """``0.030 nats/token below muon``."""
    gap, label = _gap(chosen, best, other), chosen.arms[other].label
    if math.isnan(gap):
        return f"on other seeds than {label}"
    return f"{formatting.significant(abs(gap))} nats/token {'below' if gap >= 0 else 'above'} {label}"


def _evidence(chosen: ComparisonSet, best: int, other: int) -> str:
    """``95 % interval of the difference 0.027 to 0.032, 3 common seeds, Holm-adjusted p = 0.0014``."""
    index, tests = chosen.pair(best, other), chosen.tests
    gap, half, n = _gap(chosen, best, other), float(tests.half_width[index]), int(tests.n[index])
    if not math.isfinite(half):
        return f"{formatting.plural(n, 'common seed')}: no test"
    low, high = (
        formatting.significant(bound).replace("-", "−") for bound in (abs(gap) - half, abs(gap) + half)
    )
    p = formatting.p_value(float(tests.p_holm[index]))
    return f"95 % interval of the difference {low} to {high}, {n} common seeds, Holm-adjusted {p}"


def _leader(chosen: ComparisonSet, needed: int | None) -> tuple[str, str]:
    """The arm with the lowest mean, what it is told apart from and what not, and the seeds that would do."""
    ranked = chosen.ranked()
    best, others = ranked[0], ranked[1:]
    label, mean = chosen.arms[best].label, formatting.loss(chosen.arms[best].final.mean)
    if not others:
        return f"Only {label} has runs that finished.", ""
    beaten = _beaten(chosen, best)
    open_ = [i for i in others if i not in beaten]
    if not open_:
        closest = min(others, key=lambda i: _gap(chosen, best, i))
        rest = ", the closest of the others" if len(others) > 1 else ""
        headline = f"{label} ends lowest, {_size(chosen, best, closest)}{rest}."
        return headline, f"Final loss {mean} nats/token; {_evidence(chosen, best, closest)}."
    near = open_[0]
    names = formatting.listing([chosen.arms[i].label for i in open_[:3]], "or")
    if len(open_) > 3:
        names = f"{len(open_)} of the {len(others)} others"
    detail = (
        f"The mean of {label}, {mean}, lies {_size(chosen, best, near)}: {_evidence(chosen, best, near)}."
    )
    if beaten:
        below = [chosen.arms[i].label for i in beaten[:3]]
        if len(beaten) > 3:
            below.append(formatting.plural(len(beaten) - 3, "other"))
        detail += f" {label} does end below {formatting.listing(below)}."
    if needed:
        detail += f" n = {formatting.grouped(needed)} seeds would show {statistics.RESOLUTION:g} nats/token."
    return f"No difference shown between {label} and {names}.", detail


def _one_arm(chosen: ComparisonSet, scope: str) -> Verdict:
    arm = chosen.arms[0]
    spread = ""
    if arm.final.n > 1:
        spread = (
            f" ± {formatting.significant(arm.final.half_width, 2)} (95 % interval over {arm.final.n} seeds)"
        )
    headline = f"One arm: {arm.label} ends at {formatting.loss(arm.final.mean)} nats/token{spread}."
    return Verdict("one_arm", headline, "There is nothing to compare it with.", scope)
