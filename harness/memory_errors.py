"""What took the memory where it ran out, and which option would help."""

from __future__ import annotations

import torch

from harness.config.schema import RunConfig
from harness.loop import Run
from harness.probes.memory import peak_bytes
from harness.tracked_optimizer import tracked

_WORDS = ("can't allocate memory", "not enough memory", "out of memory")


def is_one(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the device or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


def explained(run: Run) -> str:
    """A line: bytes by kind on this process, and options that would help here, the cheapest first."""
    kinds = {**run.engine.held_bytes(), "optimizer state": sum(tracked(run.optimizer).state_bytes().values())}
    peak = peak_bytes(run.engine.device)
    kinds["activations and the rest"] = max(0, peak - sum(kinds.values()))
    parts = ", ".join(f"{kind} {size / 2**20:,.0f} MiB" for kind, size in kinds.items())
    return (
        f"out of memory: {parts}; peak {peak / 2**20:,.0f} MiB; try {', '.join(remedies(run.config, kinds))}"
    )


def remedies(config: RunConfig, kinds: dict[str, int]) -> list[str]:
    """Options that lower the largest kind first.

    Args:
        config: of the run.
        kinds: bytes by kind, as `explained` counts them.
    """
    found: list[str] = []
    micro = config.micro_batch_size or 1
    rest = kinds.get("activations and the rest", 0)
    fixed = sum(kinds.values()) - rest
    activations = []
    if micro > 1:
        activations.append(f"micro_batch_size={micro // 2}")
    if not config.model.activation_checkpointing:
        activations.append("model.activation_checkpointing=true")
    if config.precision == "fp32":
        activations.append("precision=bf16")
    state = []
    if config.world_size and config.world_size > 1:
        if config.engine.name in ("single", "ddp", "zero0"):
            state.append("engine=fsdp2")
            if config.engine.optimizer_work == "replicated" and config.optimizer.target is None:
                state.append("engine.optimizer_work=split")
        elif config.engine.name in ("zero1", "zero2"):
            state.append("engine=zero3")
    else:
        state.append("more processes with engine=fsdp2")
    found = activations + state if rest >= fixed else state + activations
    return found or ["a shorter seq_len"]
