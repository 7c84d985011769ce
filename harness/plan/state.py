"""Bytes that a rank holds between two steps."""

from __future__ import annotations

from harness.config.schema import RunConfig
from harness.plan.rank import ZERO_STAGES, PlannedRank


def held_bytes(config: RunConfig, planned: PlannedRank) -> dict[str, int]:
    """Kind → bytes of this rank: weights, gradients (when a step begins), and the optimizer's state by kind, exact.

    Weights and gradients of ZeRO are what DeepSpeed keeps: 16-bit copies beside fp32 masters where the model is
    in half precision.
    """
    optimizer, layout = planned.optimizer, planned.optimizer.layout
    parameters = [p for group in optimizer.parameters_of_groups for p in group]
    local = sum(layout.weight(p).numel() for p in parameters)
    whole = sum(p.numel() for p in parameters)
    width = parameters[0].element_size()
    name = config.engine.name
    held = {"weights": local * width, "gradients": local * width}
    if name in ZERO_STAGES:
        half = config.precision in ("bf16", "fp16")
        copies = whole if name != "zero3" else local
        held["weights"] = copies * (2 if half else 4) + (local * 4 if half or name != "zero3" else 0)
        held["gradients"] = (whole if name == "zero1" else local) * (2 if half else 4)
    held.update({f"optimizer/{kind}": size for kind, size in optimizer.state_bytes().items()})
    return held
