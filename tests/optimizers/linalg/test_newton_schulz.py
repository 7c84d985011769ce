"""The polynomial iterations against their scalar theory, SUMO's Lemma 3.2, and torch's own Muon."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from optimizers.linalg import newton_schulz as module
from optimizers.linalg.newton_schulz import (
    JORDAN,
    POLAR_EXPRESS,
    TAYLOR,
    cubic,
    newton_schulz,
    polar_express,
)
from tests.oracles.polar import (
    lemma_bound,
    polar_by_svd,
    polar_express_table,
    scalar_map,
    with_spectrum,
)

CLASSIC = (1.5, -0.5, 0.0)


def deviations(matrix: np.ndarray, factor: torch.Tensor) -> np.ndarray:
    """Singular values of O - polar(M)."""
    return np.linalg.svd(factor.double().numpy() - polar_by_svd(matrix)[0], compute_uv=False)


def test_five_steps_map_the_unit_interval_into_068_114() -> None:
    x = np.geomspace(0.01, 1.0, 200_001)
    y = scalar_map(x, JORDAN, 5)
    assert 0.68 < y.min() < 0.69
    assert y.max() == pytest.approx(1.135, abs=0.005)
    # Negative control: four steps do not carry up what five do.
    x = np.geomspace(0.003, 1.0, 200_001)
    assert scalar_map(x, JORDAN, 5).min() > 0.68
    assert scalar_map(x, JORDAN, 4).min() < 0.45


def test_the_slope_at_zero_is_3_4445_to_the_fifth() -> None:
    tiny = 1e-9
    assert scalar_map(np.array([tiny]), JORDAN, 5)[0] / tiny == pytest.approx(484.9, abs=0.1)
    matrix, _ = with_spectrum([1.0, tiny], 5, 2, seed=0)
    factor = newton_schulz(torch.from_numpy(matrix), dtype=torch.float64)
    assert float(torch.linalg.svdvals(factor)[1]) / tiny == pytest.approx(3.4445**5, rel=1e-6)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (9, 9), (1, 7), (7, 1)])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_matrices_follow_the_scalar_map(shape: tuple[int, int], steps: int) -> None:
    sigma = np.geomspace(1.0, 0.05, min(shape))
    matrix, _ = with_spectrum(sigma, *shape, seed=1)
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    mapped = scalar_map(sigma / np.linalg.norm(sigma), JORDAN, steps)
    factor = newton_schulz(torch.from_numpy(matrix), steps, dtype=torch.float64)
    # fp64 rounding, amplified at most by the slope 485.
    np.testing.assert_allclose(factor.numpy(), (left * mapped) @ right, atol=1e-12)


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (64, 64)])
def test_equals_torch_optim_muon_in_bf16(shape: tuple[int, int]) -> None:
    matrix = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    ours = newton_schulz(matrix, 5)
    for mine, m in zip(ours, matrix):
        theirs = _zeropower_via_newtonschulz(m, JORDAN, 5, 1e-7).float()
        # Same roundings to bf16 in the same places; only the order of the fp32 sums may differ, which flips
        # single
        # roundings (2^-9) that later steps carry on.
        assert float(torch.linalg.matrix_norm(mine - theirs) / torch.linalg.matrix_norm(theirs)) < 1e-2
        wrong = _zeropower_via_newtonschulz(m, JORDAN, 4, 1e-7).float()
        assert float(torch.linalg.matrix_norm(mine - wrong) / torch.linalg.matrix_norm(wrong)) > 3e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_fp32_products_are_half_precision_products(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPUs without bf16 units run fp32 products of rounded numbers: the native route must give the same."""
    matrix = torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(0))
    results = []
    for emulate in (True, False):
        monkeypatch.setattr(module, "_emulates", lambda x, emulate=emulate: emulate)
        results.append(newton_schulz(matrix, 5, dtype=dtype))
    # As above: single roundings of 2^-9 (bf16) differ where sums are ordered differently.
    assert float(torch.linalg.matrix_norm(results[0] - results[1]).max()) < 0.05
    fp32 = newton_schulz(matrix, 5, dtype=torch.float32)
    if dtype == torch.bfloat16:
        # Negative control: not rounding at all is visibly something else.
        assert not torch.equal(results[0], fp32)


@pytest.mark.parametrize("kappa", [1.01, 1.5, 2.0, 3.0, 10.0, 1e2, 1e4])
@pytest.mark.parametrize("steps", [1, 3, 5, 8])
def test_lemma_3_2_holds_for_the_cubic_on_the_spectrally_normed_matrix(kappa: float, steps: int) -> None:
    matrix, _ = with_spectrum(np.geomspace(1.0, 1.0 / kappa, 16), 16, 48, seed=2)
    factor = cubic(torch.from_numpy(matrix), steps, dtype=torch.float64, norm="spectral")
    # 1e-12: rounding where the bound itself is below it.
    assert deviations(matrix, factor).max() <= lemma_bound(kappa, steps) + 1e-12


def test_the_newton_schulz_inverse_meets_the_lemma_with_equality() -> None:
    """s ← 2s - s² on B = AAᵀ/σ1: 1 - s squares at each step (the iteration that the lemma's proof has)."""
    for kappa in (2.0, 10.0, 1e3):
        s = 1.0 / kappa**2
        for steps in range(1, 6):
            s = 2.0 * s - s * s
            residual = 1.0 - s
            assert residual == pytest.approx(lemma_bound(kappa, steps), rel=1e-9, abs=1e-15)


def test_muons_quintic_violates_the_lemma_at_kappa_2() -> None:
    matrix, _ = with_spectrum(np.geomspace(1.0, 0.5, 16), 16, 48, seed=2)
    factor = newton_schulz(torch.from_numpy(matrix), 5, dtype=torch.float64)
    error = np.linalg.norm(deviations(matrix, factor)) / 4.0
    assert lemma_bound(2.0, 5) < 2e-4
    # 0.206 per direction in science notes with another spectrum of the same κ; a factor 1e3 over the bound.
    assert 0.15 < error < 0.3


def test_the_cubic_on_the_frobenius_normed_matrix_violates_it_too() -> None:
    matrix, _ = with_spectrum(np.geomspace(1.0, 0.5, 16), 16, 48, seed=2)
    factor = cubic(torch.from_numpy(matrix), 5, dtype=torch.float64, norm="frobenius")
    assert deviations(matrix, factor).max() > 100 * lemma_bound(2.0, 5)


def test_the_published_polar_express_table_is_the_composed_minimax_one() -> None:
    table = polar_express_table(1e-3, 7, cushion=0.02407327424182761)
    # The last interval is 1 ± 1e-3 wide: Remez loses half the digits there.
    np.testing.assert_allclose(table[:6], POLAR_EXPRESS[:6], rtol=1e-11)
    np.testing.assert_allclose(table[6], POLAR_EXPRESS[6], rtol=1e-5)
    # Negative control: another lower end is another table.
    assert np.abs(polar_express_table(2e-3, 1, 0.0)[0] - POLAR_EXPRESS[0]).max() > 0.1


@pytest.mark.parametrize("steps", [5, 8, 11])
def test_polar_express_follows_its_scalar_map(steps: int) -> None:
    sigma = np.geomspace(1.0, 0.02, 10)
    matrix, _ = with_spectrum(sigma, 10, 25, seed=3)
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    x = sigma / np.linalg.norm(sigma) / 1.01
    for index in range(steps):
        row = np.array(POLAR_EXPRESS[min(index, 7)])
        x = scalar_map(x, row if index >= 7 else row / 1.01 ** np.array([1, 3, 5]), 1)
    factor = polar_express(torch.from_numpy(matrix), steps, dtype=torch.float64)
    np.testing.assert_allclose(factor.numpy(), (left * x) @ right, atol=1e-11)


def test_polar_express_converges_and_jordan_does_not() -> None:
    matrix, _ = with_spectrum(np.geomspace(1.0, 1e-2, 16), 16, 48, seed=4)
    x = torch.from_numpy(matrix)
    assert deviations(matrix, polar_express(x, 10, dtype=torch.float64)).max() < 1e-9
    assert deviations(matrix, newton_schulz(x, 10, dtype=torch.float64)).max() > 0.1
    assert POLAR_EXPRESS[-1] == TAYLOR


@pytest.mark.parametrize("function", [newton_schulz, cubic, polar_express])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shape_dtype_zero_and_nan(function, dtype: torch.dtype) -> None:
    stack = torch.randn(2, 3, 6, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    stack[0, 0] = 0.0
    stack[1, 2, 0, 0] = float("nan")
    before = stack.clone()
    result = function(stack)
    assert result.shape == stack.shape
    assert result.dtype == dtype
    assert not result[0, 0].any()
    assert bool(result[1, 2].isnan().any())
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[1, 2] = False
    assert bool(result[mask].isfinite().all())
    assert torch.equal(stack.nan_to_num(7.0), before.nan_to_num(7.0))


def test_zero_steps_return_a_copy() -> None:
    x = torch.ones(3, 4)
    result = cubic(x, 0, norm="spectral")
    assert result.data_ptr() != x.data_ptr()
    assert float(torch.linalg.matrix_norm(result, ord=2)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: newton_schulz(torch.ones(3)), "(…, m, n)"),
        (lambda: newton_schulz(torch.ones(3, 2), -1), "negative"),
        (lambda: polar_express(torch.ones(3, 2), -1), "negative"),
        (lambda: cubic(torch.ones(3, 2), norm="nuclear"), "'frobenius' or 'spectral'"),
    ],
)
def test_bad_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)


@pytest.mark.parametrize("function", [newton_schulz, cubic, polar_express])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24), (1, 24)])
def test_what_is_not_finite_reaches_every_row_of_its_own_matrix(
    function: Callable[..., torch.Tensor], bad: float, shape: tuple[int, int]
) -> None:
    # `rules.parts` looks at one row only.
    for dtype in (torch.float32, torch.bfloat16):
        for row, column in ((0, 0), (shape[0] - 1, shape[1] // 2)):
            matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
            matrices[1, row, column] = bad
            factors = function(matrices, 1, dtype=dtype)
            assert not torch.isfinite(factors[1]).all(-1).any()
            assert torch.isfinite(factors[[0, 2]]).all()
    # Negative control: without a product an infinite entry stays where it is.
    if math.isinf(bad):
        assert torch.isfinite(function(matrices, 0)[1]).all(-1).sum() == shape[0] - 1
