"""The reference itself against other people's mathematics, and the measure of errors in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.verify.replay import of_preset, relative_error, replayed, rounding_error, update_error
from optimizers.reference import Muon

Named = list[tuple[str, nn.Parameter]]


def test_a_replay_is_the_oracle_on_the_recorded_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    start = {"layers.0.w": torch.randn(24, 16, generator=generator), "norm.weight": torch.ones(16)}
    gradients = [
        {name: torch.randn(w.shape, generator=generator) for name, w in start.items()} for _ in range(4)
    ]
    options = {"lr": 0.1, "orthogonalizer_dtype": "float32"}
    _, found = replayed(of_preset("muon", options), start, gradients, lambda step: 1.0 - 0.2 * step)
    oracle = Muon(start["layers.0.w"].double().numpy(), lr=0.1)
    for step, gradient in enumerate(gradients):
        oracle.lr = 0.1 * (1.0 - 0.2 * step)
        oracle.step(gradient["layers.0.w"].double().numpy())
    # Both in fp64: rounding of some hundred products.
    np.testing.assert_allclose(found["layers.0.w"].numpy(), oracle.weight, rtol=0, atol=1e-12)
    assert found["layers.0.w"].dtype == torch.float64
    assert torch.equal(start["norm.weight"], torch.ones(16)), "the recorded weights are not stepped"


def test_frozen_weights_stay_and_are_no_part_of_the_optimizer() -> None:
    start = {"layers.0.w": torch.ones(4, 4), "layers.1.w": torch.ones(4, 4)}
    gradients = [{"layers.1.w": torch.eye(4)}]
    optimizer, found = replayed(
        of_preset("muon", {"lr": 0.1, "weight_decay": 0.5}),
        start,
        gradients,
        lambda step: 1.0,
        trained={"layers.1.w"},
    )
    assert [route.name for route in optimizer.routes] == ["layers.1.w"]
    assert torch.equal(found["layers.0.w"], start["layers.0.w"].double())
    assert not torch.equal(found["layers.1.w"], start["layers.1.w"].double())


def test_errors_are_of_the_change_not_of_the_weight() -> None:
    start = {"a": torch.full((3,), 100.0), "b": torch.zeros(2)}
    reference = {"a": start["a"] + torch.tensor([3.0, 4.0, 0.0]), "b": torch.tensor([1.0, 0.0])}
    end = {"a": reference["a"] + torch.tensor([0.0, 0.0, 0.5]), "b": torch.tensor([1.0, 0.01])}
    error, name = update_error(start, end, reference)
    assert (name, error) == ("a", pytest.approx(0.1))


def test_what_is_no_number_is_infinitely_wrong() -> None:
    zero = torch.zeros(2)
    assert relative_error(zero, zero) == 0.0
    assert relative_error(torch.tensor([1.0, 0.0]), zero) == math.inf
    assert relative_error(torch.tensor([math.nan, 0.0]), torch.ones(2)) == math.inf
    assert relative_error(torch.ones(2), torch.tensor([math.nan, 0.0])) == math.inf


class Mapped(torch.optim.Optimizer):
    """Add a function of the gradient."""

    def __init__(self, named: Named, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__([p for _, p in named], {"lr": 1.0})
        self.change = change

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            p.add_(self.change(p.grad))


def floors(change: Callable[[Tensor], Tensor], gradient: Tensor) -> list[float]:
    """Return the rounding of one step, of the gradient as it is and of three that are moved."""
    start, gradients = {"w": torch.zeros_like(gradient)}, [{"w": gradient}]

    def build(named: Named) -> Mapped:
        return Mapped(named, change)

    _, exact = replayed(build, start, gradients, lambda step: 1.0)
    return [rounding_error(build, start, gradients, lambda step: 1.0, exact, seed) for seed in range(4)]


def test_rounding_is_what_a_rule_makes_of_fp32_and_of_one_ulp() -> None:
    as_it_is, *moved = floors(lambda g: 1 / (g - 1), torch.tensor([1 + 2.0**-10]))
    assert as_it_is == 0.0, "1 / 2⁻¹⁰ is exact in fp32"
    # One ulp of the gradient is 2⁻²³, and 2⁻¹³ of 2⁻¹⁰.
    assert moved == pytest.approx([2.0**-13] * 3, rel=1e-3)


def test_gradients_that_are_zero_are_not_moved() -> None:
    # The sign of the smallest number would be a whole step.
    assert floors(torch.sign, torch.tensor([0.0, 1.0, -3.0])) == [0.0] * 4
