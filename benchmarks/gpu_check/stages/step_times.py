"""Stage 7: optimizer steps against the peers' own packages, and a run against a plain loop, interleaved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import harness_overhead
from benchmarks.gpu_check.record import StageContext
from benchmarks.gpu_check.runs import overrides
from benchmarks.step_time import Contestant, contestants, gradients, llama_60m, measure, warmed
from harness.errors import first_line

_FAMILIES = ("adamw", "muon", "sumo", "galore")
_LEFT_OUT = ("public SUMO code (per-matrix SVD)", "ours: muon_svd")
"""Seconds a step on a GPU: their SVDs are latency, matrix by matrix."""
_TARGETS = (
    ("ours: adamw", "torch AdamW (fused)", 1.1),
    ("ours: muon", "torch.optim.Muon", 0.75),
    ("ours: galore", "galore-torch", 0.9),
)
"""Ours, peer, largest ratio of times: what the same benchmark asks for on a CPU."""
_OVERHEAD = 0.95
"""Least speed of a run over that of a plain loop with the same model, batches and optimizer."""

FASTER = "An optimizer step takes at most this multiple of the peer's, on the 56 matrices of LLaMA-60M."
OVERHEAD = "A run has at least 0.95 times the speed of a plain loop of model, backward, clipping and step."


def run(context: StageContext) -> None:
    """Measure families one after the other, contestants of a family interleaved, then the loop."""
    medians: dict[str, float] = {}
    missing: list[list[str]] = []
    for family in _FAMILIES:
        with context.attempt(f"{family}: step", FASTER):
            medians |= _family(context, family, missing)
    context.table("Optimizer step, rank 128", ["optimizer", "ms"], [[n, ms] for n, ms in medians.items()])
    if missing:
        context.table("Peers that could not be measured", ["peer", "reason"], missing)
    for ours, peer, target in _TARGETS:
        name = f"{ours} / {peer}"
        if ours in medians and peer in medians:
            ratio = medians[ours] / medians[peer]
            context.check_on_cuda(name, FASTER, ratio <= target, {"ratio": ratio, "at_most": target})
        else:
            context.not_run(name, FASTER, "the peer is not installed")
    for optimizer in ("adamw", "sumo"):
        name = f"{optimizer}: run against a plain loop"
        with context.attempt(name, OVERHEAD):
            _overhead(context, name, optimizer)


def _family(context: StageContext, family: str, missing: list[list[str]]) -> dict[str, float]:
    shapes = llama_60m(1, 32, 48) if context.quick else llama_60m()
    rank, rounds = (8, 2) if context.quick else (128, 15)
    chosen = _available(
        [c for c in contestants(rank) if c.family == family and c.name not in _LEFT_OUT and not c.refreshes],
        missing,
        context,
    )
    return measure(chosen, shapes, rounds, device=context.device)


def _available(
    chosen: Sequence[Contestant], missing: list[list[str]], context: StageContext
) -> list[Contestant]:
    """Return the contestants that make two steps of a tiny problem; the others go to `missing` with the reason."""
    tiny = gradients([(24, 16), (16, 24)], device=context.device)
    available = []
    for contestant in chosen:
        try:
            # A rank larger than the sides is refused.
            small = next(c for c in contestants(8) if c.name == contestant.name)
            warmed(small, tiny)
        except Exception as error:
            if contestant.name.startswith("ours"):
                raise
            missing.append([contestant.name, first_line(error)[:200]])
        else:
            available.append(contestant)
    return available


def _overhead(context: StageContext, name: str, optimizer: str) -> None:
    keys = [f"optimizer={optimizer}"]
    if optimizer == "sumo":
        keys.append(f"optimizer.rank={8 if context.quick else 128}")
    if not context.quick:
        # Small steps: the overhead of the host is what could show.
        keys += ["batch_size=8", "micro_batch_size=8"]
    given = {"steps", "world_size", "runs_dir", "schedule", "schedule.warmup", "moments.every", "log_every"}
    words = [word for word in overrides(context, *keys) if word.partition("=")[0] not in given]
    measured: dict[str, Any] = harness_overhead.measure(words, rounds=1 if context.quick else 5)
    figures = {"speed_ratio": measured["ratio"], **measured["tokens_per_s"]}
    context.check_on_cuda(name, OVERHEAD, measured["ratio"] >= _OVERHEAD, figures)
