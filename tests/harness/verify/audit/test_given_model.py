"""The gradients of an audit: their mean is exact in any order and precision; the model's gradient is what is given."""

from __future__ import annotations

import pytest
import torch

from harness.verify.audit.cells import LATE_STEPS, MAX_NORM, Sizes
from harness.verify.audit.given_model import SHAPES, Given, GivenModel, given, share


@pytest.mark.parametrize("sizes", list(SHAPES))
@pytest.mark.parametrize("is_coarse", [False, True])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_the_mean_over_processes_is_exact(sizes: Sizes, is_coarse: bool, parts: int) -> None:
    data = given(sizes, is_coarse=is_coarse, steps=2)
    dtype = torch.bfloat16 if is_coarse else torch.float32
    for step in range(2):
        shares = [share(data, step, part, parts) for part in range(parts)]
        for name, mean in data.gradients[step].items():
            pieces = [one[name].to(dtype) for one in shares]
            assert all(torch.equal(piece.float(), one[name]) for piece, one in zip(pieces, shares))
            assert not torch.equal(pieces[0], pieces[1])
            pairs = torch.stack(pieces[:2]).sum(0, dtype=dtype)
            assert torch.equal(pairs.float() / 2, mean)
            assert torch.equal(torch.stack(pieces).float().sum(0) / parts, mean)


def test_the_models_gradient_is_what_is_given() -> None:
    data = given("even", steps=1)
    model = GivenModel(data.start)
    model(data.gradients[0]).backward()
    assert {name for name, _ in model.named_parameters()} == set(SHAPES["even"])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, data.start[name])
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, data.gradients[0][name])


def test_clipping_bites_in_every_step() -> None:
    for sizes in SHAPES:
        assert min(map(_norm, _steps(given(sizes, steps=LATE_STEPS)))) > MAX_NORM


def _steps(data: Given) -> list[torch.Tensor]:
    return [torch.cat([g.flatten() for g in row.values()]) for row in data.gradients]


def _norm(gradient: torch.Tensor) -> float:
    return float(gradient.norm())
