"""The section on SUMO's rank and refresh interval: a grid of both, and what they and their interaction change.

The published grid is Table 9 of the SUMO paper (LLaMA-130M on C4, ranks 128 to 512, intervals 100 to 1000).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.results import claims, study_section, study_summary
from analysis.results.claims import Estimate
from analysis.results.markdown import fixed, render, table

Floats = NDArray[np.float64]


def section(summary: Mapping[str, Any]) -> str:
    """Return the section as Markdown."""
    comparison = study_summary.to_comparison(summary)
    ranks, intervals, losses = grid(summary)
    means = losses.mean(-1)
    cells = [
        (str(rank), *(fixed(float(means[i, j])) for j in range(len(intervals))))
        for i, rank in enumerate(ranks)
    ]
    rows = [
        (name, f"{fixed(found.value)} ({fixed(found.low)} to {fixed(found.high)})", found.outcome())
        for name, found in contrasts(losses, ranks, intervals).items()
    ]
    return render(
        "grid.md.j2",
        {
            **study_section.head(summary, comparison),
            "cells": table(("rank", *(f"every {interval} steps" for interval in intervals)), cells),
            "contrasts": table(("claim", "difference, nats/token (95 % interval)", "outcome"), rows),
            "seeds": losses.shape[-1],
        },
    )


def grid(summary: Mapping[str, Any]) -> tuple[list[int], list[int], Floats]:
    """Return ranks, intervals and the losses of shape (ranks, intervals, seeds); NaN where a cell lacks a run."""
    places = {
        (int(arm["options"]["rank"]), int(arm["options"]["refresh_interval"])): {
            run["seed"]: run["final"] for run in arm["runs"]
        }
        for arm in summary["arms"]
        if arm["runs"]
    }
    ranks, intervals = (sorted({place[i] for place in places}) for i in (0, 1))
    seeds = sorted({seed for cell in places.values() for seed in cell})
    losses = np.full((len(ranks), len(intervals), len(seeds)), np.nan)
    for (rank, interval), cell in places.items():
        for seed, final in cell.items():
            if final is not None:
                losses[ranks.index(rank), intervals.index(interval), seeds.index(seed)] = final
    return ranks, intervals, losses


def contrasts(losses: Floats, ranks: list[int], intervals: list[int]) -> dict[str, Estimate]:
    """Return the differences between the ends of both axes, and the interaction, paired by seed.

    Args:
        losses: shape (ranks, intervals, seeds).
        ranks: in rising order.
        intervals: in rising order, steps.

    Returns:
        Claim → estimate that is positive if the claim holds.
    """
    by_rank = (losses[0] - losses[-1]).mean(0)
    by_interval = (losses[:, -1] - losses[:, 0]).mean(0)
    corner = (losses[0, -1] - losses[0, 0]) - (losses[-1, -1] - losses[-1, 0])
    claimed = (
        f"rank {ranks[-1]} ends lower than rank {ranks[0]} (mean over intervals)",
        f"refreshing every {intervals[0]} steps ends lower than every {intervals[-1]} (mean over ranks)",
        f"frequent refreshes help rank {ranks[0]} more than rank {ranks[-1]} (interaction)",
    )
    return dict(zip(claimed, map(claims.mean_of, (by_rank, by_interval, corner)), strict=True))
