"""Replay a rule on unsharded matrices in fp64, with the gradients that an engine delivered."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import optimizers
from harness.loop import set_lr
from harness.schedule import Factor

Weights = Mapping[str, Tensor]
Build = Callable[[list[tuple[str, nn.Parameter]]], Any]


def replayed(
    build: Build,
    start: Weights,
    gradients: Sequence[Weights],
    factor: Factor,
    dtype: torch.dtype = torch.float64,
    trained: Container[str] | None = None,
) -> tuple[Any, dict[str, Tensor]]:
    """Train unsharded copies of the weights on recorded gradients; each step continues from the replay's own weights.

    Args:
        build: builds the optimizer of (name, parameter) pairs.
        start: name → weight that the optimizer under test started from.
        gradients: of each step, name → gradient that it received.
        factor: learning-rate schedule of the run.
        dtype: of weights, gradients and therefore all state.
        trained: names of the weights that are not frozen, which the optimizer gets; None: all.

    Returns:
        The optimizer, and the weights after the last step.
    """
    named = [(name, nn.Parameter(weight.to(dtype, copy=True))) for name, weight in start.items()]
    optimizer = build([(name, p) for name, p in named if trained is None or name in trained])
    for step, received in enumerate(gradients):
        for name, parameter in named:
            parameter.grad = received[name].to(dtype, copy=True) if name in received else None
        set_lr(optimizer, factor(step))
        optimizer.step()
    return optimizer, {name: p.detach() for name, p in named}


def of_preset(name: str, options: Mapping[str, Any]) -> Build:
    """Return a function that builds a preset as the harness did, on one process."""
    return lambda named: optimizers.build(name, named, **options)


def rounding_error(
    build: Build,
    start: Weights,
    gradients: Sequence[Weights],
    factor: Factor,
    reference: Weights,
    seed: int,
    trained: Container[str] | None = None,
) -> float:
    """Return the largest error of a parameter that fp32 makes by itself: without an engine, on whole matrices.

    Args:
        build: as in `replayed`.
        start: as in `replayed`.
        gradients: as in `replayed`.
        factor: as in `replayed`.
        reference: weights after the replay in fp64.
        seed: 0: the gradients as they are; else of signs with which each element is moved by one ulp.
        trained: as in `replayed`.
    """
    generator = torch.Generator().manual_seed(seed)
    moved = [
        {name: _moved(tensor, generator) if seed else tensor for name, tensor in received.items()}
        for received in gradients
    ]
    _, weights = replayed(build, start, moved, factor, torch.float32, trained)
    return update_error(start, weights, reference)[0]


def _moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    up = torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.bool)
    away = torch.where(up, torch.inf, -torch.inf).to(tensor)
    # An element that is zero on purpose stays so: the row of a token that the batch does not hold.
    return torch.where(tensor == 0, tensor, torch.nextafter(tensor, away))


def update_error(start: Weights, end: Weights, reference: Weights) -> tuple[float, str]:
    """Return the largest ‖ΔW - ΔW_ref‖_F / ‖ΔW_ref‖_F of a parameter, in fp64, and the name of that parameter.

    The error of a parameter that moves while the reference does not is infinite.
    """
    worst = 0.0, ""
    for name, before in start.items():
        change = reference[name].double() - before.double()
        error = relative_error(end[name].double() - before.double(), change)
        worst = max(worst, (error, name))
    return worst


def relative_error(tensor: Tensor, reference: Tensor) -> float:
    """Return ‖A - B‖_F / ‖B‖_F in fp64; 0 for two zeros; infinite instead of NaN."""
    size, error = float(reference.double().norm()), float((tensor.double() - reference.double()).norm())
    ratio = error / size if size else (0.0 if error == 0 else float("inf"))
    return ratio if ratio == ratio else float("inf")
