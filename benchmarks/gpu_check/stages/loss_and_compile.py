"""Stage 8: memory and time of the chunked loss against whole logits, and what torch.compile makes of the model."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_check.record import StageContext
from benchmarks.gpu_check.runs import StepLog, assembled

GRAPHS = "A compiled model has no graph break, and its layers share at most three graphs."


def run(context: StageContext) -> None:
    """Count the graphs of a compiled run."""
    with context.attempt("compile: graphs", GRAPHS):
        _graphs(context)


def _graphs(context: StageContext) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    rows: list[list[Any]] = []
    with assembled(context, "optimizer=adamw", "steps=4", "model.compile=true") as run_:
        StepLog(run_, context.folder).train()
    breaks = counters["graph_break"]
    graphs = counters["stats"].get("unique_graphs", 0)
    rows = [[reason.splitlines()[0][:200], count] for reason, count in breaks.items()]
    if rows:
        context.table("Graph breaks", ["reason", "count"], rows)
    figures = {"graphs": graphs, "breaks": sum(breaks.values())}
    context.check("compile: graphs", GRAPHS, not breaks and 0 < graphs <= 3, figures)
