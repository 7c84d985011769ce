"""Judge a set of runs: one sentence that claims no more than the tests do.

A winner is named only if every run of every arm finished with the same budget, each pair has at least two common
seeds, and its result is better than that of every other arm at a family-wise error of 5 % (Holm). A loss must also be
below the unigram entropy; the metric of a task must come with its per-example results, whose number bounds what it can
show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from analysis import formatting
from analysis.comparison import statistics
from analysis.comparison.sets import ComparisonSet, unequal_budgets, unstated_workload


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
    """Seeds needed to detect 0.01 nats (a point of a metric) between two arms; None if unknown or above 10,000."""
    obstacles: list[str] = field(default_factory=list)
    """Reasons why no winner can be named, whatever the losses are."""

    ranks: bool = False
    """True if the means may be ordered: several seeds, equal budgets, and no loss above the unigram entropy."""

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
    best = int(statistics.winners(comparison.tests, len(comparison.arms), sign=comparison.measure.sign))
    if best >= 0:
        return Verdict(
            "winner", leading, detail, scope, comparison.arms[best].label, common, needed, ranks=True
        )
    kind = "partial" if _beaten(comparison, ranked[0]) else "no_difference"
    return Verdict(kind, leading, detail, scope, None, common, needed, ranks=True)


def seeds_needed(comparison: ComparisonSet) -> int | None:
    """Return the seeds needed to detect 0.01 nats (a point) between two arms with 80 % power at Holm's first level.

    The standard deviation is that of the paired differences, pooled over the pairs of arms. More seeds do not make up
    for few examples: see `examples_needed`.
    """
    sds = comparison.tests.sd[np.isfinite(comparison.tests.sd)]
    if not len(sds):
        return None
    pooled = math.sqrt(float(np.mean(sds**2)))
    alpha = statistics.ALPHA / len(comparison.tests.pairs)
    if not comparison.tests.paired:
        # The deviation is that of the difference of two runs.
        return statistics.runs_needed(pooled / math.sqrt(2), statistics.RESOLUTION, alpha)
    return statistics.seeds_needed(pooled, alpha=alpha)


def examples_needed(comparison: ComparisonSet) -> int | None:
    """Return the examples needed to detect 0.01 nats (a point) with 80 % power, were the seeds many.

    None without per-example results, or where the arms answer every example alike.
    """
    if comparison.examples is None or not comparison.tests.pairs:
        return None
    return statistics.examples_needed(comparison.examples.variance_of_pairs(comparison.tests))


def _missing(comparison: ComparisonSet) -> list[str]:
    """Return the reasons that prevent a winner but leave the means comparable."""
    runs = [run for arm in comparison.arms for run in arm.runs]
    unfinished = sum(not run.finished for run in runs)
    reasons = [f"{unfinished} of {formatting.plural(len(runs), 'run')} did not finish"] if unfinished else []
    if int(comparison.tests.n.min()) < 2:
        paired = comparison.tests.paired
        reasons.append(
            "two arms have fewer than two seeds in common" if paired else "an arm has fewer than two runs"
        )
    if comparison.examples_problem:
        reasons.append(f"how far the validation examples carry is unknown ({comparison.examples_problem})")
    return reasons


def _unequal(comparison: ComparisonSet) -> list[str]:
    """Return the reasons that make the means incomparable."""
    reasons = unequal_budgets(comparison)
    if unstated := unstated_workload(comparison):
        reasons.append(unstated)
    best = comparison.arms[comparison.ranked()[0]]
    if best.final.mean >= comparison.entropy:
        reasons.append(
            f"no loss is below the unigram entropy of the corpus ({formatting.loss(comparison.entropy)} nats/token)"
        )
    return reasons


def _beaten(comparison: ComparisonSet, best: int) -> list[int]:
    """Return the arms that end worse than ``best`` by the Holm-adjusted test."""
    beaten = []
    for other in range(len(comparison.arms)):
        if other != best:
            index = comparison.pair(best, other)
            if (
                _gap(comparison, best, other) > 0
                and np.nan_to_num(comparison.tests.p_holm[index], nan=1.0) < statistics.ALPHA
            ):
                beaten.append(other)
    return beaten


def _gap(comparison: ComparisonSet, best: int, other: int) -> float:
    """Return by how much ``best`` is better, the mean over common seeds; NaN without a common seed."""
    direction = comparison.measure.sign * (1 if best < other else -1)
    return float(comparison.tests.mean[comparison.pair(best, other)]) * direction


def _size(comparison: ComparisonSet, best: int, other: int) -> str:
    """Return the gap as text, e.g. ``0.030 nats/token below muon``."""
    gap, label = _gap(comparison, best, other), comparison.arms[other].label
    if math.isnan(gap):
        return f"from other seeds than {label}"
    measure = comparison.measure
    return f"{measure.gap_text(abs(gap))} {measure.ahead if gap >= 0 else measure.behind} {label}"


def _evidence(comparison: ComparisonSet, best: int, other: int) -> str:
    """Return e.g. ``95 % interval of the difference 0.027 to 0.032, 3 common seeds, Holm-adjusted p = 0.0014``."""
    index, tests = comparison.pair(best, other), comparison.tests
    gap, half, n = _gap(comparison, best, other), float(tests.half_width[index]), int(tests.n[index])
    if not comparison.tests.paired:
        counts = [comparison.arms[arm].final.n for arm in (best, other)]
        basis = f"{counts[0]} and {counts[1]} runs without common seeds (Welch)"
    else:
        basis = formatting.plural(n, "common seed")
    if not math.isfinite(half):
        return f"{basis}: no test"
    low, high = (
        comparison.measure.gap(bound).replace("-", "−") for bound in (abs(gap) - half, abs(gap) + half)
    )
    if comparison.examples is not None:
        basis += f" and {formatting.plural(len(comparison.examples), 'example')}"
    p = formatting.p_value(float(tests.p_holm[index]))
    return f"95 % interval of the difference {low} to {high}, {basis}, Holm-adjusted {p}"


def _leader(comparison: ComparisonSet, needed: int | None) -> tuple[str, str]:
    """Return headline and detail about the arm with the best mean and the arms that it is distinguished from."""
    ranked, measure = comparison.ranked(), comparison.measure
    best, others = ranked[0], ranked[1:]
    label, mean = comparison.arms[best].label, measure.short(comparison.arms[best].final.mean)
    if not others:
        return f"Only {label} has runs that finished.", ""
    beaten = _beaten(comparison, best)
    undecided = [i for i in others if i not in beaten]
    if not undecided:
        closest = min(others, key=lambda i: _gap(comparison, best, i))
        rest = ", the closest of the others" if len(others) > 1 else ""
        headline = f"{label} ends {measure.superlative}, {_size(comparison, best, closest)}{rest}."
        mean = measure.text(comparison.arms[best].final.mean)
        return headline, f"Final {measure.shown_name} {mean}; {_evidence(comparison, best, closest)}."
    near = undecided[0]
    names = formatting.listing([comparison.arms[i].label for i in undecided[:3]], "or")
    if len(undecided) > 3:
        names = f"{len(undecided)} of the {len(others)} others"
    detail = f"The mean of {label}, {mean}, is {_size(comparison, best, near)}: {_evidence(comparison, best, near)}."
    if beaten:
        below = [comparison.arms[i].label for i in beaten[:3]]
        if len(beaten) > 3:
            below.append(formatting.plural(len(beaten) - 3, "other"))
        detail += f" {label} ends {measure.ahead} {formatting.listing(below)}."
    size = measure.gap_text(statistics.RESOLUTION, 1)
    if (examples := examples_needed(comparison)) is not None:
        # Each number is that for many of the other.
        seeds = f"{formatting.grouped(needed)} seeds and " if needed else ""
        detail += (
            f" To show a difference of {size} takes at least {seeds}{formatting.grouped(examples)} examples."
        )
    elif needed:
        detail += f" n = {formatting.grouped(needed)} seeds would show a difference of {size}."
    return f"No difference shown between {label} and {names}.", detail


def _one_arm(comparison: ComparisonSet, scope: str) -> Verdict:
    arm = comparison.arms[0]
    spread, half, basis = "", arm.final.half_width, f"{arm.final.n} seeds"
    if comparison.examples is not None:
        half = comparison.examples.half_widths(0, arm.final)[1]
        basis += f" and {formatting.plural(len(comparison.examples), 'example')}"
    if arm.final.n > 1:
        spread = f" ± {comparison.measure.gap(half, 2)} (95 % interval over {basis})"
    value = comparison.measure.text(arm.final.mean)
    headline = f"One arm: {arm.label} ends at {value}{spread}."
    return Verdict("one_arm", headline, "There is no other arm to compare with.", scope)
