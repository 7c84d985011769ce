"""What a process holds of a run's weights and optimizer state, in terms of names and intervals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import optimizers
from harness.checkpoint import plugin_state
from harness.checkpoint.files import Saved
from harness.loop import Run
from optimizers import named_state
from optimizers.layouts.layout import Layout
from optimizers.named_state import StatePiece, parameter_shape

WEIGHT = "weight"
"""Kind of a parameter's own numbers (fp32 masters under ZeRO)."""


def parameter_layout(run: Run) -> Layout:
    """How the trainable parameters lie on the processes: as the optimizer knows it, or, of a plug-in, the engine."""
    if isinstance(run.optimizer, optimizers.Optimizer):
        return run.optimizer.layout
    return run.engine.parameter_layout()


def weights(run: Run) -> Iterator[StatePiece]:
    """This process' part of every trainable parameter: views."""
    layout = parameter_layout(run)
    for name, parameter in run.engine.named_parameters().items():
        dim, start = layout.interval(parameter)
        shape = tuple(parameter_shape(parameter))
        is_primary = layout.is_first_replica or dim == named_state.FLAT
        yield StatePiece(name, WEIGHT, shape, dim, start, layout.weight(parameter), is_primary)


def state(run: Run) -> Iterator[StatePiece]:
    """This process' part of every tensor of the optimizer's state: views."""
    if isinstance(run.optimizer, optimizers.Optimizer):
        return named_state.pieces(run.optimizer)
    return plugin_state.pieces(run.optimizer, run.engine.named_parameters(), parameter_layout(run))


def bookkeeping(run: Run) -> dict[str, Any]:
    """What the optimizer has beside tensors, the same on every process: JSON."""
    if isinstance(run.optimizer, optimizers.Optimizer):
        return {"steps": run.optimizer.steps_by_name()}
    return plugin_state.bookkeeping(run.optimizer, run.engine.named_parameters(), parameter_layout(run))


def load(run: Run, saved: Saved) -> None:
    """Overwrite weights and optimizer state (a collective).

    Raises:
        DamagedCheckpoint: something is missing, or has another shape.
    """
    for part in weights(run):
        part.tensor.copy_(saved.read(part))
    run.engine.weights_were_replaced()
    kept = saved.facts[0]["optimizer"]
    if isinstance(run.optimizer, optimizers.Optimizer):
        named_state.load(run.optimizer, kept["steps"], saved.read)
    else:
        plugin_state.load(run.optimizer, run.engine.named_parameters(), parameter_layout(run), kept, saved)
