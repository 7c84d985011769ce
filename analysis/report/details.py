"""Tables below the plots: parameter ownership, configuration differences, environment, pairs, provenance."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

from analysis import formatting
from analysis.comparison.profiles import Profiles
from analysis.comparison.sets import Arm, ComparisonSet, flatten
from analysis.report.moment_plots import block
from analysis.runs.reading import number
from analysis.runs.run import LoadedRun
from analysis.text_tables import TextTable

LAST = 12
"""Evaluations that `last_evaluations` lists."""
MOST = 3
"""Different values of one fact that `provenance` spells out."""


def profiles(found: Profiles) -> TextTable:
    """Return the ratio of each optimizer to the best one by workload, and its score, the highest score first."""
    order = sorted(range(len(found.submissions)), key=lambda i: (-found.scores[i], found.submissions[i]))
    rows = [
        [
            found.submissions[i],
            f"{found.scores[i]:.3f}",
            *(f"{ratio:.2f}" if math.isfinite(ratio) else "not reached" for ratio in found.ratios[i]),
        ]
        for i in order
    ]
    return TextTable(["optimizer", "score", *found.workloads], rows)


def ownership(comparison: ComparisonSet) -> TextTable:
    """Return the rules of each arm: tensors, parameters, their share, and the reason for the assignment."""
    body = []
    for arm in comparison.arms:
        rows = _parameter_rows(arm)
        total = sum(number(row.get("numel")) for row in rows)
        rules = list(dict.fromkeys(str(row.get("rule", "")) for row in rows))
        for rule in rules:
            owned = [row for row in rows if str(row.get("rule", "")) == rule]
            numel = sum(number(row.get("numel")) for row in owned)
            reasons = dict.fromkeys(str(row.get("reason", "")) for row in owned)
            share = f"{100 * numel / total:.1f} %" if total else formatting.MISSING
            row = [arm.label, rule, str(len(owned)), formatting.grouped(numel), share]
            body.append([*row, "; ".join(reason for reason in reasons if reason)])
    return TextTable(["optimizer", "rule", "tensors", "parameters", "share", "why"], body)


def parameters(comparison: ComparisonSet) -> TextTable:
    """Return every parameter with its shape and the rule of each arm; equal blocks share a row."""
    rules = [
        {str(row.get("name")): str(row.get("rule", "")) for row in _parameter_rows(arm)}
        for arm in comparison.arms
    ]
    shapes = {
        str(row.get("name")): " × ".join(str(side) for side in row["shape"])
        for arm in comparison.arms
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
    return TextTable(["parameter", "shape", *(arm.label for arm in comparison.arms)], body)


def _parameter_rows(arm: Arm) -> list[dict[str, Any]]:
    return next((run.parameters for run in arm.runs if run.parameters), [])


def _range(numbers: list[int]) -> str:
    """Return block numbers as ``[0–3]``, ``[0, 2]`` or ``0``."""
    ordered = sorted(numbers)
    if len(ordered) == 1:
        return str(ordered[0])
    if ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"[{ordered[0]}–{ordered[-1]}]"
    return f"[{', '.join(str(number) for number in ordered)}]"


def config_difference(comparison: ComparisonSet) -> tuple[TextTable, TextTable]:
    """Return the configuration keys whose values differ between arms, except seed and names; one column per arm.

    Returns:
        Keys outside of the optimizer, and optimizer options.
    """
    skipped = {"seed", "name", "group", "optimizer.lr_source", "optimizer.lr_tuned", "optimizer.seed"}
    configs = [flatten((arm.finished or arm.runs)[0].config) for arm in comparison.arms]
    keys = list(dict.fromkeys(key for config in configs for key in config if key not in skipped))
    outside, own = [], []
    for key in keys:
        values = [_shown(config[key]) if key in config else formatting.MISSING for config in configs]
        if len(set(values)) > 1:
            (own if key.startswith("optimizer.") else outside).append([key, *values])
    head = ["key", *(arm.label for arm in comparison.arms)]
    return TextTable(head, outside), TextTable(head, own)


def last_evaluations(comparison: ComparisonSet) -> TextTable:
    """Return the means of the last evaluations, one column per arm."""
    show = comparison.measure.number
    curves = [(arm.label, arm.curve) for arm in comparison.arms if arm.curve is not None]
    means = [dict(zip(curve.x["steps"].tolist(), curve.mean.tolist(), strict=True)) for _, curve in curves]
    steps = sorted({step for losses in means for step in losses})[-LAST:]
    body = [[formatting.grouped(step), *(show(m.get(step, math.nan)) for m in means)] for step in steps]
    return TextTable(["step", *(label for label, _ in curves)], body)


def environment(runs: Iterable[LoadedRun]) -> TextTable:
    """Return the recorded environment; where runs differ, all values. Certificates are in the table of runs."""
    values: dict[str, dict[str, None]] = {}
    for run in runs:
        recorded = {key: value for key, value in run.environment.items() if key != "certificate"}
        for key, value in flatten(recorded).items():
            values.setdefault(key, {})[_shown(value)] = None
    return TextTable(["", "value"], [[key, " | ".join(seen)] for key, seen in values.items()])


def pair_matrix(comparison: ComparisonSet) -> list[list[dict[str, Any] | None]]:
    """Return row arm minus column arm: difference, p (Holm), n, and significance; None on the diagonal."""
    tests = comparison.tests
    grid: list[list[dict[str, Any] | None]] = []
    for i in range(len(comparison.arms)):
        row: list[dict[str, Any] | None] = []
        for j in range(len(comparison.arms)):
            if i == j:
                row.append(None)
                continue
            index = comparison.pair(i, j)
            gap = float(tests.mean[index]) * (1 if i < j else -1)
            p, half = float(tests.p_holm[index]), float(tests.half_width[index])
            row.append(
                {
                    "gap": _signed(comparison, gap),
                    "half": f"± {comparison.measure.gap(half, 2)}" if half == half else "",
                    "p": formatting.p_value(p) if p == p else "no test",
                    "n": int(tests.n[index]),
                    "shown": p < 0.05,
                    "better": comparison.measure.sign * gap > 0,
                }
            )
        grid.append(row)
    return grid


def _signed(comparison: ComparisonSet, gap: float) -> str:
    if gap != gap:
        return formatting.MISSING
    digits = 4 if comparison.measure.scale == 1 else 2
    return f"{comparison.measure.scale * gap:+.{digits}f}".replace("-", "−")


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str, ensure_ascii=False)


def provenance(comparison: ComparisonSet) -> list[tuple[str, str]]:
    """Return heading and value of each fact that is needed to repeat a comparison, as far as it is recorded."""
    readers: list[tuple[str, Callable[[LoadedRun], str]]] = [
        ("code", _code),
        ("versions", _versions),
        ("machine", _machine),
        ("corpus", lambda run: run.text("corpus_sha256")[:12]),
        ("comparison key", lambda run: run.comparison_key),
    ]
    facts = [(name, _joined(read(run) for run in comparison.runs)) for name, read in readers]
    return [(name, value) for name, value in facts if value]


def _joined(values: Iterable[str]) -> str:
    kept = [value for value in dict.fromkeys(values) if value]
    more = f" | and {len(kept) - MOST} more" if len(kept) > MOST else ""
    return " | ".join(kept[:MOST]) + more


def _code(run: LoadedRun) -> str:
    packages, git = _table(run, "packages"), _table(run, "git")
    version = f"optbench {packages['optbench']}" if packages.get("optbench") else ""
    commit = f"commit {run.commit[:10]}" if run.commit else ""
    changed = "with uncommitted changes" if git.get("modified") else ""
    return ", ".join(part for part in (version, f"{commit} {changed}".strip()) if part)


def _versions(run: LoadedRun) -> str:
    packages = _table(run, "packages")
    names = ("torch", "deepspeed") if run.text("engine").startswith("zero") else ("torch",)
    versions = [f"{name} {packages[name]}" for name in names if packages.get(name)]
    python = run.environment.get("python")
    return ", ".join([*([f"Python {python}"] if python else []), *versions])


def _machine(run: LoadedRun) -> str:
    parts = [run.text("device")]
    size = run.fact("world_size")
    if math.isfinite(size):
        engine = f" ({run.text('engine')})" if run.text("engine") else ""
        parts.append(formatting.plural(round(size), "process", "processes") + engine)
    return ", ".join(part for part in parts if part)


def _table(run: LoadedRun, key: str) -> dict[str, Any]:
    table = run.environment.get(key)
    return table if isinstance(table, dict) else {}
