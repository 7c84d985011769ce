"""The cells of an audit: engines, and what is special in each. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from harness.errors import InputError, closest

Sizes = Literal["even", "uneven", "empty"]
Dtype = Literal["fp32", "bf16", "bf16_pure"]

STEPS = 6
"""Of a cell: enough for what happens every fifth or sixth step (Lookahead, rectified warm-ups)."""
LATE_STEPS = 32
"""Of all cells of an optimizer that changes its rule, or moves at all, only after more than `STEPS` steps."""
MAX_NORM = 0.1
"""Clipping bound of "clipping" cells: below the norm of every step's gradients."""


@dataclass(frozen=True, order=True)
class EngineCell:
    """One engine with one setting.

    Attributes:
        engine: as `optbench train` names it.
        world_size: processes.
        variant: what is special; empty: nothing.
        sizes: of the parameters: "even" ones divide by every world size, "uneven" ones do not, and of "empty"
            ones some ranks hold nothing.
        axis: dimension along which fsdp2 shards matrices.
        accumulation: micro-batches of a step.
        is_clipped: gradients are clipped to `MAX_NORM`.
        dtype: fp32; bf16: bf16 computation over fp32 (master) weights; bf16_pure: bf16 weights.
        splits_work: replicas share the optimizer's work, parameter by parameter.
    """

    engine: str
    world_size: int = 2
    variant: str = ""
    sizes: Sizes = "even"
    axis: int = 0
    accumulation: int = 1
    is_clipped: bool = False
    dtype: Dtype = "fp32"
    splits_work: bool = False

    @property
    def label(self) -> str:
        """Return the engine with its variant."""
        return f"{self.engine} {self.variant}".strip()

    @property
    def is_flat(self) -> bool:
        """Return True if the engine passes flat slices of the parameters to the optimizer."""
        return self.engine in ("zero1", "zero2", "zero3")

    @property
    def is_sharded(self) -> bool:
        """Return True if the engine passes DTensors to the optimizer."""
        return self.engine in ("fsdp2", "hsdp")


CELLS: tuple[EngineCell, ...] = (
    EngineCell("single", 1),
    EngineCell("ddp"),
    EngineCell("ddp", variant="split", splits_work=True),
    EngineCell("ddp", variant="accumulation", accumulation=2),
    EngineCell("ddp", variant="clipping", is_clipped=True),
    EngineCell("ddp", variant="bf16", dtype="bf16_pure"),
    EngineCell("fsdp2"),
    EngineCell("fsdp2", variant="uneven", sizes="uneven"),
    EngineCell("fsdp2", variant="empty", sizes="empty"),
    EngineCell("fsdp2", variant="columns", axis=1),
    EngineCell("fsdp2", variant="accumulation", accumulation=2),
    EngineCell("fsdp2", variant="clipping", is_clipped=True),
    EngineCell("fsdp2", variant="bf16", dtype="bf16"),
    EngineCell("hsdp", 4),
    EngineCell("zero0"),
    EngineCell("zero1"),
    EngineCell("zero1", variant="uneven", sizes="uneven"),
    EngineCell("zero1", variant="bf16", dtype="bf16"),
    EngineCell("zero2"),
    EngineCell("zero2", variant="accumulation", accumulation=2),
    EngineCell("zero2", variant="clipping", is_clipped=True),
    EngineCell("zero3"),
    EngineCell("zero3", variant="uneven", sizes="uneven"),
    EngineCell("zero3", variant="bf16", dtype="bf16"),
)
"""Every cell, in the order of reports."""

ENGINES: tuple[str, ...] = tuple(dict.fromkeys(cell.engine for cell in CELLS))


def select(engines: Iterable[str] = ()) -> list[EngineCell]:
    """Return the cells of some engines.

    Args:
        engines: names of engines (``fsdp2``), each with all its cells; none: all.

    Raises:
        InputError: an engine that there is not.
    """
    names = list(engines)
    for name in names:
        if name not in ENGINES:
            fix = f"--engine {closest(name, ENGINES) or ENGINES[0]}"
            raise InputError("--engine", name, allowed=ENGINES, fix=fix)
    return [cell for cell in CELLS if not names or cell.engine in names]
