"""What it takes to make a comparison again: code, versions, machine, data, in a few words each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from analysis import formatting
from analysis.compare.comparison import ComparisonSet
from analysis.runs.run import Run

MOST = 3
"""How many different values of one thing are spelled out."""


def provenance(chosen: ComparisonSet) -> list[tuple[str, str]]:
    """Heading and value; where runs disagree the values stand side by side, and what none recorded is absent."""
    facts: list[tuple[str, Callable[[Run], str]]] = [
        ("code", _code),
        ("versions", _versions),
        ("machine", _machine),
        ("corpus", lambda run: run.text("corpus_sha256")[:12]),
        ("comparison key", lambda run: run.comparison_key),
    ]
    found = [(name, _joined(tell(run) for run in chosen.runs)) for name, tell in facts]
    return [(name, value) for name, value in found if value]


def _joined(values: Iterable[str]) -> str:
    kept = [value for value in dict.fromkeys(values) if value]
    more = f" | and {len(kept) - MOST} more" if len(kept) > MOST else ""
    return " | ".join(kept[:MOST]) + more


def _code(run: Run) -> str:
    packages, git = _table(run, "packages"), _table(run, "git")
    version = f"optbench {packages['optbench']}" if packages.get("optbench") else ""
    commit = f"commit {run.commit[:10]}" if run.commit else ""
    changed = "with uncommitted changes" if git.get("modified") else ""
    return ", ".join(part for part in (version, f"{commit} {changed}".strip()) if part)


def _versions(run: Run) -> str:
    packages = _table(run, "packages")
    named = [f"{name} {packages[name]}" for name in ("torch", "deepspeed") if packages.get(name)]
    if not run.text("engine").startswith("zero"):
        named = named[:1]
    python = run.environment.get("python")
    return ", ".join([*([f"Python {python}"] if python else []), *named])


def _machine(run: Run) -> str:
    parts = [run.text("device")]
    size = run.fact("world_size")
    if math.isfinite(size):
        engine = f" ({run.text('engine')})" if run.text("engine") else ""
        parts.append(formatting.plural(round(size), "process", "processes") + engine)
    return ", ".join(part for part in parts if part)


def _table(run: Run, key: str) -> dict[str, Any]:
    found = run.environment.get(key)
    return found if isinstance(found, dict) else {}
