"""The reference itself against other people's mathematics, and the measure of errors in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from harness.verify.replay import of_preset, relative_error, replayed, update_error
from optimizers.reference import Muon


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
