"""Stage 3: twenty steps of every preset under torch's profiler: waits of the host, allocations, times, memory."""

from __future__ import annotations

from typing import Any

import optimizers
from benchmarks.gpu_check.record import StageContext
from benchmarks.gpu_check.runs import StepLog, assembled
from benchmarks.gpu_check.trace import Counts, Trace
from harness.loop import Run

MIB = 2**20
_FULL, _QUICK = (20, 10, 128), (9, 4, 8)
"""Steps, step that refreshes, rank."""

ORDINARY = "Between refreshes, no call inside the optimizer's ranges waits for the device."
BACKWARD = "Forward and backward pass of an ordinary step contain no wait for the device."
REFRESH = "A step that renews every subspace contains no wait for the device."
ALLOCATE = "An ordinary optimizer step allocates and frees no device memory (cudaMalloc, cudaFree)."
DEBUG = "An ordinary optimizer step triggers no warning of torch.cuda.set_sync_debug_mode."
FINITE = "All steps are made: no gradient is skipped as non-finite."
CONTROL = "Negative control: a number that the optimizer reads on the host in every step is counted."


def run(context: StageContext) -> None:
    """Measure every preset, then the negative control."""
    rows = []
    for preset in optimizers.PRESETS:
        with context.attempt(f"{preset}: 20 steps", FINITE):
            rows.append(_measured(context, preset))
    columns = [
        "preset",
        "step ms",
        "optimizer ms",
        "peak MiB",
        "reserved MiB",
        "operators",
        "operators, refresh",
        "waits, refresh",
    ]
    context.table("Medians of ordinary steps (llama_60m, 32 × 512 tokens, bf16)", columns, rows)
    with context.attempt("control: a read is counted", CONTROL):
        _control(context)


def _keys(context: StageContext, preset: str) -> list[str]:
    steps, refresh, rank = _QUICK if context.quick else _FULL
    keys = [f"optimizer={preset}", f"steps={steps}"]
    options = optimizers.resolve(preset)
    if "rank" in options:
        keys.append(f"optimizer.rank={rank}")
    if "refresh_interval" in options:
        keys.append(f"optimizer.refresh_interval={refresh}")
    if "refresh_stagger" in options:
        # All in one step, so that ordinary steps and refresh steps can be told apart.
        keys.append("optimizer.refresh_stagger=false")
    return keys


def _measured(context: StageContext, preset: str) -> list[Any]:
    steps, refresh, _ = _QUICK if context.quick else _FULL
    with assembled(context, *_keys(context, preset)) as run_:
        log = StepLog(run_, context.folder, traced=refresh)
        log.train()
        skipped, trace = run_.state.skipped, log.trace()
    numbered = trace.steps()
    ordinary, renewing = numbered[refresh - 1], numbered[refresh]
    inside = trace.count(trace.ranges("optimizer/", ordinary))
    while_renewing = trace.count(trace.ranges("optimizer/", renewing))
    backward = trace.count(trace.ranges("forward_backward", ordinary), any_thread=True)
    context.check(f"{preset}: steps", FINITE, skipped == 0, {"steps": steps, "skipped": skipped})
    _no_waits(context, f"{preset}: ordinary step", ORDINARY, inside)
    _no_waits(context, f"{preset}: forward and backward", BACKWARD, backward)
    refreshes = "refresh_interval" in optimizers.resolve(preset)
    if refreshes:
        _no_waits(context, f"{preset}: refresh step", REFRESH, while_renewing)
    allocated = inside.allocations
    context.check_on_cuda(
        f"{preset}: allocations", ALLOCATE, not allocated, dict(allocated), _listed(allocated)
    )
    warned = len(log.debug_warnings)
    context.check_on_cuda(f"{preset}: sync debug mode", DEBUG, not warned, {"warnings": warned})
    return [
        preset,
        log.step_ms(without={refresh}),
        log.optimizer_ms(without={refresh}),
        _mib(log.peak_bytes),
        _mib(log.reserved_bytes),
        inside.operators,
        while_renewing.operators if refreshes else None,
        while_renewing.of_host(context.is_cuda) if refreshes else None,
    ]


def _no_waits(context: StageContext, name: str, proves: str, counts: Counts) -> None:
    kind = "waits" if context.is_cuda else "scalar_reads"
    figures = {kind: counts.of_host(context.is_cuda), "operators": counts.operators}
    if context.is_cuda:
        figures["copies_from_pageable_memory"] = counts.staged_copies
    context.check_on_cuda(name, proves, not counts.waits, figures, _listed(counts.waits))


def _listed(counts: Any) -> str:
    return ", ".join(f"{name} × {count}" for name, count in counts.items())


def _mib(size: int | None) -> float | None:
    return None if size is None else size / MIB


def _control(context: StageContext) -> None:
    _, refresh, _ = _QUICK if context.quick else _FULL
    counted = {}
    for name in ("clean", "reading"):
        with assembled(context, "optimizer=adamw", f"steps={refresh + 3}") as run_:
            if name == "reading":
                read_in_every_step(run_)
            log = StepLog(run_, context.folder, traced=refresh)
            log.train()
            trace = log.trace()
        counted[name] = host_reads(trace, refresh - 1, context.is_cuda)
    context.check("control: a read is counted", CONTROL, counted["reading"] == counted["clean"] + 1, counted)


def host_reads(trace: Trace, step: int, is_cuda: bool) -> int:
    """Return how often the optimizer made the host wait (on a CPU: read a number) in a traced step."""
    return trace.count(trace.ranges("optimizer/", trace.steps()[step])).of_host(is_cuda)


def read_in_every_step(run_: Run) -> None:
    """Make the AdamW part of a run's optimizer read one number of a weight in every step."""
    optimizer: Any = run_.optimizer
    original = optimizer._step_adamw
    # AdamW has a second group where embeddings and head have their own rate: one of them reads.
    reader = next(
        unit.key for unit in optimizer.units.all() if optimizer.units.group_of(unit).rule == "adamw"
    )

    def reading(unit: Any, active: Any, mask: Any) -> None:
        if unit.key == reader:
            float(active[0].detach().flatten()[0])
        original(unit, active, mask)

    optimizer._step_adamw = reading
