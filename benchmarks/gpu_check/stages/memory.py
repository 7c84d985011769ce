"""Stage 6: what a run holds on the device against what `optbench plan` says, by kind, and the peak of training."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_check.record import StageContext
from benchmarks.gpu_check.runs import StepLog, assembled, overrides
from harness.config import checks, compose
from harness.plan.estimate import plan
from harness.probes.memory import MemoryMeter

KINDS = "The bytes of weights and of optimizer state are those of the plan."
PEAK = "The peak of training is at most the plan's total and its margin, and not below 0.7 of it."
_STEPS, _QUICK_STEPS = 6, 4
_EXACT = 0.001
_LEAST = 0.7
MARGIN = 1.10
"""Largest peak over the plan's total: workspaces of kernels and the allocator's rounding are not planned."""
_OPTIMIZERS = ("adamw", "muon", "sumo", "galore")
MIB = 2**20


def run(context: StageContext) -> None:
    """Compare four optimizers, and AdamW with activation checkpointing."""
    rows: list[list[Any]] = []
    arms = [(name, False) for name in _OPTIMIZERS] + [("adamw", True)]
    for optimizer, is_checkpointed in arms[:1] if context.quick else arms:
        label = f"{optimizer}{', checkpointing' if is_checkpointed else ''}"
        with context.attempt(f"{label}: kinds", KINDS):
            _compare(context, label, optimizer, is_checkpointed, rows)
    context.table("Plan and measurement, MiB", ["run", "kind", "plan", "measured", "ratio"], rows)


def _compare(
    context: StageContext, label: str, optimizer: str, is_checkpointed: bool, rows: list[list[Any]]
) -> None:
    keys = [f"optimizer={optimizer}", f"steps={_QUICK_STEPS if context.quick else _STEPS}", "engine=single"]
    keys += ["optimizer.rank=128"] if optimizer in ("sumo", "galore") else []
    keys += [f"model.activation_checkpointing={str(is_checkpointed).lower()}"]
    config = checks.check(compose.load(overrides(context, *keys)), environ={})
    planned = plan(config)
    with assembled(context, *keys) as run_:
        log = StepLog(run_, context.folder)
        log.train()
        held = MemoryMeter(run_).read()
    per_rank: dict[str, int] = planned["per_rank"]
    state = sum(size for kind, size in per_rank.items() if kind.startswith("optimizer/"))
    pairs = {
        "weights": (per_rank.get("weights"), held["memory/weights_bytes"]),
        "optimizer_state": (state, held["memory/optimizer_state_bytes"]),
        "peak": (planned["total_bytes"], log.peak_bytes),
    }
    ratios: dict[str, float] = {}
    for kind, (expected, measured) in pairs.items():
        if expected and measured:
            ratios[kind] = measured / expected
        rows.append([label, kind, _mib(expected), _mib(measured), ratios.get(kind)])
    exact = all(abs(ratios.get(kind, 0.0) - 1) <= _EXACT for kind in ("weights", "optimizer_state"))
    context.check(f"{label}: kinds", KINDS, exact, {k: v for k, v in ratios.items() if k != "peak"})
    peak = ratios.get("peak")
    is_planned = peak is not None and _LEAST <= peak <= MARGIN
    context.check_on_cuda(f"{label}: peak", PEAK, is_planned, {"ratio": peak})


def _mib(size: Any) -> float | None:
    return None if size is None else size / MIB
