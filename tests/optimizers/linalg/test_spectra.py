"""Figures of spectra and factors, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optimizers.linalg.polar import polar
from optimizers.linalg.spectra import figures, orthogonality_error, polar_error
from tests.oracles.polar import haar, with_spectrum


def test_closed_form_figures() -> None:
    values = torch.tensor([[4.0, 2.0, 1.0], [1.0, 1e-3, 1e-9], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    result = figures(values, (10, 3))
    # Cut: 10·1.2e-7 of σ1.
    assert result.effective_rank.tolist() == [3, 2, 1, 0]
    np.testing.assert_allclose(result.condition_number[:3].numpy(), [4.0, 1e3, 1.0], rtol=1e-6)
    assert bool(result.condition_number[3].isnan())
    np.testing.assert_allclose(result.stable_rank.numpy(), [21 / 16, 1 + 1e-6, 1.0, 0.0], rtol=1e-6)


def test_the_cut_may_be_given() -> None:
    result = figures(torch.tensor([1.0, 0.1, 0.01]), (5, 3), rtol=0.05)
    assert int(result.effective_rank) == 2
    assert float(result.condition_number) == pytest.approx(10.0, rel=1e-6)


def test_a_spectrum_that_is_not_finite_says_so() -> None:
    result = figures(polar(torch.full((4, 3), float("nan")), "gram").singular_values, (4, 3))  # type: ignore[arg-type]
    assert bool(result.condition_number.isnan())
    assert int(result.effective_rank) == 0


@pytest.mark.parametrize("method", ["svd", "qr_svd", "gram"])
def test_figures_of_a_known_matrix(method: str) -> None:
    sigma = np.concatenate([np.geomspace(1.0, 1e-3, 12), np.zeros(4)])
    matrix = torch.from_numpy(with_spectrum(sigma, 16, 50, 0)[0]).float()
    values = polar(matrix, method).singular_values
    assert values is not None
    result = figures(values, matrix.shape, matrix.dtype)
    assert int(result.effective_rank) == 12
    # σ = 1e-3 in fp32 with absolute errors of some eps: 1e-3 relative.
    assert float(result.condition_number) == pytest.approx(1e3, rel=1e-3)
    assert float(result.stable_rank) == pytest.approx(float((sigma**2).sum()), rel=1e-5)


@pytest.mark.parametrize("shape", [(30, 8), (8, 30), (8, 8)])
def test_errors_in_closed_form(shape: tuple[int, int]) -> None:
    matrix, exact = with_spectrum(np.geomspace(1.0, 0.1, 8), *shape, seed=1)
    m, o = torch.from_numpy(matrix), torch.from_numpy(exact)
    assert float(orthogonality_error(o)) < 1e-14
    assert float(polar_error(o, m)) < 1e-13
    # Scaled by 1 + δ: OOᵀ - I = (2δ + δ²)I and O - O* = δO*.
    assert float(orthogonality_error(1.1 * o)) == pytest.approx(0.21, rel=1e-9)
    assert float(polar_error(1.1 * o, m)) == pytest.approx(0.1, rel=1e-9)
    # Turned by an orthogonal matrix: perfectly orthogonal, far from the factor.
    q = torch.from_numpy(haar(shape[0], shape[0], np.random.default_rng(0)))
    assert float(orthogonality_error(q @ o)) < 1e-13
    assert float(polar_error(q @ o, m)) > 0.5


def test_dropped_directions_show_as_their_share() -> None:
    matrix = torch.from_numpy(with_spectrum([1.0] * 6 + [0.0] * 2, 20, 8, seed=2)[0]).float()
    factor = polar(matrix).factor
    assert float(orthogonality_error(factor)) == pytest.approx((2 / 8) ** 0.5, rel=1e-5)
    assert float(polar_error(factor, matrix)) < 1e-6


def test_stacks_keep_their_shape() -> None:
    stack = torch.randn(2, 3, 9, 5, generator=torch.Generator().manual_seed(0))
    factor = polar(stack).factor
    assert orthogonality_error(factor).shape == (2, 3)
    assert polar_error(factor, stack).shape == (2, 3)
    assert figures(torch.rand(2, 3, 5).sort(-1, descending=True).values, (9, 5)).stable_rank.shape == (2, 3)
