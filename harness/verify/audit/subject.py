"""The optimizer under test in one process: built anew for each run, and fed with given gradients.

Two runs of a `Subject` see the same weights, gradients and random numbers, so what differs between them is what a check
changed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.verify.replay import relative_error

Named = Sequence[tuple[str, nn.Parameter]]
Build = Callable[[Named], torch.optim.Optimizer]
Weights = Mapping[str, Tensor]

MATRICES: dict[str, tuple[int, ...]] = {
    "embed.weight": (24, 8),
    "q.weight": (8, 8),
    "up.weight": (16, 8),
    "down.weight": (8, 16),
}
SHAPES: dict[str, tuple[int, ...]] = {**MATRICES, "norm.weight": (8,), "head.bias": (12,)}
"""Parameters of a small language model: tall, square and wide matrices, and vectors."""
WEIGHT_STD, GRADIENT_STD = 0.1, 0.02
STEPS, MOST_IDLE = 3, 20
"""Steps of a run once all parameters move, and steps within which they should."""
ROUNDING = 1e-5
"""Relative difference of updates that fp32 arithmetic in another order may leave."""


class NotRunnable(Exception):
    """The optimizer does not take a step on any set of parameters that checks use."""


@dataclass
class SubjectRun:
    """One optimizer over its own parameters, between two steps.

    Args:
        named: parameters in the order in which the optimizer got them.
        optimizer: built over ``named``.
        uses_closure: True if a step needs a closure.
        t: steps taken.
        seed_shift: added to the seed of each step.
        start: copies of the initial weights.
        seed_shift: added to the seed of each step.
    """

    named: Named
    optimizer: torch.optim.Optimizer
    uses_closure: bool = False
    t: int = 0
    start: dict[str, Tensor] = field(default_factory=dict)
    seed_shift: int = 0

    def __post_init__(self) -> None:
        self.start = self.weights()

    def weights(self) -> dict[str, Tensor]:
        """Return copies of the weights by name."""
        return {name: p.detach().clone() for name, p in self.named}

    def give(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Set the gradients of this step; a parameter that is not named gets none."""
        for name, p in self.named:
            gradient = gradients.get(name)
            p.grad = None if gradient is None else gradient.to(p.dtype).clone()

    def take(self) -> Any:
        """Step with the gradients that are set and return what the optimizer returns."""
        seed(self.t + self.seed_shift)
        self.t += 1
        # torch's stub wants a float of the closure; losses are tensors.
        step: Callable[..., Any] = self.optimizer.step
        if not self.uses_closure:
            return step()
        kept = [p.grad for _, p in self.named]

        def closure() -> Tensor:
            for (_, p), gradient in zip(self.named, kept, strict=True):
                p.grad = None if gradient is None else gradient.clone()
            return torch.zeros(())

        return step(closure)

    def step(self, gradients: Mapping[str, Tensor | None] | None = None) -> Any:
        """Step with these gradients, or with the step's own ones."""
        self.give(gradients_of(self.t, self.named) if gradients is None else gradients)
        return self.take()


class Subject:
    """An optimizer that checks build again and again.

    Args:
        build: returns the optimizer over named parameters; called once per run.

    Raises:
        NotRunnable: it takes no step on the parameters of a small model, nor on its matrices alone.
    """

    def __init__(self, build: Build) -> None:
        self._build = build
        self.shapes, self.uses_closure = self._accepted()

    def _accepted(self) -> tuple[dict[str, tuple[int, ...]], bool]:
        """Return the shapes on which the optimizer steps, and whether it needs a closure."""
        first: Exception | None = None
        for shapes in (SHAPES, MATRICES):
            for uses_closure in (False, True):
                try:
                    run = self._start(shapes, uses_closure)
                    run.step()
                except Exception as error:
                    first = first or error
                    continue
                if finite(run.weights()):
                    return shapes, uses_closure
                first = first or NotRunnable("the first step leaves weights that are not finite")
        raise NotRunnable(f"no step was possible: {describe(first)}") from first

    @cached_property
    def steps(self) -> int:
        """Steps of a run that show what an optimizer does: `STEPS` after the last parameter has begun to move.

        Some rules only gather gradients in their first steps.
        """
        run = self.start()
        for idle in range(MOST_IDLE):
            run.step()
            if all(moved(run, name) for name, _ in run.named):
                return STEPS + idle
        return STEPS

    @cached_property
    def draws(self) -> bool:
        """True if the steps draw random numbers."""

        def shift(run: SubjectRun) -> None:
            run.seed_shift = 1000

        plain, other = self.after(self.steps), self.after(self.steps, shift)
        return difference(other, plain)[0] > 0

    @cached_property
    def rounding(self) -> float:
        """Relative difference that rounding may leave: 10 times what one ulp in the gradients does, or `ROUNDING`."""
        plain, nudged = self.after(self.steps), self.start()
        for step in range(self.steps):
            gradients = gradients_of(step, nudged.named)
            nudged.step({name: g * (1 + torch.finfo(g.dtype).eps) for name, g in gradients.items()})
        return max(ROUNDING, 10 * difference(nudged, plain)[0])

    def start(
        self,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        order: Callable[[list[str]], list[str]] = list,
        weight_std: float = WEIGHT_STD,
    ) -> SubjectRun:
        """Build the optimizer over new parameters.

        Args:
            shapes: name → shape; by default those of the small model.
            dtype: of the parameters.
            order: reorders the names in which the optimizer gets the parameters.
            weight_std: of the normal distribution of the weights.
        """
        return self._start(shapes or self.shapes, self.uses_closure, dtype, order, weight_std)

    def _start(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        uses_closure: bool,
        dtype: torch.dtype = torch.float32,
        order: Callable[[list[str]], list[str]] = list,
        weight_std: float = WEIGHT_STD,
    ) -> SubjectRun:
        parameters = {name: parameter(name, shape, dtype, weight_std) for name, shape in shapes.items()}
        return self.over([(name, parameters[name]) for name in order(list(parameters))], uses_closure)

    def over(self, named: Named, uses_closure: bool | None = None) -> SubjectRun:
        """Build the optimizer over given parameters."""
        seed(0)
        closure = self.uses_closure if uses_closure is None else uses_closure
        return SubjectRun(named, self._build(named), closure)

    def after(
        self, steps: int, change: Callable[[SubjectRun], object] = lambda run: None, **options: Any
    ) -> SubjectRun:
        """Return a run after ``steps`` steps; ``change`` is called with it before the first."""
        run = self.start(**options)
        change(run)
        for _ in range(steps):
            run.step()
        return run


def parameter(
    name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, std: float = WEIGHT_STD
) -> nn.Parameter:
    """Return a normally distributed parameter that depends on its name and shape alone."""
    return nn.Parameter((_normal(f"weight of {name}", shape) * std).to(dtype))


def gradients_of(step: int, named: Named) -> dict[str, Tensor]:
    """Return the gradients of a step: normally distributed, a function of step, name and shape."""
    return {name: gradient_of(step, name, tuple(p.shape)) for name, p in named}


def gradient_of(step: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the fp32 gradient of one parameter at a step."""
    return _normal(f"gradient of {name} at {step}", shape) * GRADIENT_STD


def _normal(key: str, shape: tuple[int, ...]) -> Tensor:
    # Not `hash`: it differs from process to process.
    number = int.from_bytes(key.encode(), "little") % (2**63 - 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def seed(number: int) -> None:
    """Seed the generators that an optimizer may draw from."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 - the legacy generator is what optimizers draw from


def finite(weights: Weights) -> bool:
    """Return True if all weights are finite."""
    return all(bool(w.isfinite().all()) for w in weights.values())


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (path, tensor) of the tensors in nested mappings and sequences."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from tensors(item, f"{path}.{place}" if path else str(place))


def difference(
    run: SubjectRun, reference: SubjectRun, names: Sequence[str] | None = None
) -> tuple[float, str]:
    """Return the largest ‖ΔW - ΔW_ref‖_F / ‖ΔW_ref‖_F that rounding does not explain, and its parameter.

    A difference up to 16 ulp of the weights themselves counts as 0, whatever the size of the update.
    """
    worst = 0.0, ""
    own, other = run.weights(), reference.weights()
    for name in names if names is not None else reference.start:
        before = reference.start[name].double()
        change, expected = own[name].double() - before, other[name].double() - before
        if float((change - expected).norm()) <= 16 * torch.finfo(own[name].dtype).eps * float(before.norm()):
            continue
        worst = max(worst, (relative_error(change, expected), name))
    return worst


def moved(run: SubjectRun, name: str, since: Weights | None = None) -> float:
    """Return ‖ΔW‖_F of one parameter since the start of the run, or since given weights."""
    now = dict(run.named)[name].detach()
    return float((now.double() - (since or run.start)[name].double()).norm())


def describe(error: BaseException | None) -> str:
    """Return type and message of an exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def set_option(run: SubjectRun, key: str, value: Any) -> bool:
    """Set an option in all parameter groups that have it; return False if none has it."""
    found = False
    for group in run.optimizer.param_groups:
        if key in group:
            group[key], found = value, True
    return found
