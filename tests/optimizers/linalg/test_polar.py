"""Exact polar factors against fp64 oracles: accuracy over κ, the cut, degenerate shapes, algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizers.linalg.polar import EXACT, METHODS, polar
from optimizers.linalg.robust import choose_method, default_rtol
from tests.oracles.polar import haar, polar_by_scipy, polar_by_svd, with_spectrum

SHAPES = [(96, 24), (24, 96), (40, 40), (1, 17), (17, 1), (1, 1)]
EPS = float(np.finfo(np.float32).eps)


def tensor(array: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)


def error(factor: torch.Tensor, exact: np.ndarray) -> float:
    return float(np.linalg.norm(factor.double().numpy() - exact)) / min(exact.shape) ** 0.5


def spectrum(kappa: float, count: int, cut: float) -> np.ndarray:
    """Log-uniform from 1 to 1/κ; nothing within 20 % of the cut, where the rank is a matter of rounding."""
    values = np.geomspace(1.0, 1.0 / kappa, count)
    near = (values > 0.8 * cut) & (values < 1.25 * cut)
    return np.where(near, 1.5 * cut, values)


@pytest.mark.parametrize("kappa", [1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8])
@pytest.mark.parametrize("shape", [(96, 24), (24, 96), (40, 40)])
@pytest.mark.parametrize("method", EXACT)
def test_exact_methods_match_the_fp64_svd_above_the_cut(
    method: str, shape: tuple[int, int], kappa: float
) -> None:
    m, n = shape
    cut = default_rtol(shape, torch.float32)
    matrix = tensor(with_spectrum(spectrum(kappa, min(m, n), cut), m, n, seed=3)[0])
    exact, rank = polar_by_svd(matrix.double().numpy(), cut)
    result = polar(matrix, method)
    assert result.effective_rank is not None
    assert int(result.effective_rank) == rank
    # First-order theory: an error of eps·‖M‖ in M moves O by up to eps·κ above the cut; LAPACK's constant for
    # these sizes stays below 8.
    assert error(result.factor, exact) <= 8 * EPS * min(kappa, 1 / cut) + 1e-6
    if result.singular_values is not None:
        reference = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        # fp32 SVD: absolute error of a few eps·σ1; a Gram reads σ below 1e-7 σ1 as noise of that size.
        np.testing.assert_allclose(result.singular_values.numpy(), reference, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("kappa", [1e1, 1e3, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("shape", [(96, 24), (24, 128), (48, 48), (6, 5)])
def test_auto_is_never_worse_than_the_fp32_svd(shape: tuple[int, int], kappa: float) -> None:
    m, n = shape
    cut = default_rtol(shape, torch.float32)
    for seed in range(3):
        matrix = tensor(with_spectrum(spectrum(kappa, min(m, n), cut), m, n, seed)[0])
        exact, _ = polar_by_svd(matrix.double().numpy(), cut)
        ours, theirs = error(polar(matrix).factor, exact), error(polar(matrix, "svd").factor, exact)
        # 4 eps: where both are at rounding level, which is smaller is chance.
        assert ours <= max(theirs, 4 * EPS)


@pytest.mark.parametrize("method", ["qr_svd", "gram", "dwh"])
def test_a_lower_cut_reaches_kappa_1e8(method: str) -> None:
    sigma = np.geomspace(1.0, 1e-8, 24)
    matrix = with_spectrum(sigma, 96, 24, seed=5)[0]
    exact, rank = polar_by_svd(tensor(matrix).double().numpy(), 1e-12)
    result = polar(tensor(matrix), method, rtol=1e-12)
    # The Gram methods hand the matrix to QR-SVD in fp64: eps64·1e8 is far below the rounding to fp32.
    assert error(result.factor, exact) < 1e-6
    assert result.effective_rank is not None
    assert int(result.effective_rank) == rank == 24
    assert int(result.fallbacks) == (0 if method == "qr_svd" else 1)


@pytest.mark.parametrize("method", [*EXACT, "auto"])
def test_fp64_input_is_factorized_in_fp64(method: str) -> None:
    matrix, exact = with_spectrum(np.geomspace(1.0, 1e-3, 12), 30, 12, seed=1)
    result = polar(tensor(matrix, torch.float64), method)
    assert result.factor.dtype == torch.float64
    # A Gram in fp64 loses κ² = 1e6 of 2e-16, the SVD routes κ.
    assert error(result.factor, exact) < (1e-9 if method in ("gram", "dwh") else 1e-12)


def test_fp64_squares_do_not_overflow() -> None:
    matrix, exact = with_spectrum([3.0, 2.0, 1.0], 7, 3, seed=2)
    for scale in (1e200, 1e-200):
        for method in EXACT:
            result = polar(tensor(matrix * scale, torch.float64), method)
            # The Halley steps of "dwh" end at 1e-10, far below the rounding of fp32 factors.
            assert error(result.factor, exact) < (1e-10 if method == "dwh" else 1e-12)
            if result.singular_values is not None:
                np.testing.assert_allclose(result.singular_values.numpy() / scale, [3, 2, 1], rtol=1e-12)


@pytest.mark.parametrize("shape", [(20, 8), (8, 20), (9, 9)])
@pytest.mark.parametrize("method", EXACT)
def test_agrees_with_scipy_linalg_polar(method: str, shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    # A Gaussian 9×9 has κ of some tens: 1e-5 leaves two digits.
    assert (
        error(polar(torch.from_numpy(matrix), method).factor, polar_by_scipy(matrix.astype(np.float64)))
        < 1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_worked_in_fp32(method: str, dtype: torch.dtype) -> None:
    matrix = torch.randn(3, 12, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    result, wide = polar(matrix, method), polar(matrix.float(), method)
    assert result.factor.dtype == dtype
    assert torch.equal(result.factor, wide.factor.to(dtype))
    if result.singular_values is not None:
        assert result.singular_values.dtype == torch.float32


@pytest.mark.parametrize("method", [*EXACT, "auto"])
def test_directions_below_the_cut_are_dropped(method: str) -> None:
    sigma = np.zeros(20)
    sigma[:7] = np.geomspace(1, 0.1, 7)
    # Also as fp32 rounding leaves them: σ at 1e-8 of σ1 instead of zero.
    for matrix in (with_spectrum(sigma, 64, 20, 6)[0], with_spectrum(sigma + 1e-8, 20, 64, 6)[0]):
        result = polar(tensor(matrix), method)
        assert result.effective_rank is not None
        assert int(result.effective_rank) == 7
        # ‖O‖_F² is a sum of 7 squares of numbers that are 1 up to rounding.
        assert float(result.factor.double().square().sum()) == pytest.approx(7, abs=1e-5)
        assert error(result.factor, polar_by_svd(matrix, 1e-5)[0]) < 1e-5


def test_without_a_cut_the_noise_would_be_promoted() -> None:
    """Negative control: the thin SVD without a cut gives rounding noise full weight."""
    sigma = np.zeros(20)
    sigma[:7] = np.geomspace(1, 0.1, 7)
    matrix = tensor(with_spectrum(sigma, 64, 20, 6)[0])
    assert float(polar(matrix, "svd", rtol=0.0).factor.square().sum()) > 19.9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 6), (6, 1)])
def test_a_zero_matrix_has_a_zero_factor(method: str, shape: tuple[int, int]) -> None:
    result = polar(torch.zeros(2, *shape), method)
    assert torch.equal(result.factor, torch.zeros(2, *shape))
    assert int(result.fallbacks) == 0
    if result.effective_rank is not None:
        assert result.effective_rank.tolist() == [0, 0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0)])
def test_empty_stacks_pass_through(method: str, shape: tuple[int, ...]) -> None:
    result = polar(torch.zeros(shape), method)
    assert result.factor.shape == shape
    assert int(result.fallbacks) == 0


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("shape", SHAPES)
def test_stacks_of_any_depth_equal_the_single_matrices(method: str, shape: tuple[int, int]) -> None:
    stack = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1))
    result = polar(stack, method)
    assert result.effective_rank is not None
    assert result.effective_rank.shape == (2, 3)
    assert result.fallbacks.shape == ()
    assert result.fallbacks.dtype == torch.int64
    for i in range(2):
        for j in range(3):
            # The batched and the single product may sum in another order; κ here is at most about 100.
            torch.testing.assert_close(
                result.factor[i, j], polar(stack[i, j], method).factor, rtol=0, atol=2e-5
            )


@pytest.mark.parametrize("method", METHODS)
def test_non_contiguous_input(method: str) -> None:
    base = torch.randn(24, 8, 3, generator=torch.Generator().manual_seed(2))
    view = base.permute(2, 1, 0)
    before = base.clone()
    # Only the layout of the operands differs; the approximate methods amplify its rounding the most.
    torch.testing.assert_close(
        polar(view, method).factor, polar(view.contiguous(), method).factor, rtol=0, atol=1e-5
    )
    assert torch.equal(base, before)


matrices = st.tuples(
    st.integers(1, 14), st.integers(1, 14), st.floats(0.0, 3.0), st.integers(0, 2**31), st.sampled_from(EXACT)
)


def drawn(m: int, n: int, log_kappa: float, seed: int) -> np.ndarray:
    return with_spectrum(np.geomspace(1.0, 10.0**-log_kappa, min(m, n)), m, n, seed)[0]


# 1e-6·κ: eight times first-order theory's eps·κ, for both sides of each identity.
def slack(log_kappa: float) -> float:
    return 2e-6 * 10.0**log_kappa + 2e-6


@settings(max_examples=40, deadline=None)
@given(case=matrices, log_scale=st.floats(-12.0, 12.0))
def test_scale_does_not_matter(case: tuple[int, int, float, int, str], log_scale: float) -> None:
    m, n, log_kappa, seed, method = case
    matrix = drawn(m, n, log_kappa, seed)
    scaled = tensor(matrix * 10.0**log_scale)
    assert error(polar(scaled, method).factor, polar(tensor(matrix), method).factor.double().numpy()) < slack(
        log_kappa
    )


@settings(max_examples=40, deadline=None)
@given(case=matrices)
def test_orthogonal_equivariance(case: tuple[int, int, float, int, str]) -> None:
    m, n, log_kappa, seed, method = case
    matrix, rng = drawn(m, n, log_kappa, seed), np.random.default_rng(seed)
    left, right = haar(m, m, rng), haar(n, n, rng)
    turned = polar(tensor(left @ matrix @ right), method).factor
    expected = left @ polar(tensor(matrix), method).factor.double().numpy() @ right
    assert error(turned, expected) < slack(log_kappa)


@settings(max_examples=40, deadline=None)
@given(case=matrices)
def test_transpose_commutes(case: tuple[int, int, float, int, str]) -> None:
    m, n, log_kappa, seed, method = case
    matrix = tensor(drawn(m, n, log_kappa, seed))
    assert error(polar(matrix.T, method).factor, polar(matrix, method).factor.T.double().numpy()) < slack(
        log_kappa
    )


@settings(max_examples=40, deadline=None)
@given(case=matrices, count=st.integers(1, 5))
def test_zero_rows_stay_zero_and_change_nothing(case: tuple[int, int, float, int, str], count: int) -> None:
    m, n, log_kappa, seed, method = case
    matrix = tensor(drawn(m, n, log_kappa, seed))
    padded = torch.cat([matrix, torch.zeros(count, n)])
    factor = polar(padded, method, rtol=1e-6).factor
    assert float(factor[m:].abs().max()) <= slack(log_kappa)
    assert error(factor[:m], polar(matrix, method, rtol=1e-6).factor.double().numpy()) < slack(log_kappa)


@settings(max_examples=40, deadline=None)
@given(case=matrices)
def test_the_symmetric_part_is_positive(case: tuple[int, int, float, int, str]) -> None:
    """OᵀM (or MOᵀ) is symmetric and positive: what tells the polar factor from other orthogonal matrices."""
    m, n, log_kappa, seed, method = case
    matrix = drawn(m, n, log_kappa, seed)
    factor = polar(tensor(matrix), method).factor.double().numpy()
    h = factor.T @ matrix if m >= n else matrix @ factor.T
    np.testing.assert_allclose(h, h.T, atol=slack(log_kappa))
    assert np.linalg.eigvalsh(0.5 * (h + h.T)).min() > -slack(log_kappa)


def test_auto_depends_on_shape_dtype_and_device_alone() -> None:
    assert choose_method((512, 128), torch.float32, "cpu") == "gram"
    assert choose_method((512, 128), torch.float32) == "gram"
    assert choose_method((512, 128), torch.bfloat16, "cuda") == "dwh"
    assert choose_method((512, 16), torch.float32, "cuda") == "dwh"
    assert choose_method((8, 8), torch.float32, "cuda") == "gram"
    assert choose_method((512, 128), torch.float64, "cpu") == "qr_svd"
    assert choose_method((512, 128), torch.float32, "mps") == "svd"
    assert all(choose_method(s, torch.float32, d) in EXACT for s in SHAPES for d in ("cpu", "cuda", "mps"))
    matrix = torch.randn(20, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(polar(matrix).factor, polar(matrix, "gram").factor)


@pytest.mark.parametrize(
    ("matrix", "keywords", "message"),
    [
        (torch.ones(3, 2), {"method": "qr"}, "unknown method 'qr'"),
        (torch.ones(3), {}, "(…, m, n)"),
        (torch.ones(3, 2, dtype=torch.int64), {}, "floating"),
        (torch.ones(3, 2), {"rtol": 1.0}, "rtol"),
        (torch.ones(3, 2), {"rtol": -1e-3}, "rtol"),
    ],
)
def test_bad_arguments_are_named(matrix: torch.Tensor, keywords: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        polar(matrix, **keywords)
    assert message in str(caught.value)
