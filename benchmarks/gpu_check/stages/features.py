"""Stage 11: claims of single features that only a GPU can prove."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import optimizers
from benchmarks.gpu_check.record import StageContext
from benchmarks.gpu_check.runs import StepLog, assembled, interleaved_ms
from benchmarks.gpu_check.trace import Counts
from benchmarks.step_time import gradients, llama_60m

_STEPS, _TRACED = 14, 6
_QUICK_STEPS, _QUICK_TRACED = 6, 3
_PARTS = ("data", "forward_backward", "optimizer/")

ONE_WAIT = "In a step without a row the host waits at most once: for the flags of the step before."
DATA = "Getting the samples of a step does not wait for the device and copies nothing from pageable memory."
ONE_SHARD = "fsdp2 on one process takes at most 1.3 times the step of engine=single: nothing is sent."
PURE = "A step of bf16_pure AdamW takes at most 3 times torch's fused AdamW on the same bf16 weights."


def run(context: StageContext) -> None:
    """Check the claims one after the other."""
    with context.attempt("waits of a step", ONE_WAIT):
        _whole_step(context)
    with context.attempt("fsdp2 on one process", ONE_SHARD):
        _one_shard(context)
    with context.attempt("bf16_pure AdamW", PURE):
        _pure_adamw(context)


def _whole_step(context: StageContext) -> None:
    """Count all waits of an ordinary step, and those of its parts."""
    steps, traced = (_QUICK_STEPS, _QUICK_TRACED) if context.quick else (_STEPS, _TRACED)
    with assembled(context, "optimizer=muon", f"steps={steps}") as run_:
        log = StepLog(run_, context.folder, traced=traced)
        log.train()
        trace = log.trace()
    step = trace.steps()[traced]
    parts = {part: trace.count(trace.ranges(part, step), any_thread=True) for part in _PARTS}
    whole = trace.count([step], any_thread=True)
    rows = [[part, *_row(counts, context.is_cuda)] for part, counts in {**parts, "whole step": whole}.items()]
    columns = ["part", "waits", "calls", "allocations", "copies from pageable memory"]
    context.table("Where the host waits in an ordinary step (Muon)", columns, rows)
    figures = {"waits": whole.of_host(context.is_cuda)}
    context.check_on_cuda("waits of a step", ONE_WAIT, whole.waits.total() <= 1, figures)
    data = parts["data"]
    is_free = not data.waits and not data.staged_copies
    context.check_on_cuda("samples of a step", DATA, is_free, {"copies": data.staged_copies})


def _row(counts: Counts, is_cuda: bool) -> list[Any]:
    calls = ", ".join(f"{name} × {count}" for name, count in counts.waits.items()) or None
    return [counts.of_host(is_cuda), calls, counts.allocations.total(), counts.staged_copies]


def _one_shard(context: StageContext) -> None:
    steps = _QUICK_STEPS if context.quick else _STEPS
    times = {}
    for engine in ("single", "fsdp2"):
        with assembled(
            context, "optimizer=sumo", *_rank(context), f"steps={steps}", f"engine={engine}"
        ) as run_:
            log = StepLog(run_, context.folder)
            log.train()
            times[engine] = log.step_ms(without={0})
    ratio = times["fsdp2"] / times["single"]
    figures = {f"{engine}_ms": ms for engine, ms in times.items()}
    context.check_on_cuda("fsdp2 on one process", ONE_SHARD, ratio <= 1.3, {**figures, "ratio": ratio})


def _rank(context: StageContext) -> list[str]:
    return ["optimizer.rank=8" if context.quick else "optimizer.rank=128"]


def _pure_adamw(context: StageContext) -> None:
    shapes = llama_60m(1, 32, 48) if context.quick else llama_60m()
    slopes = [g.to(torch.bfloat16) for g in gradients(shapes, device=context.device)]

    def stepper(build: Any) -> Any:
        weights = [nn.Parameter(torch.zeros_like(g)) for g in slopes]
        for weight, slope in zip(weights, slopes):
            weight.grad = slope
        optimizer = build(weights)
        if isinstance(optimizer, optimizers.Optimizer):
            optimizer.found_inf = torch.zeros((), device=context.device)
        return optimizer.step

    calls = {
        "ours": stepper(
            lambda weights: optimizers.build("adamw", [(f"w{i}", w) for i, w in enumerate(weights)])
        ),
        "torch": stepper(lambda weights: torch.optim.AdamW(weights, lr=1e-3, fused=True)),
    }
    times = interleaved_ms(calls, context.device, 3 if context.quick else 15)
    ratio = times["ours"] / times["torch"]
    figures = {"ours_ms": times["ours"], "torch_ms": times["torch"], "ratio": ratio}
    context.check_on_cuda("bf16_pure AdamW", PURE, ratio <= 3.0, figures)
