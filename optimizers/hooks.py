"""What acts on weights around their rule, in this order:

    gradient → rule → size of the update → decay → apply  →  norms of the weights → average of the weights

Up to `apply` it is a part of the rule's phases (`optimizers.update_size`) or element-wise (`layouts.apply`). What
follows is a `StepHook` each, which acts on all weights of a unit at once, before and after its buckets. One that is
off costs a look at the options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from optimizers.interfaces import MatrixRef
from optimizers.layouts.layout import Layout, StepUnit
from optimizers.skipping import StepMask


@dataclass(frozen=True)
class UnitParts:
    """What a hook acts on.

    Attributes:
        unit: that is stepped.
        options: of its group.
        layout: how its parameters are distributed.
        state: the optimizer's, parameter → key → value.
        parameters: of the unit.
        find_matrices: what `matrices` calls: under AdamW they are made for hooks alone.
    """

    unit: StepUnit
    options: Mapping[str, Any]
    layout: Layout
    state: Mapping[Tensor, dict[str, Any]]
    parameters: Sequence[Tensor]
    find_matrices: Callable[[], Sequence[MatrixRef]]

    @property
    def matrices(self) -> Sequence[MatrixRef]:
        """Return the hidden matrices in the parameters, also under AdamW."""
        return self.find_matrices()


class StepHook(Protocol):
    """What acts on a unit's weights before and after its rule.

    All processes call the methods with the same units in the same order, so they may be collectives. Nothing in them
    waits for the device, and a masked step leaves no trace.
    """

    def allocate(self, parts: UnitParts) -> None:
        """Add what is missing of this hook's state."""
        ...

    def before(self, parts: UnitParts, mask: StepMask) -> None:
        """Look at the weights before the step."""
        ...

    def after(self, parts: UnitParts, stepped: Sequence[Tensor], mask: StepMask) -> None:
        """Change the weights, or take note of them, after the step.

        Args:
            parts: of the unit.
            stepped: its parameters that took a step, as far as the host knows; their "step" counts it not yet.
            mask: what skips the step.
        """
        ...


def masks_of(
    matrices: Sequence[MatrixRef], stepped: Sequence[Tensor], mask: StepMask, device: torch.device
) -> Tensor | None:
    """Return (k,) bool: True where a step leaves no trace in a matrix; None where it does in all of them."""
    moved = {id(parameter) for parameter in stepped}
    # AdamW skips whole parameters, by a key without prefix.
    known = [
        id(m.parameter) not in moved or m.unit in mask.units or (id(m.parameter), "") in mask.units
        for m in matrices
    ]
    masked = mask.tensor([m.unit for m in matrices], device)
    if not any(known):
        return masked
    result = torch.tensor(known).to(device, non_blocking=True)
    return result if masked is None else result | masked
