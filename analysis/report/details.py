"""Plain tables below the plots: who owns which parameter, how configurations differ, on what the runs ran."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from analysis import formatting
from analysis.compare.comparison import Arm, ComparisonSet, flat
from analysis.report.spectra import block
from analysis.runs.reading import number
from analysis.runs.run import Run

Grid = tuple[list[str], list[list[str]]]
"""Head and rows of a table of words."""
LAST = 12
"""Evaluations that `finish` lists."""


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
            share = f"{100 * numel / total:.1f} %" if total else formatting.MISSING
            row = [arm.label, rule, str(len(owned)), formatting.grouped(numel), share]
            body.append([*row, "; ".join(reason for reason in reasons if reason)])
    return ["optimizer", "rule", "tensors", "parameters", "share", "why"], body


def parameters(chosen: ComparisonSet) -> Grid:
    """Every parameter with its shape and the rule that each arm gives it; equal blocks share a row."""
    rules = [_rules(arm) for arm in chosen.arms]
    shapes = {
        str(row.get("name")): " × ".join(str(side) for side in row["shape"])
        for arm in chosen.arms
        for run in arm.runs
        for row in run.parameters
        if isinstance(row.get("shape"), list)
    }
    grouped: dict[tuple[str, ...], list[int]] = {}
    for name in dict.fromkeys(name for own in rules for name in own):
        number = block(name)
        pattern = name if number is None else name.replace(f".{number}.", ".{}.", 1)
        taken = [own.get(name, formatting.MISSING) for own in rules]
        numbers = grouped.setdefault((pattern, shapes.get(name, ""), *taken), [])
        numbers += [] if number is None else [number]
    body = [
        [pattern.replace("{}", _range(numbers)) if numbers else pattern, *rest]
        for (pattern, *rest), numbers in grouped.items()
    ]
    return ["parameter", "shape", *(arm.label for arm in chosen.arms)], body


def _rules(arm: Arm) -> dict[str, str]:
    rows = next((run.parameters for run in arm.runs if run.parameters), [])
    return {str(row.get("name")): str(row.get("rule", "")) for row in rows}


def _range(numbers: list[int]) -> str:
    """``[0–3]``, ``[0, 2]``, ``0``."""
    ordered = sorted(numbers)
    if len(ordered) == 1:
        return str(ordered[0])
    if ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"[{ordered[0]}–{ordered[-1]}]"
    return f"[{', '.join(str(number) for number in ordered)}]"


def config_difference(chosen: ComparisonSet) -> tuple[Grid, Grid]:
    """Configuration keys whose values differ between arms (seed and names aside), one column per arm.

    Returns:
        Keys outside of the optimizer, and the optimizer's own.
    """
    skipped = {"seed", "name", "group", "optimizer.lr_source", "optimizer.lr_tuned", "optimizer.seed"}
    configs = [flat((arm.finished or arm.runs)[0].config) for arm in chosen.arms]
    keys = list(dict.fromkeys(key for config in configs for key in config if key not in skipped))
    outside, own = [], []
    for key in keys:
        values = [_shown(config[key]) if key in config else formatting.MISSING for config in configs]
        if len(set(values)) > 1:
            (own if key.startswith("optimizer.") else outside).append([key, *values])
    head = ["key", *(arm.label for arm in chosen.arms)]
    return (head, outside), (head, own)


def finish(chosen: ComparisonSet) -> Grid:
    """Mean validation losses of the last evaluations, a column per arm: the finish of the plot in numbers."""
    curves = [(arm.label, arm.curve) for arm in chosen.arms if arm.curve is not None]
    means = [dict(zip(curve.x["steps"].tolist(), curve.mean.tolist(), strict=True)) for _, curve in curves]
    steps = sorted({step for found in means for step in found})[-LAST:]
    body = [
        [formatting.grouped(step), *(formatting.loss(m.get(step, math.nan)) for m in means)] for step in steps
    ]
    return ["step", *(label for label, _ in curves)], body


def environment(runs: Iterable[Run]) -> Grid:
    """What is recorded of the machines and versions; where runs disagree all values stand. Certificates stand in
    the table of runs.
    """
    values: dict[str, dict[str, None]] = {}
    for run in runs:
        recorded = {key: value for key, value in run.environment.items() if key != "certificate"}
        for key, value in flat(recorded).items():
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
                    "gap": f"{gap:+.4f}".replace("-", "−") if gap == gap else formatting.MISSING,
                    "half": f"± {formatting.significant(half, 2)}" if half == half else "",
                    "p": formatting.p_value(p) if p == p else "no test",
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
