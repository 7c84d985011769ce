"""Stage 11: claims of single features that only a GPU can prove."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import optimizers
from benchmarks.gpu_check.record import StageContext
from benchmarks.gpu_check.runs import StepLog, assembled, interleaved_ms, synchronize
from benchmarks.gpu_check.trace import Counts, Trace
from benchmarks.step_time import gradients, llama_60m
from optimizers.linalg.counter_normals import counter_normals
from optimizers.moment_figures import figures_of

_STEPS, _TRACED = 14, 6
_QUICK_STEPS, _QUICK_TRACED = 6, 3
_PARTS = ("data", "forward_backward", "optimizer/")

ONE_WAIT = "In a step without a row the host waits at most once: for the flags of the step before."
DATA = "Getting the samples of a step does not wait for the device and copies nothing from pageable memory."
STREAM = "Samples are copied on a stream on which no kernel runs."
KERNELS = "Kernels of a half-precision AdamW step do not grow with the number of parameters."
SKETCH = "The sketch of a 7B layer (11008 × 1032) is made on the device in at most 5 ms."
PROBE = "The figures of one 4096 × 4096 moment take at most 3 s, as the budget of the probes assumes."
STAGGER = "With refresh_stagger=auto, the longest step of llama_1b under SUMO takes at most 3 times the median step."
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
    for rounding in ("nearest", "stochastic", "kahan"):
        with context.attempt(f"AdamW kernels, {rounding}", KERNELS):
            _adamw_kernels(context, rounding)
    with context.attempt("sketch of a refresh", SKETCH):
        _sketch(context)
    with context.attempt("figures of a moment", PROBE):
        side = 64 if context.quick else 4096
        moment = torch.randn(1, side, side, device=context.device)
        call = {"probe": lambda: figures_of(["w"], moment, moment)}
        seconds = 1e-3 * interleaved_ms(call, context.device, 1)["probe"]
        context.check_on_cuda("figures of a moment", PROBE, seconds <= 3.0, {"seconds": seconds})
    with context.attempt("staggered refresh", STAGGER):
        _staggered_refresh(context)


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
    apart = bool(trace.upload_streams) and not trace.upload_streams & trace.kernel_streams
    streams = {"upload": str(sorted(trace.upload_streams)), "kernels": str(sorted(trace.kernel_streams))}
    context.check_on_cuda("stream of the samples", STREAM, apart, streams)


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


def _sketch(context: StageContext) -> None:
    shape = (64, 16) if context.quick else (11008, 1032)
    calls = {"sketch": lambda: counter_normals(1, shape, context.device)}
    ms = interleaved_ms(calls, context.device, 3 if context.quick else 9)["sketch"]
    context.check_on_cuda("sketch of a refresh", SKETCH, ms <= 5.0, {"ms": ms})


def _adamw_kernels(context: StageContext, rounding: str) -> None:
    """Count the kernels of a step of few and of many parameters."""
    launches = {count: adamw_launches(context, rounding, count) for count in (10, 100)}
    figures = {f"kernels_{count}": number for count, number in launches.items()}
    context.check_on_cuda(f"AdamW kernels, {rounding}", KERNELS, launches[100] <= 1.2 * launches[10], figures)


def adamw_launches(context: StageContext, rounding: str, count: int) -> int:
    """Return the kernels (on a CPU: operators) of the second step of `count` bf16 parameters."""
    weights = [
        nn.Parameter(torch.ones(64, 64, device=context.device, dtype=torch.bfloat16)) for _ in range(count)
    ]
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-3)
    optimizer = optimizers.AdamW([(f"w{i}", w) for i, w in enumerate(weights)], rounding=rounding)
    optimizer.found_inf = torch.zeros((), device=context.device)
    optimizer.step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if context.is_cuda else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        optimizer.step()
        synchronize(context.device)
    path = context.folder / "adamw.json"
    profiler.export_chrome_trace(str(path))
    return Trace.load(path).launches()


def _staggered_refresh(context: StageContext) -> None:
    """Compare the longest step with the median, with refreshes in one step and spread."""
    steps, interval = (_QUICK_STEPS, 4) if context.quick else (22, 10)
    size = [] if context.quick else ["model=llama_1b", "batch_size=4", "micro_batch_size=4"]
    rows = []
    ratios = {}
    for stagger in ("auto", "false"):
        keys = [*size, "optimizer=sumo", *_rank(context), f"optimizer.refresh_interval={interval}"]
        keys += [f"optimizer.refresh_stagger={stagger}", f"steps={steps}"]
        with assembled(context, *keys) as run_:
            log = StepLog(run_, context.folder)
            log.train()
            times = log.all_step_ms()[3:]
        ratios[stagger] = max(times) / statistics.median(times)
        rows.append([stagger, statistics.median(times), max(times), ratios[stagger]])
    context.table(
        "Refreshes of SUMO, spread or not", ["refresh_stagger", "median ms", "longest ms", "ratio"], rows
    )
    context.check_on_cuda("staggered refresh", STAGGER, ratios["auto"] <= 3.0, ratios)
