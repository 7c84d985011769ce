"""What the sections of all studies share: heading, provenance, the table of arms and the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from analysis import formatting
from analysis.comparison.sets import ComparisonSet
from analysis.comparison.verdict import judge
from analysis.results.markdown import fixed, table

Summary = Mapping[str, Any]
MIB = 2**20


def head(summary: Summary, comparison: ComparisonSet) -> dict[str, Any]:
    """Return the values that `study_head.md.j2` states about a study."""
    trials = [trial for arm in summary["arms"] for trial in arm["trials"]]
    runs = [run for arm in summary["arms"] for run in arm["runs"]]
    spent = [entry["seconds"] or 0.0 for entry in (*trials, *runs)]
    tokens, parameters = summary["tokens"] or math.nan, summary["parameters"] or math.nan
    budgets = {arm["arm"]: _spent(arm) for arm in summary["arms"]}
    notes = []
    if len(set(budgets.values())) > 1:
        counts = formatting.listing([f"{label} {count}" for label, count in budgets.items()])
        notes.append(
            f"Tuning budgets are unequal (trials that ended: {counts}): a comparison favours the larger ones."
        )
    edges = [f"{arm['arm']} ({', '.join(arm['edges'].values())})" for arm in summary["arms"] if arm["edges"]]
    if edges:
        notes.append(
            f"The best rate is on the edge of what was tried for {formatting.listing(edges)}: a better one may exist."
        )
    lost = [arm["arm"] for arm in summary["arms"] if arm["best"] is None]
    if lost:
        notes.append(
            f"No trial of {formatting.listing(lost)} ended with a finite loss: there is nothing to compare."
        )
    notes += [f"{line}." for line in comparison.replaced]
    seeds = {arm.label: arm.final.n for arm in comparison.arms}
    if len(set(seeds.values())) > 1:
        counts = formatting.listing([f"{label} {count}" for label, count in seeds.items()])
        notes.append(
            f"Arms have unequal numbers of finished runs ({counts}): tests use the seeds that two arms share."
        )
    unfinished = [f"{run.where} ({run.state})" for run in comparison.runs if not run.finished]
    if unfinished:
        notes.append(f"Not finished: {formatting.listing(unfinished)}.")
    return {
        "study": summary["study"],
        "title": comparison.title,
        "trials": len(trials),
        "runs": len(runs),
        "hours": f"{sum(spent) / 3600:.1f}",
        "device": summary["device"],
        "versions": ", ".join(f"{key} {value}" for key, value in summary["packages"].items() if value),
        "per_parameter": f"{tokens / parameters:.2g}",
        "passes": f"{tokens / (summary['train_tokens_available'] or math.nan):.2g}",
        "entropy": fixed(comparison.entropy),
        "verdict": judge(comparison).sentence,
        "notes": notes,
        "arms": arms_table(summary, comparison),
    }


def _spent(arm: Mapping[str, Any]) -> int:
    return sum(trial["state"] in ("finished", "diverged") for trial in arm["trials"])


def setting(arm: Mapping[str, Any]) -> str:
    """Return the selected options of an arm as text; a dash without one."""
    best = next((trial for trial in arm["trials"] if trial["number"] == arm["best"]), None)
    if best is None:
        return "–"
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float | int) else f"{key} {value}"
        for key, value in best["values"].items()
    )


def arms_table(summary: Summary, comparison: ComparisonSet) -> str:
    """Return the table of arms, the lowest mean first."""
    by_label = {arm["arm"]: arm for arm in summary["arms"]}
    ranked = comparison.ranked()
    order = [*ranked, *(i for i in range(len(comparison.arms)) if i not in ranked)]
    rows = []
    for index in order:
        arm = comparison.arms[index]
        facts = by_label[arm.label]
        diverged = sum(trial["state"] == "diverged" for trial in facts["trials"])
        trials = f"{_spent(facts)}" + (f" ({diverged} diverged)" if diverged else "")
        state = arm.mean("memory_bytes", "optimizer_state")
        rows.append(
            (
                arm.label,
                setting(facts),
                trials,
                str(arm.final.n),
                fixed(arm.final.mean),
                fixed(arm.final.half_width),
                fixed(state / MIB, 2),
                fixed(arm.mean("wall_s"), 0),
            )
        )
    return table(
        ("optimizer", "best of the trials", "trials", "seeds", "loss", "±", "state, MiB", "seconds a run"),
        rows,
    )
