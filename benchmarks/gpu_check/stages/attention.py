"""Stage 5: which attention kernel runs, in eager and in compiled mode, and what a step takes."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_check.record import StageContext
from benchmarks.gpu_check.runs import StepLog, assembled
from benchmarks.gpu_check.trace import Trace

FUSED = ("flash", "cudnn")
"""Parts of the names of kernels that skip the masked half of causal attention."""
UNFUSED = ("fmha_cutlass", "mem_efficient", "efficient_attention", "softmax_warp")
"""Parts of the names of the slower kernels, and of plain softmax."""
_STEPS, _TRACED = 10, 5
_QUICK_STEPS, _QUICK_TRACED = 5, 3

KERNEL = "Causal attention in bf16 runs in a flash or cuDNN kernel."
NO_READ = "Forward and backward pass read no number on the host, such as a test of the attention mask."


def run(context: StageContext) -> None:
    """Measure both modes."""
    rows = []
    for mode in ("eager", "compiled"):
        with context.attempt(f"{mode}: kernel", KERNEL):
            rows.append(_measured(context, mode))
    context.table(
        "Attention by mode (llama_60m, 32 × 512 tokens, bf16, AdamW)", ["mode", "step ms", "kernels"], rows
    )


def _measured(context: StageContext, mode: str) -> list[Any]:
    steps, traced = (_QUICK_STEPS, _QUICK_TRACED) if context.quick else (_STEPS, _TRACED)
    compiles = str(mode == "compiled").lower()
    with assembled(context, "optimizer=adamw", f"steps={steps}", f"model.compile={compiles}") as run_:
        log = StepLog(run_, context.folder, traced=traced)
        log.train()
        trace = log.trace()
    step = trace.steps()[traced]
    counts = trace.count(trace.ranges("forward_backward", step), any_thread=True)
    reads = counts.of_host(context.is_cuda)
    kernels = attention_kernels(trace)
    fused = [name for name in kernels if any(part in name.lower() for part in FUSED)]
    figures = {"kernels": "; ".join(_short(name) for name in kernels) or "none"}
    context.check_on_cuda(f"{mode}: kernel", KERNEL, bool(fused) and len(fused) == len(kernels), figures)
    # The operator of the stand-in is there in both modes: this one is decided on a CPU, too.
    context.check(f"{mode}: host reads", NO_READ, reads == 0, {"reads": reads})
    return [mode, log.step_ms(), figures["kernels"]]


def attention_kernels(trace: Trace) -> list[str]:
    """Return the attention kernels of a trace; on a CPU, the attention operators."""
    kernels = [name for name in trace.kernels() if any(part in name.lower() for part in (*FUSED, *UNFUSED))]
    return kernels or trace.operators("_scaled_dot_product")


def _short(kernel: str) -> str:
    """Return a kernel's name without its template arguments."""
    return kernel.partition("<")[0].removeprefix("void ").strip()[:80]
