"""Summarize the run folders of a study as JSON, from which its section of docs/RESULTS.md follows, and read it back.

A summary has the trials, and of each run on a fresh seed its evaluations, spikes, memory and time. `to_comparison`
makes the set of runs of it that `analysis.comparison` judges, so that the page states what `optbench report` states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.comparison import sets
from analysis.comparison.sets import ComparisonSet
from analysis.results import claims
from analysis.runs import reading, tuning_ledger
from analysis.runs.loading import load
from analysis.runs.run import LoadedRun
from analysis.runs.tuning_ledger import TunedArm
from harness.errors import InputError
from harness.redaction import redact_paths

SCHEMA_VERSION = 1
FACTS = ("steps_planned", "parameters", "unigram_entropy", "train_tokens_available")
CURVE = {"step": "step", "tokens": "tokens", "loss": "val/loss"}
MEMORY = ("weights", "gradients", "optimizer_state")


def summarize(folder: Path, name: str) -> dict[str, Any]:
    """Return the summary of a study.

    Args:
        folder: of the comparison (``runs/GROUP``).
        name: of the study.

    Raises:
        InputError: no such folder, no ledger or no run of the comparison, or runs of several settings, as after an edit
            of the study's file.
    """
    runs = [run for run in load(folder) if not run.is_external]
    tuning_ledger.attach(runs)
    arms = tuning_ledger.read(folder)
    if not arms or not runs:
        what = "holds no run on a fresh seed" if arms else "holds no tuning.json"
        raise InputError("studies", folder, what, fix=f"optbench sweep study={name} group={name}")
    keys = dict.fromkeys(run.comparison_key for run in runs)
    if len(keys) > 1:
        reason = f"holds runs of {len(keys)} settings of data, model or budget, which cannot be one study"
        raise InputError("studies", folder, reason, fix=f"move those of another {name}.yaml elsewhere")
    first = max(runs, key=lambda run: (run.finished, len(run.summary)))
    own = {
        arm.label: [run for run in runs if run.tuning is not None and run.tuning.label == arm.label]
        for arm in arms
    }
    strays = sorted({run.where for run in runs} - {run.where for members in own.values() for run in members})
    if strays:
        reason = f"holds runs that its ledger does not know ({strays[0]})"
        raise InputError(
            "studies", folder, reason, fix="the same optbench sweep command again, or another folder"
        )
    packages = first.environment.get("packages")
    return redact_paths(
        {
            "schema_version": SCHEMA_VERSION,
            "study": name,
            "commands": reading.read_provenance(folder)["commands"],
            "packages": {key: packages.get(key) for key in ("optbench", "torch")}
            if isinstance(packages, dict)
            else {},
            "device": first.text("device"),
            "commit": first.commit or None,
            "comparison_key": next(iter(keys)),
            "model": _name(first, "model"),
            "data": _name(first, "data"),
            "precision": first.text("precision"),
            "tokens": _number(first.fact("tokens")),
            **{key: _number(first.fact(key)) for key in FACTS},
            "arms": [_arm(arm, own[arm.label]) for arm in arms],
        }
    )


def _name(run: LoadedRun, part: str) -> str:
    table = run.config.get(part)
    return str(table.get("name") or "") if isinstance(table, dict) else ""


def _arm(arm: TunedArm, runs: list[LoadedRun]) -> dict[str, Any]:
    (tuned,) = tuning_ledger.to_json([arm])
    kept = ("number", "values", "state", "loss", "seconds", "added")
    return {
        "arm": arm.label,
        "optimizer": arm.optimizer,
        "options": runs[0].optimizer_config if runs else {},
        "seed": arm.seed,
        "best": arm.best,
        "edges": arm.edges,
        "trials": [{key: trial[key] for key in kept} for trial in tuned["trials"]],
        "runs": [_run(run) for run in sorted(runs, key=lambda run: run.seed)],
    }


def _run(run: LoadedRun) -> dict[str, Any]:
    losses = run.metrics.get("val/loss", np.empty(0))
    kept = np.isfinite(losses)
    curve = {
        name: [_number(value) for value in run.metrics[key][kept]]
        for name, key in CURVE.items()
        if key in run.metrics
    }
    train = run.metrics.get("train/loss", np.empty(0))
    memory = run.summary.get("memory_bytes")
    return {
        "seed": run.seed,
        "state": run.state,
        "reason": run.reason if run.state != "finished" else "",
        "identity": run.text("identity") or str(run.status.get("identity") or ""),
        "final": _number(run.final_loss),
        "spikes": claims.count_spikes(train) if _has_every_step(run) else None,
        "seconds": _number(run.fact("wall_s")),
        "steps": _number(run.steps),
        "tokens": _number(run.fact("tokens")),
        "memory": {key: memory[key] for key in MEMORY if key in memory} if isinstance(memory, dict) else {},
        "state_bytes": run.summary.get("state_bytes") or {},
        "curve": curve,
    }


def _has_every_step(run: LoadedRun) -> bool:
    """Return True if the run logged the training loss of each step (``log_every=1``): no spike is between two rows."""
    steps = run.metrics.get("step", np.empty(0))
    return "train/loss" in run.metrics and len(steps) > 1 and bool((np.diff(steps) == 1).all())


def _number(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else round(float(value), 6)


def to_comparison(summary: Mapping[str, Any]) -> ComparisonSet:
    """Return the runs of a summary as the set that they form."""
    runs = []
    for arm in summary["arms"]:
        for facts in arm["runs"]:
            curve = facts["curve"]
            names = {column: key for column, key in CURVE.items() if column in curve}
            runs.append(
                LoadedRun(
                    folder=Path(summary["study"]),
                    where=f"{arm['arm']}-seed{facts['seed']}",
                    config={
                        "optimizer": {**arm["options"], "name": arm["optimizer"]},
                        "seed": facts["seed"],
                        "model": {"name": summary["model"]},
                        "data": {"name": summary["data"]},
                    },
                    summary={
                        "state": facts["state"],
                        "optimizer": arm["arm"],
                        "seed": facts["seed"],
                        "val/loss": facts["final"],
                        "wall_s": facts["seconds"],
                        "steps": facts["steps"],
                        "tokens": facts["tokens"],
                        "precision": summary["precision"],
                        "memory_bytes": facts["memory"],
                        "state_bytes": facts["state_bytes"],
                        **{key: summary[key] for key in FACTS},
                    },
                    status={},
                    environment={},
                    parameters=[],
                    metrics={key: np.array(curve[column], float) for column, key in names.items()},
                    moments=pd.DataFrame(),
                    state=facts["state"],
                    reason=facts["reason"],
                    comparison_key=summary["comparison_key"],
                )
            )
    (comparison,) = sets.group_into_sets(runs, [arm["arm"] for arm in summary["arms"]])
    return comparison
