"""What the dashboards show: sections of panels over the keys of `harness.record.schema`. Knows nothing of W&B.

`workspace` makes W&B's objects of it, `preview` a local page; so both show the same.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["line", "bar", "comparer"]


class Panel(NamedTuple):
    """One chart.

    Attributes:
        title: above it.
        y: metric keys; a bar shows a run's last value of each.
        x: metric key of the horizontal axis of a line.
        log_y: logarithmic vertical axis.
        kind: curves, bars, or the table of what differs between runs.
    """

    title: str
    y: tuple[str, ...] = ()
    x: str = "step"
    log_y: bool = False
    kind: Kind = "line"


class Section(NamedTuple):
    """Panels that answer one question."""

    name: str
    panels: tuple[Panel, ...]


SECTIONS: tuple[Section, ...] = (
    Section(
        "Loss",
        (
            Panel("Validation loss over tokens", ("val/loss",), "tokens"),
            Panel("Validation loss over training seconds", ("val/loss",), "wall_s"),
            Panel("Validation loss over model FLOPs", ("val/loss",), "flops"),
            Panel("Training loss over tokens", ("train/loss",), "tokens"),
            Panel("Validation loss at the last evaluation", ("val/loss",), kind="bar"),
            Panel("Lowest validation loss", ("best_val_loss",), kind="bar"),
        ),
    ),
    Section(
        "Throughput",
        (
            Panel("Tokens per second", ("throughput/tokens_per_s",)),
            Panel("Optimizer, seconds per step", ("time/optimizer_s",)),
            Panel("Forward and backward, seconds per step", ("time/forward_backward_s",)),
            Panel("Communication not hidden, seconds per step", ("time/communication_s",)),
            Panel("Model FLOP/s over the devices' peak", ("throughput/mfu",)),
            Panel("Slowest process over the others", ("balance/ratio",)),
        ),
    ),
    Section(
        "Memory",
        (
            Panel("Peak, bytes", ("memory/peak_bytes",), kind="bar"),
            Panel("Optimizer state, bytes", ("memory/optimizer_state_bytes",), kind="bar"),
            Panel(
                "Weights and gradients, bytes", ("memory/weights_bytes", "memory/gradients_bytes"), kind="bar"
            ),
        ),
    ),
    Section(
        "Moments",
        (
            Panel("Condition number, median over layers", ("moments/condition_number/median",), log_y=True),
            Panel("Condition number, worst layer", ("moments/condition_number/max",), log_y=True),
            Panel("Effective rank, median over layers", ("moments/effective_rank/median",)),
            Panel("Stable rank, median over layers", ("moments/stable_rank/median",)),
            Panel("Orthogonality error, worst layer", ("moments/orthogonality_error/max",), log_y=True),
            Panel("Distance from the polar factor, worst layer", ("moments/polar_error/max",), log_y=True),
        ),
    ),
    Section(
        "Stability",
        (
            Panel("Gradient norm before clipping", ("grad_norm",), log_y=True),
            Panel("Learning rate", ("lr",)),
            Panel("Steps masked because of non-finite gradients", ("skipped_steps",)),
        ),
    ),
    Section("What differs", (Panel("Runs side by side", kind="comparer"),)),
)

COLUMNS = ("val/loss", "best_val_loss", "wall_s", "throughput/tokens_per_s", "memory/peak_bytes")
"""Figures of a run that stand beside its name in W&B's table of runs."""
