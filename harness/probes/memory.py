"""Bytes of weights, gradients and optimizer state, the measured peak, and what to do where memory runs out."""

from __future__ import annotations

import math

import torch

from harness.config.schema import RunConfig
from harness.loop import Run
from harness.memory_phases import PHASES, device_bytes
from harness.protocols import MetricRow
from harness.tracked_optimizer import tracked

_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")
"""Parts of the messages of errors that say that memory ran out."""


class MemoryMeter:
    """Reads this process' memory by kind; every figure is the maximum over the processes.

    Peaks are the CUDA allocator's high-water marks, or on a CPU the resident set's (interpreter and
    libraries included: that is what a node must have), in total and per phase (`harness.memory_phases`).
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    def read(self) -> MetricRow:
        """Return the ``memory/…_bytes`` keys that exist on this device (a collective)."""
        engine, memory = self._run.engine, self._run.memory
        peaks = memory.peaks()
        # Maxima over processes: the fullest device decides whether a run fits.
        figures: dict[str, float] = {
            **engine.memory_bytes(),
            "optimizer_state": sum(tracked(self._run.optimizer).state_bytes().values()),
            "peak": memory.highest(),
            # All processes reduce the same keys. A phase that has not begun, or that a process cannot tell apart, has
            # no maximum.
            **{f"{phase}_peak": peaks.get(phase, math.inf) for phase in PHASES},
        }
        if engine.device.type == "cuda":
            figures |= {"reserved_peak": memory.reserved(), "device": device_bytes(engine.device)}
        tensor = torch.tensor(list(figures.values()), dtype=torch.float64, device=engine.device)
        return {
            f"memory/{kind}_bytes": int(value)
            for kind, value in zip(figures, engine.max(tensor).tolist())
            if math.isfinite(value)
        }


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an exception says that memory ran out, on the device or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _SIGNS)


def explain_out_of_memory(run: Run) -> str:
    """Return one line: bytes by kind on this process, and options that would help, the cheapest first."""
    kinds = {
        **run.engine.memory_bytes(),
        "optimizer state": sum(tracked(run.optimizer).state_bytes().values()),
    }
    peak = run.memory.highest()
    # What the peak holds beyond the tensors that were counted.
    kinds["activations and the rest"] = max(0, peak - sum(kinds.values()))
    parts = ", ".join(f"{kind} {size / 2**20:,.0f} MiB" for kind, size in kinds.items())
    return (
        f"out of memory: {parts}; peak {peak / 2**20:,.0f} MiB; try {', '.join(remedies(run.config, kinds))}"
    )


def remedies(config: RunConfig, kinds: dict[str, int]) -> list[str]:
    """Return options that lower the largest kind first.

    Args:
        config: of the run.
        kinds: bytes by kind, as `explain_out_of_memory` counts them.
    """
    micro = config.micro_batch_size or 1
    rest = kinds.get("activations and the rest", 0)
    fixed = sum(kinds.values()) - rest
    activations = []
    if micro > 1:
        activations.append(f"micro_batch_size={micro // 2}")
    if config.model.loss_chunk is None:
        activations.append("model.loss_chunk=auto")
    if config.model.activation_checkpointing != "full":
        activations.append("model.activation_checkpointing=full")
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
    options = activations + state if rest >= fixed else state + activations
    return options or ["a shorter seq_len"]
