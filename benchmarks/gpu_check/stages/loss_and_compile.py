"""Stage 8: memory and time of the loss in chunks against whole logits, and what torch.compile makes of the model."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_check.record import StageContext
from benchmarks.gpu_check.runs import StepLog, assembled

MIB = 2**20
_STEPS, _QUICK_STEPS = 14, 6
_SLOWER = 1.05
"""Largest time of a step with chunks over that with whole logits."""
_SAVED = 1.0
"""Least memory that chunks save, in fp32 logits."""

MEMORY = "The loss in chunks lowers the peak of training by at least the fp32 logits of a micro-batch."
TIME = "A step with the loss in chunks takes at most 1.05 times one with whole logits."
EQUAL = "Both losses train the same weights: the mean loss of the run agrees to 1e-2 nats in bf16."
GRAPHS = "A compiled model runs without a graph break, and its layers share at most three graphs."


def run(context: StageContext) -> None:
    """Compare the two losses, then count the graphs of a compiled run."""
    with context.attempt("chunked loss", MEMORY):
        _chunks(context)
    with context.attempt("compile: graphs", GRAPHS):
        _graphs(context)


def _chunks(context: StageContext) -> None:
    steps = _QUICK_STEPS if context.quick else _STEPS
    chunk = "32" if context.quick else "auto"
    measured: dict[str, dict[str, Any]] = {}
    for name, value in (("whole", "null"), ("chunks", chunk)):
        keys = ["optimizer=adamw", f"steps={steps}", f"model.loss_chunk={value}"]
        with assembled(context, *keys) as run_:
            log = StepLog(run_, context.folder)
            log.train()
            assert run_.state.loss is not None
            # A sum over all steps; nats.
            mean = float(run_.state.loss) / run_.state.loss_tokens
            config = run_.config
            vocabulary = config.model.config["vocab_size"]
            logits = 4 * (config.micro_batch_size or 1) * config.seq_len * vocabulary
            measured[name] = {"ms": log.step_ms(), "peak": log.peak_bytes, "loss": mean, "logits": logits}
    whole, chunks = measured["whole"], measured["chunks"]
    columns = ["loss", "step ms", "peak MiB", "mean loss of the run, nats"]
    rows = [[n, m["ms"], m["peak"] / MIB if m["peak"] else None, m["loss"]] for n, m in measured.items()]
    context.table(f"Whole fp32 logits: {whole['logits'] / MIB:.0f} MiB", columns, rows)
    saved = (whole["peak"] - chunks["peak"]) / whole["logits"] if whole["peak"] else None
    is_saved = saved is not None and saved >= _SAVED
    context.check_on_cuda("chunked loss: peak", MEMORY, is_saved, {"saved_over_logits": saved})
    ratio = chunks["ms"] / whole["ms"]
    context.check_on_cuda("chunked loss: time", TIME, ratio <= _SLOWER, {"ratio": ratio})
    apart = abs(whole["loss"] - chunks["loss"])
    context.check("chunked loss: value", EQUAL, apart <= 1e-2, {"difference": apart})


def _graphs(context: StageContext) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    with assembled(context, "optimizer=adamw", "steps=4", "model.compile=true") as run_:
        StepLog(run_, context.folder).train()
    breaks = counters["graph_break"]
    graphs = counters["stats"].get("unique_graphs", 0)
    rows = [[reason.splitlines()[0][:200], count] for reason, count in breaks.items()]
    if rows:
        context.table("Graph breaks", ["reason", "count"], rows)
    figures = {"graphs": graphs, "breaks": sum(breaks.values())}
    context.check("compile: graphs", GRAPHS, not breaks and 0 < graphs <= 3, figures)
