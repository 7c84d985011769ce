"""The section that takes the studies as workloads: steps to a target over the fastest optimizer's, and scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from analysis.comparison import profiles
from analysis.results import study_summary
from analysis.results.markdown import fixed, render, table


def section(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Return the section as Markdown; empty with fewer than two studies that share two optimizers."""
    sets = [study_summary.to_comparison(summary) for summary in summaries]
    if len(sets) < 2:
        return ""
    shared = set.intersection(*({arm.optimizer for arm in comparison.arms} for comparison in sets))
    found = profiles.compare_sets(sets, only=shared)
    if found is None:
        return ""
    order = sorted(range(len(found.submissions)), key=lambda i: (-found.scores[i], found.submissions[i]))
    rows = [
        (
            found.submissions[i],
            *(fixed(float(ratio), 2) if math.isfinite(ratio) else "not reached" for ratio in found.ratios[i]),
            fixed(float(found.scores[i]), 3),
        )
        for i in order
    ]
    names = [str(summary["study"]) for summary in summaries]
    return render(
        "profiles.md.j2",
        {
            "table": table(("optimizer", *names, "score"), rows),
            "workloads": len(sets),
            "max_ratio": profiles.MAX_RATIO,
        },
    )
