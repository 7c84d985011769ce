"""What the harness asks of an optimizer beyond torch's interface, and the adapter that answers for any other one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import optimizers
from optimizers import Route


class TrackedOptimizer(Protocol):
    """An optimizer whose routes, state, diagnostics and skipped steps the harness can follow."""

    @property
    def reads_found_inf(self) -> bool:
        """True if ``step`` reads the optimizer's ``found_inf`` on the device, so that the host need not wait for it."""
        ...

    @property
    def observes_moments(self) -> bool:
        """True if ``moment_figures`` returns figures after ``observe_moments``."""
        ...

    @property
    def routes(self) -> Sequence[Route]:
        """Return the route of each trained parameter; empty if all parameters take the optimizer's one rule."""
        ...

    @property
    def figures_are_divided(self) -> bool:
        """True where the processes have the ``moment_figures`` of different matrices."""
        ...

    @property
    def fallbacks(self) -> Tensor | int:
        """Factorizations that needed a fallback, since construction."""
        ...

    def add_fallbacks(self, count: int) -> None:
        """Add the fallbacks of an earlier process that this one resumes."""
        ...

    def retract_step(self) -> None:
        """Take back the host's counters of the last step, which ``found_inf`` masked on the device."""
        ...

    def observe_moments(
        self, on: bool = True, around: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        """Let the next step compute ``moment_figures``, each time inside a context of ``around``."""
        ...

    def moment_figures(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return matrix name → figure → 0-dim tensor, of the last observed step."""
        ...

    def observation_seconds(self) -> float:
        """Return the seconds that ``moment_figures`` cost the last observed step."""
        ...

    @property
    def keeps_average(self) -> bool:
        """True if ``averaged_weights`` has an average of the weights to put in their place."""
        ...

    def averaged_weights(self) -> AbstractContextManager[object]:
        """Put the averages in the place of the weights inside the context."""
        ...

    def state_bytes(self) -> dict[str, int]:
        """Return kind → bytes of this process' state tensors."""
        ...

    def bytes_sent(self) -> dict[str, float]:
        """Return kind of collective → bytes that this process sent for the optimizer since construction."""
        ...

    def collective_calls(self) -> int:
        """Return how many collectives this process issued for the optimizer since construction."""
        ...


class ForeignOptimizer:
    """Adapt any ``torch.optim.Optimizer`` to `TrackedOptimizer`: no routes, no figures, state by its own keys.

    Args:
        optimizer: stays what the engine steps.
    """

    observes_moments = False
    keeps_average = False
    routes: Sequence[Route] = ()
    figures_are_divided = False
    fallbacks = 0

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    @property
    def reads_found_inf(self) -> bool:
        """True for torch's fused optimizers and others that follow torch's AMP protocol."""
        follows_amp = getattr(self._optimizer, "_step_supports_amp_scaling", False)
        return bool(follows_amp) or hasattr(self._optimizer, "found_inf")

    def add_fallbacks(self, count: int) -> None:
        """Ignore them: nothing is factorized here."""

    def retract_step(self) -> None:
        """Call the wrapped optimizer's own ``retract_step`` if it has one: torch's counters are on the device."""
        retract = getattr(self._optimizer, "retract_step", None)
        if retract is not None:
            retract()

    def observe_moments(
        self, on: bool = True, around: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        """Do nothing: which tensors are moments is not known."""

    def moment_figures(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return no figures: the optimizer reports no moments."""
        return {}

    def observation_seconds(self) -> float:
        """Return 0: nothing was observed."""
        return 0.0

    def averaged_weights(self) -> AbstractContextManager[object]:
        """Do nothing: there is no average."""
        return nullcontext()

    def state_bytes(self) -> dict[str, int]:
        """Return state key → bytes of this process' tensors under it."""
        kinds: dict[str, int] = {}
        for state in self._optimizer.state.values():
            for key, value in state.items():
                for tensor in _tensors(value):
                    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                    kinds[str(key)] = kinds.get(str(key), 0) + local.numel() * local.element_size()
        return kinds

    def bytes_sent(self) -> dict[str, float]:
        """Return nothing: its collectives, if any, are not counted."""
        return {}

    def collective_calls(self) -> int:
        """Return 0: the optimizer's collectives are not counted."""
        return 0


def tracked(optimizer: torch.optim.Optimizer) -> TrackedOptimizer:
    """Return an optimizer of `optimizers` as it is, and any other one behind its adapter."""
    return optimizer if isinstance(optimizer, optimizers.Optimizer) else ForeignOptimizer(optimizer)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
