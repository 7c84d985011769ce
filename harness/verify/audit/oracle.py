"""The optimizer itself on whole parameters in one process: what an engine must reproduce, and how far rounding reaches.

The reference runs in fp64. Its noise floor is measured: twin runs in the engine's precision, unchanged and with every
gradient moved by one ulp, show how this optimizer amplifies rounding on these very gradients.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness.verify.audit.given_model import GivenModel
from harness.verify.audit.targets import Target
from harness.verify.replay import relative_error

Whole = Mapping[str, Tensor]

SEED = 20
SAFETY = 16
"""Bound of an error over the noise floor of the same parameter in the same step. A twin differs by one rounding of each
gradient; an engine sums the up to n = 768 elements of a parameter in another order, which moves a sum by about
√n/2 = 14 roundings in place of one."""
LOW_SAFETY = 4
"""The same for rules that iterate in bf16 inside, whose twins differ by one rounding to bf16 of each gradient: products
accumulate in fp32 and are rounded once, so that the order of a sum hardly matters, but each of about 15 products may be
rounded in parts: √15 roundings in place of one."""
WATCHED_STEPS = 2
"""Steps whose operations are watched for low precision."""
TWINS = 2
"""Runs whose gradients are moved by one ulp, at random up or down."""
PRECISION_DEPENDS = 1e-2
"""Error of fp32 against fp64 from which the rule itself may depend on the precision (a threshold at `finfo.eps`)."""


def seed(step: int) -> None:
    """Seed Python, numpy and torch, on every rank and in the reference alike, before a step.

    An optimizer that draws random numbers then draws the same wherever it draws in the same order and shapes.
    """
    random.seed(SEED + step)
    np.random.seed(SEED + step)  # noqa: NPY002 (the generator that others draw from)
    torch.manual_seed(SEED + step)


def train(
    target: Target,
    start: Whole,
    gradients: Sequence[Whole],
    dtype: torch.dtype,
) -> list[dict[str, Tensor]]:
    """Train whole parameters in this process on given gradients and return the weights after each step.

    Args:
        target: the optimizer, built anew.
        start: name → weight.
        gradients: of each step, name → gradient; a parameter without one gets none.
        dtype: of weights and gradients.

    Raises:
        Exception: whatever the optimizer raises.
    """
    named, optimizer = _built(target, start, dtype)
    steps = []
    for step, received in enumerate(gradients):
        for name, parameter in named.items():
            parameter.grad = received[name].to(dtype, copy=True) if name in received else None
        seed(step)
        optimizer.step()
        steps.append({name: p.detach().clone() for name, p in named.items() if p.requires_grad})
    return steps


def _built(target: Target, start: Whole, dtype: torch.dtype) -> tuple[dict[str, nn.Parameter], Any]:
    """Return the named parameters of a new model, and a new optimizer over the trainable ones."""
    model = GivenModel(start, dtype)
    named = dict(model.named_parameters())
    for parameter in named.values():
        parameter.requires_grad_(not target.freezes(parameter))
    return named, target.build(list(named.items()), model)


@dataclass(frozen=True)
class Reference:
    """What an engine must reproduce.

    Attributes:
        start: name → weight before the first step.
        steps: name → weight after each step.
        floors: of each step, name → largest error of a twin run.
        bounds: of each step, name → error up to which an engine computes the same.
        dtype: of the reference.
        note: why it is not fp64; empty where it is.
    """

    start: Whole
    steps: list[dict[str, Tensor]]
    floors: list[dict[str, float]]
    bounds: list[dict[str, float]]
    dtype: torch.dtype
    note: str = ""


def reference(
    target: Target, start: Whole, gradients: Sequence[Whole], dtype: torch.dtype = torch.float32
) -> Reference:
    """Return the reference for the gradients that an engine delivered, with its noise floor.

    Args:
        target: the optimizer.
        start: name → weight.
        gradients: of each step, name → whole gradient.
        dtype: in which the engine holds the weights that the optimizer steps.

    Raises:
        Exception: whatever the optimizer raises in ``dtype``.
    """
    seen = observe(target, start, gradients)

    def twins(ulp_of: torch.dtype) -> list[list[dict[str, Tensor]]]:
        moved = (_moved(gradients, ulp_of, number) for number in range(TWINS))
        return [train(target, start, row, dtype) for row in moved]

    same, others = train(target, start, gradients, dtype), twins(dtype)
    low = twins(seen.lowest) if seen.lowest != torch.float32 and dtype == torch.float32 else []

    def made(steps: list[dict[str, Tensor]], of: torch.dtype, note: str = "") -> Reference:
        runs = others if steps is same else [same, *others]
        floors, low_floors = _floors(start, steps, runs), _floors(start, steps, low)
        bounds = [
            _bounds(start, steps[step], floors[step], low_floors[step], step, dtype)
            for step in range(len(steps))
        ]
        joined = [{name: max(a[name], b[name]) for name in a} for a, b in zip(floors, low_floors)]
        return Reference(start, steps, joined, bounds, of, note)

    if dtype != torch.float32:
        return made(same, dtype, "bf16: the weights themselves have this precision")
    if seen.draws:
        return made(same, dtype, "fp32: in fp64 it would draw other random numbers")
    try:
        exact = train(target, start, gradients, torch.float64)
    except Exception as error:
        return made(same, dtype, f"fp32: it does not run in fp64 ({type(error).__name__})")
    gap = max(max(_floors(start, exact, [same])[-1].values()), 0.0)
    noise = max(_floors(start, same, [*others, *low])[-1].values())
    if gap > PRECISION_DEPENDS and gap > 10 * noise:
        return made(
            same,
            dtype,
            f"fp32: the rule depends on the precision (fp64 is {gap:.0e} away, twins {noise:.0e})",
        )
    return made(exact, torch.float64)


@dataclass(frozen=True)
class Observed:
    """What a step does besides its arithmetic.

    Attributes:
        draws: it draws from the generator of torch, numpy or Python.
        lowest: lowest floating-point precision of its tensors, given fp32 weights: some rules iterate in bf16.
    """

    draws: bool
    lowest: torch.dtype


def observe(target: Target, start: Whole, gradients: Sequence[Whole]) -> Observed:
    """Return what the steps of an optimizer do in fp32."""
    named, optimizer = _built(target, start, torch.float32)
    draws, watch = False, _LowestPrecision()
    for step, received in enumerate(gradients):
        for name, parameter in named.items():
            parameter.grad = received[name].clone() if name in received else None
        seed(step)
        before = _generators()
        with watch if step < WATCHED_STEPS else nullcontext():
            optimizer.step()
        draws = draws or _generators() != before
    return Observed(draws, watch.lowest)


class _LowestPrecision(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.lowest = torch.float32

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype in (torch.bfloat16, torch.float16) and result.ndim > 1:
            self.lowest = result.dtype
        return result


def errors(start: Whole, weights: Whole, expected: Whole) -> dict[str, float]:
    """Return name → ‖ΔW - ΔW_ref‖_F/‖ΔW_ref‖_F, in fp64; infinite where only one of both moves."""
    result = {}
    for name, weight in weights.items():
        before = start[name].double()
        result[name] = relative_error(weight.double() - before, expected[name].double() - before)
    return result


def _floors(start: Whole, steps: Sequence[Whole], runs: Sequence[Sequence[Whole]]) -> list[dict[str, float]]:
    """Return of each step name → largest error of a run; zeros without runs."""
    floors: list[dict[str, float]] = []
    for step, expected in enumerate(steps):
        found = [errors(start, run[step], expected) for run in runs]
        floors.append({name: max((error[name] for error in found), default=0.0) for name in expected})
    return floors


def _bounds(
    start: Whole,
    weights: Whole,
    floors: Mapping[str, float],
    low_floors: Mapping[str, float],
    step: int,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Return name → bound of the error after a step.

    Besides the floors, what rounding weights to their own precision does at most: eps/2·‖W‖ in each step.
    """
    bounds = {}
    eps = torch.finfo(dtype).eps
    for name, weight in weights.items():
        moved = float((weight.double() - start[name].double()).norm())
        rounding = (step + 1) * eps / 2 * float(weight.double().norm())
        bounds[name] = max(
            SAFETY * floors[name], LOW_SAFETY * low_floors[name], rounding / moved if moved else 0.0
        )
    return bounds


def _moved(gradients: Sequence[Whole], ulp_of: torch.dtype, number: int) -> list[dict[str, Tensor]]:
    """Move every gradient by one ulp of a precision, up or down; zeros, which no arithmetic moves, stay."""
    generator = torch.Generator().manual_seed(number)
    eps = torch.finfo(ulp_of).eps
    moved = []
    for step in gradients:
        signs = {
            name: torch.rand(g.shape, generator=generator).lt(0.5).float() * 2 - 1 for name, g in step.items()
        }
        moved.append({name: gradient * (1 + eps * signs[name]) for name, gradient in step.items()})
    return moved


def _generators() -> tuple[bytes, object, bytes]:
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    return (
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        repr((numpy_state["state"]["pos"], numpy_state["state"]["key"].tobytes())).encode(),  # pyright: ignore
    )
