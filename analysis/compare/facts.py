"""Plain tables below the plots: who owns which parameter, how configurations differ, on what the runs ran."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from analysis.compare import words
from analysis.compare.comparison import ComparisonSet, flat
from analysis.compare.reading import number
from analysis.compare.runs import Run

Grid = tuple[list[str], list[list[str]]]
"""Head and rows of a table of words."""


def ownership(chosen: ComparisonSet) -> Grid:
    """Optimizer, rule, tensors, parameters, their share, and why they take this rule."""
    body = []
    for arm in chosen.arms:
        rows = next((run.parameters for run in arm.runs if run.parameters), [])
        total = sum(number(row.get("numel")) for row in rows)
        rules = list(dict.fromkeys(str(row.get("rule", "")) for row in rows))
        for rule in rules:
            owned = [row for row in rows if str(row.get("rule", "")) == rule]
            numel = sum(number(row.get("numel")) for row in owned)
            reasons = dict.fromkeys(str(row.get("reason", "")) for row in owned)
            share = f"{100 * numel / total:.1f} %" if total else words.MISSING
            row = [arm.label, rule, str(len(owned)), words.grouped(numel), share]
            body.append([*row, "; ".join(reason for reason in reasons if reason)])
    return ["optimizer", "rule", "tensors", "parameters", "share", "why"], body


def config_difference(chosen: ComparisonSet) -> Grid:
    """Configuration keys whose values differ between arms (seed and names aside), one column per arm."""
    skipped = {"seed", "name", "group", "optimizer.lr_source", "optimizer.lr_tuned", "optimizer.seed"}
    configs = [flat((arm.finished or arm.runs)[0].config) for arm in chosen.arms]
    keys = list(dict.fromkeys(key for config in configs for key in config if key not in skipped))
    body = []
    for key in keys:
        values = [_shown(config[key]) if key in config else words.MISSING for config in configs]
        if len(set(values)) > 1:
            body.append([key, *values])
    return ["key", *(arm.label for arm in chosen.arms)], body


def environment(runs: Iterable[Run]) -> Grid:
    """What is recorded of the machines and versions; where runs disagree all values stand."""
    values: dict[str, dict[str, None]] = {}
    for run in runs:
        for key, value in flat(run.environment).items():
            values.setdefault(key, {})[_shown(value)] = None
    return ["", "value"], [[key, " | ".join(seen)] for key, seen in values.items()]


def pair_matrix(chosen: ComparisonSet) -> list[list[dict[str, Any] | None]]:
    """Row arm minus column arm: difference, p (Holm), n, and whether it is shown; None on the diagonal."""
    tests = chosen.tests
    grid: list[list[dict[str, Any] | None]] = []
    for i in range(len(chosen.arms)):
        row: list[dict[str, Any] | None] = []
        for j in range(len(chosen.arms)):
            if i == j:
                row.append(None)
                continue
            index = chosen.pair(i, j)
            gap = float(tests.mean[index]) * (1 if i < j else -1)
            p, half = float(tests.p_holm[index]), float(tests.half_width[index])
            row.append(
                {
                    "gap": f"{gap:+.4f}".replace("-", "−") if gap == gap else words.MISSING,
                    "half": f"± {words.significant(half, 2)}" if half == half else "",
                    "p": words.p_value(p) if p == p else "no test",
                    "n": int(tests.n[index]),
                    "shown": p < 0.05,
                    "lower": gap < 0,
                }
            )
        grid.append(row)
    return grid


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str, ensure_ascii=False)
