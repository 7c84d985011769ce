"""Stage 6: memory by kind and by phase, and the time of a step, against `optbench plan`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.gpu_check.record import StageContext
from benchmarks.gpu_check.runs import StepLog, assembled, overrides
from harness import devices
from harness.config import checks, compose
from harness.config.memory_estimate import FRAGMENTATION
from harness.device_specs import device_spec
from harness.memory_phases import device_bytes
from harness.plan.estimate import plan
from harness.probes.memory import MemoryMeter

KINDS = "The bytes of weights and of optimizer state are those of the plan."
PHASES = "The peak of each phase is at most the plan's and its allowance for fragmentation, and not below 0.7 of it."
DEVICE = "The device memory in use at the end, with context and cached blocks, is at most what the plan says is needed."
ALLOCATOR = (
    "Rows of a run have the allocator's reserved peak and the device memory in use, which includes it."
)
TIME = "A step takes at least the plan's lower bound and at most 1.5 times the upper end of its band."
MIB = 2**20
_STEPS, _QUICK_STEPS = 12, 6
_REFRESH, _QUICK_REFRESH = 6, 3
_EXACT = 0.001
_LEAST, _MOST = 0.7, 1 + FRAGMENTATION
_LONGEST = 1.5
_OPTIMIZERS = ("adamw", "muon", "sumo", "galore")


def run(context: StageContext) -> None:
    """Compare four optimizers, fsdp2 on one process, and activation checkpointing."""
    rows: list[list[Any]] = []
    arms = {name: [f"optimizer={name}"] for name in _OPTIMIZERS}
    arms["sumo, fsdp2"] = ["optimizer=sumo", "engine=fsdp2"]
    for mode in ("selective", "full"):
        arms[f"adamw, {mode} checkpointing"] = ["optimizer=adamw", f"model.activation_checkpointing={mode}"]
    for label, own in list(arms.items())[: 1 if context.quick else None]:
        with context.attempt(f"{label}: plan", KINDS):
            _compare(context, label, _keys(context, own), rows)
    context.table("Plan and measurement, MiB", ["run", "what", "plan", "measured", "ratio"], rows)


def _keys(context: StageContext, own: list[str]) -> list[str]:
    steps, refresh = (_QUICK_STEPS, _QUICK_REFRESH) if context.quick else (_STEPS, _REFRESH)
    keys = [f"steps={steps}", *own]
    if own[0].partition("=")[2] in ("sumo", "galore"):
        keys += [f"optimizer.rank={8 if context.quick else 128}", f"optimizer.refresh_interval={refresh}"]
    return keys


def _compare(context: StageContext, label: str, keys: list[str], rows: list[list[Any]]) -> None:
    config = checks.check(compose.load(overrides(context, *keys)), environ={})
    name = devices.device_name(context.device)
    known = name if context.is_cuda and device_spec(name) is not None else None
    planned = plan(config, device=known)
    with assembled(context, *keys) as run_:
        build = run_.memory.peaks().get("build")
        log = StepLog(run_, context.folder, splits_memory=True)
        log.train()
        held = MemoryMeter(run_).read()
        in_use = device_bytes(context.device)

    def add(what: str, expected: int, measured: float | None) -> float | None:
        ratio = measured / expected if measured and expected else None
        rows.append([label, what, expected / MIB, measured / MIB if measured else None, ratio])
        return ratio

    per_rank: dict[str, int] = planned["per_rank"]
    state = sum(size for kind, size in per_rank.items() if kind.startswith("optimizer/"))
    kinds = {
        "weights": add("weights", per_rank["weights"], held["memory/weights_bytes"]),
        "optimizer_state": add("optimizer state", state, held["memory/optimizer_state_bytes"]),
    }
    exact = all(ratio is not None and abs(ratio - 1) <= _EXACT for ratio in kinds.values())
    context.check(f"{label}: kinds", KINDS, exact, kinds)
    peaks = _phase_peaks(context, log, build, "refresh_interval" in config.optimizer.options)
    ratios = {
        phase: add(phase, planned["phases"][phase]["total_bytes"], peak) for phase, peak in peaks.items()
    }
    within = all(ratio is not None and _LEAST <= ratio <= _MOST for ratio in ratios.values())
    context.check_on_cuda(f"{label}: phases", PHASES, within, ratios)
    needed = add("device", planned["needed_bytes"], in_use)
    context.check_on_cuda(f"{label}: device", DEVICE, needed is not None and needed <= 1, {"ratio": needed})
    context.check_on_cuda(f"{label}: allocator", ALLOCATOR, *_allocator(held))
    _step_time(context, label, planned["step_time_s"].get(known) if known else None, log)


def _allocator(held: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Return whether the figures of a row are in the order of what they include, and these figures."""
    reserved, device = held.get("memory/reserved_peak_bytes"), held.get("memory/device_bytes")
    figures = {"reserved_mib": _mib(reserved), "device_mib": _mib(device)}
    return bool(reserved and device and held["memory/weights_bytes"] < reserved <= device), figures


def _mib(size: Any) -> float | None:
    return None if size is None else size / MIB


def _phase_peaks(
    context: StageContext, log: StepLog, build: int | None, refreshes: bool
) -> dict[str, int | None]:
    """Return the peak of each phase of the plan; on a CPU, where tensors are not told from the rest, None.

    The first two steps are left out: AdamW's first step, and caches that are filled for good.
    """
    refresh = _QUICK_REFRESH if context.quick else _REFRESH
    later = list(enumerate(log.part_peaks))[2:]
    ordinary = _highest(step for number, (_, step) in later if not refreshes or number % refresh)
    peaks = {
        "build": build,
        "forward_backward": _highest(backward for _, (backward, _) in later),
        "optimizer_step": ordinary,
    }
    if refreshes:
        peaks["refresh_step"] = _highest(step for number, (_, step) in later if number % refresh == 0)
    return dict.fromkeys(peaks) if not context.is_cuda else peaks


def _highest(peaks: Iterable[int]) -> int | None:
    return max(peaks, default=None)


def _step_time(context: StageContext, label: str, expected: dict[str, Any] | None, log: StepLog) -> None:
    seconds = log.step_ms() * 1e-3
    if expected is None:
        reason = "no data sheet is known for this device" if context.is_cuda else "needs CUDA"
        context.not_run(f"{label}: step time", TIME, reason, {"step_s": seconds})
        return
    figures = {
        "step_s": seconds,
        "at_least_s": expected["total"],
        "expected_from_s": expected["expected_from"],
        "expected_to_s": expected["expected_to"],
    }
    within = expected["total"] <= seconds <= _LONGEST * expected["expected_to"]
    context.check(f"{label}: step time", TIME, within, figures)
