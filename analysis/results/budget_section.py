"""The section on the length of training: does the order of optimizers change with the tokens per parameter?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from analysis.comparison import statistics
from analysis.comparison.sets import ComparisonSet
from analysis.formatting import listing, plural
from analysis.results import study_section, study_summary
from analysis.results.markdown import fixed, render, table


class Order(NamedTuple):
    """How a pair of arms differs at several budgets.

    Attributes:
        arms: labels.
        signs: by budget: −1 the first ends lower, 1 the second, 0 not shown.
        gaps: mean of first − second, nats/token; NaN without common seeds.
    """

    arms: tuple[str, str]
    signs: list[int]
    gaps: list[float]

    @property
    def is_reversed(self) -> bool:
        """True if each of the two is shown to end lower at some budget."""
        return {-1, 1} <= set(self.signs)

    @property
    def is_kept(self) -> bool:
        """True if one is shown to end lower at every budget."""
        return len(self.signs) > 1 and len(set(self.signs)) == 1 and self.signs[0] != 0


def section(*summaries: Mapping[str, Any]) -> str:
    """Return the section as Markdown, with the budgets in rising order."""
    ordered = sorted(summaries, key=lambda summary: summary["tokens"] or 0)
    sets = [study_summary.to_comparison(summary) for summary in ordered]
    budgets = [f"{s['tokens'] / s['parameters']:.2g}" for s in ordered]
    labels = list(dict.fromkeys(arm.label for comparison in sets for arm in comparison.arms))
    found = orders(sets)
    return render(
        "budget.md.j2",
        {
            "studies": [
                study_section.head(summary, comparison)
                for summary, comparison in zip(ordered, sets, strict=True)
            ],
            "budgets": budgets,
            "means": table(
                ("optimizer", *(f"at {budget} per parameter" for budget in budgets)),
                [(label, *(_mean(comparison, label) for comparison in sets)) for label in labels],
            ),
            "pairs": table(
                ("pair", *(f"at {budget}" for budget in budgets), "order"),
                [
                    (
                        f"{order.arms[0]} − {order.arms[1]}",
                        *(
                            f"{fixed(gap)}{'' if sign else ' (not shown)'}"
                            for gap, sign in zip(order.gaps, order.signs, strict=True)
                        ),
                        "reverses" if order.is_reversed else "is kept" if order.is_kept else "open",
                    )
                    for order in found
                ],
            ),
            "verdict": _verdict(found, budgets),
        },
    )


def orders(sets: Sequence[ComparisonSet]) -> list[Order]:
    """Return how each pair of arms that all budgets have differs at each, by the Holm-adjusted tests of the budget."""
    shared = [
        arm.label for arm in sets[0].arms if all(any(a.label == arm.label for a in s.arms) for s in sets)
    ]
    found = []
    for place, first in enumerate(shared):
        for second in shared[place + 1 :]:
            signs, gaps = [], []
            for comparison in sets:
                names = [arm.label for arm in comparison.arms]
                i, j = names.index(first), names.index(second)
                index = comparison.pair(i, j)
                gap = float(comparison.tests.mean[index]) * (1 if i < j else -1)
                p = np.nan_to_num(comparison.tests.p_holm[index], nan=1.0)
                signs.append(int(math.copysign(1, gap)) if p < statistics.ALPHA and gap else 0)
                gaps.append(gap)
            found.append(Order((first, second), signs, gaps))
    return found


def _verdict(found: Sequence[Order], budgets: Sequence[str]) -> str:
    reversed_ = [f"{order.arms[0]} – {order.arms[1]}" for order in found if order.is_reversed]
    kept = sum(order.is_kept for order in found)
    between = f"between {budgets[0]} and {budgets[-1]} tokens per parameter"
    if len(budgets) < 2:
        return "One budget is measured: nothing is said about others."
    still_open = len(found) - kept - len(reversed_)
    rest = f"Of {plural(len(found), 'pair')}, {kept} keep their order at every budget, and {still_open} are open."
    if reversed_:
        return f"The order reverses {between} for {listing(reversed_)}. {rest}"
    return f"No pair of optimizers is shown to change its order {between}. {rest}"


def _mean(comparison: ComparisonSet, label: str) -> str:
    arm = next((arm for arm in comparison.arms if arm.label == label), None)
    if arm is None or not arm.final.n:
        return "–"
    place = [comparison.arms[i].label for i in comparison.ranked()].index(label) + 1
    return f"{fixed(arm.final.mean)} ± {fixed(arm.final.half_width)} ({place}.)"
