"""NaN, breakdown, missing certificates: what factorizations do when things go wrong. They never raise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optimizers.linalg import robust
from optimizers.linalg.inverse_root import dwh_weights, inverse_root, root_by_dwh
from optimizers.linalg.polar import EXACT, METHODS, polar
from optimizers.linalg.subspace import randomized_basis, svd_basis, test_matrix
from tests.oracles.polar import polar_by_svd, with_spectrum

EIGH, SVD = torch.linalg.eigh, torch.linalg.svd
LinAlgError = getattr(torch.linalg, "LinAlgError")  # noqa: B009 (not declared public to type checkers)


def stack(count: int = 4, m: int = 20, n: int = 8) -> torch.Tensor:
    return torch.randn(count, m, n, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", [(20, 8), (8, 20)])
@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_that_is_not_finite_poisons_no_other(
    method: str, shape: tuple[int, int], bad: float
) -> None:
    good = stack(4, *shape)
    poisoned = good.clone()
    poisoned[2, 3, 1] = bad
    clean, result = polar(good, method), polar(poisoned, method)
    others = [0, 1, 3]
    assert torch.equal(result.factor[others], clean.factor[others])
    assert torch.equal(result.factor[2], torch.zeros(shape))
    assert int(result.fallbacks) == int(clean.fallbacks) + 1
    if result.singular_values is not None:
        assert bool(result.singular_values[2].isnan().all())
        assert bool(result.singular_values[others].isfinite().all())
    if result.effective_rank is not None:
        assert int(result.effective_rank[2]) == 0


@pytest.mark.parametrize("method", ["gram", "dwh"])
@pytest.mark.parametrize("sync", [True, False])
def test_a_gram_that_is_not_finite_gives_a_zero_root(method: str, sync: bool) -> None:
    wide = stack().double()
    gram = wide.mT @ wide
    expected = inverse_root(gram, 1e-6, method, sync).root
    gram[1, 0, 0] = float("nan")
    result = inverse_root(gram, 1e-6, method, sync)
    assert torch.equal(result.root[[0, 2, 3]], expected[[0, 2, 3]])
    assert torch.equal(result.root[1], torch.zeros(8, 8, dtype=torch.float64))
    assert result.effective_rank.tolist() == [8, 0, 8, 8]
    assert int(result.fallbacks) == 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_bases_of_a_gradient_that_is_not_finite_are_zero(side: str) -> None:
    good = stack()
    poisoned = good.clone()
    poisoned[1, 4, 4] = float("nan")
    sketch = test_matrix(0, "w", 0, (8, 6))
    for make in (
        lambda g: svd_basis(g, 4, side),
        lambda g: randomized_basis(g, 4, side, sketch),
        lambda g: randomized_basis(g, 4, side, sketch, warm=svd_basis(good, 4, side)),
    ):
        basis, clean = make(poisoned), make(good)
        assert not basis[1].any()
        # The bad matrix takes another branch, after which the transforms lie differently in memory: rounding
        # only.
        torch.testing.assert_close(basis[[0, 2, 3]], clean[[0, 2, 3]], rtol=0, atol=1e-6)


def failing_on(marked: float):
    """An eigh that gives up on any stack with an eigenvalue of about `marked`, as LAPACK does: as a whole."""

    def eigh(matrix: torch.Tensor):
        if bool((EIGH(matrix)[0] > 0.9 * marked).any()):
            raise LinAlgError("the algorithm failed to converge")
        return EIGH(matrix)

    return eigh


@pytest.mark.parametrize("method", ["gram", "auto"])
def test_eigh_giving_up_on_one_matrix_is_rescued(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = stack()
    clean = polar(matrices, method)
    matrices[1] *= 1e3
    marked = float(torch.linalg.matrix_norm(matrices[1], ord=2)) ** 2
    monkeypatch.setattr(torch.linalg, "eigh", failing_on(marked))
    result = polar(matrices, method)
    assert int(result.fallbacks) == 1
    # Scaling by 1e3 changes roundings; the matrix has κ of about 5.
    torch.testing.assert_close(result.factor, clean.factor, rtol=0, atol=1e-6)
    assert torch.equal(result.factor[[0, 2, 3]], clean.factor[[0, 2, 3]])


@pytest.mark.parametrize("method", ["svd", "qr_svd"])
@pytest.mark.parametrize("failures", ["first call", "always"])
def test_svd_giving_up_is_rescued(method: str, failures: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that fails as a whole but not alone costs nothing; one that always fails goes down to gesvd."""
    matrices = stack(2)
    exact = polar(matrices, method).factor
    calls = []

    def svd(matrix: torch.Tensor, full_matrices: bool = True):
        calls.append(matrix.shape)
        if failures == "always" or len(calls) == 1:
            raise LinAlgError("the algorithm failed to converge")
        return SVD(matrix, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    result = polar(matrices, method)
    assert int(result.fallbacks) == (2 if failures == "always" else 0)
    torch.testing.assert_close(result.factor, exact, rtol=0, atol=2e-6)


def test_a_routine_that_returns_nan_counts_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = stack(2)
    exact = polar(matrices, "gram").factor
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: tuple(part * float("nan") for part in EIGH(m)))
    result = polar(matrices, "gram")
    assert int(result.fallbacks) == 2
    torch.testing.assert_close(result.factor, exact, rtol=0, atol=2e-6)


def test_when_nothing_converges_the_factor_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object):
        raise LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "svd", never)
    monkeypatch.setattr(robust, "_gesvd", never)
    result = polar(stack(2), "svd")
    assert not result.factor.any()
    assert int(result.fallbacks) == 2


def test_running_out_of_memory_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*args: object, **kwargs: object):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.linalg, "svd", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        polar(stack(2), "svd")


@pytest.mark.parametrize(("lower", "count"), [(1e-2, 4), (1e-3, 4), (1e-4, 4), (1e-5, 4), (1e-6, 5)])
def test_halley_steps_carry_the_interval_to_one(lower: float, count: int) -> None:
    steps, _ = dwh_weights(lower)
    x = np.geomspace(lower, 1.0, 20001)
    for a, b, c in steps:
        x = x * (a + b * x * x) / (1.0 + c * x * x)
    assert len(steps) == count
    # 1e-11 by construction, and the rounding of the evaluation itself.
    assert np.abs(x - 1.0).max() < 2e-11


def moments(kappa: float, m: int, r: int, seed: int, count: int = 6) -> torch.Tensor:
    """Spectra as SUMO moments have them: a few outliers, then a flat bulk; and log-uniform ones."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        sigma = np.geomspace(1.0, 1.0 / kappa, r)
        if index % 2:
            sigma = np.clip(rng.uniform(0.9, 3.0, r) / kappa, None, 1.0)
            sigma[:3] = 1.0, 0.4, 0.2
            sigma[-1] = 1.0 / kappa
        rows.append(with_spectrum(sigma, m, r, seed + index)[0])
    return torch.from_numpy(np.stack(rows)).float()


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("kappa", [1e1, 1e3, 1e4, 1e5])
def test_dwh_is_as_exact_as_the_fp32_svd_up_to_kappa_1e5(kappa: float, sync: bool) -> None:
    matrices = moments(kappa, 96, 24, seed=7)
    exact = np.stack([polar_by_svd(m.double().numpy())[0] for m in matrices])

    def worst(factor: torch.Tensor) -> float:
        return float(np.linalg.norm(factor.double().numpy() - exact, axis=(1, 2)).max())

    result = polar(matrices, "dwh", rtol=1e-6, sync=sync)
    # κ = 1e5 is where certificates end; the factor is no worse for it, and where the host looks it is redone.
    assert int(result.fallbacks) == (0 if kappa < 1e5 else len(matrices))
    assert worst(result.factor) <= max(worst(polar(matrices, "svd", rtol=1e-7).factor), 5e-6)


@pytest.mark.parametrize("kappa", [1e0, 1e2, 1e3, 1e4, 3e5])
def test_a_certificate_is_never_wrong(kappa: float) -> None:
    """Of the fp64 roots that are certified, none is further off than what certification allows."""
    wide = moments(kappa, 64, 16, seed=11, count=20).double()
    exact = np.stack([polar_by_svd(m.numpy())[0] for m in wide])
    root, _, _, fell_back = root_by_dwh(wide.mT @ wide, 1e-6, sync=False)
    error = np.linalg.norm((wide @ root).numpy() - exact, axis=(1, 2))
    certified = ~fell_back.numpy()
    # max(1e-6, eps32·κ̂) is the acceptance rule; κ̂ exceeds κ by at most r^(1/4) for each of its two norms,
    # here 4.
    assert (error[certified] <= max(1e-6, 1.2e-7 * kappa * 4)).all()
    assert certified.all() if kappa <= 1e4 else not certified.any()


@pytest.mark.parametrize("below", [0.0, 1e-9, 1e-7])
def test_directions_below_the_cut_are_never_certified(below: float) -> None:
    sigma = np.concatenate([np.geomspace(1.0, 1e-2, 10), np.full(6, below)])
    wide = torch.from_numpy(np.stack([with_spectrum(sigma, 64, 16, s)[0] for s in range(8)]))
    _, _, _, fell_back = root_by_dwh(wide.mT @ wide, 1e-5, sync=False)
    assert bool(fell_back.all())


@pytest.mark.parametrize("below", [0.0, 1e-8, 1e-7, 1e-6])
def test_without_a_host_read_the_filter_drops_them(below: float) -> None:
    """The device path: no eigendecomposition, and still ‖O‖_F² = rank for directions far below the cut."""
    cut = 1e-4  # the default for a longer side of 840
    sigma = np.concatenate([np.geomspace(1.0, 1e-2, 10), np.full(6, below)])
    matrices = torch.from_numpy(np.stack([with_spectrum(sigma, 64, 16, s)[0] for s in range(4)])).float()
    exact = np.stack([polar_by_svd(m.double().numpy(), cut)[0] for m in matrices])
    result = polar(matrices, "dwh", rtol=cut, sync=False)
    assert int(result.fallbacks) == 4
    assert result.effective_rank is not None
    assert result.effective_rank.tolist() == [10] * 4
    # Before the filter acts the steps hold entries of 1/cut in the dropped directions: their rounding,
    # eps64/cut²
    # = 2e-8, times a constant, is what remains, and at 1 % of the cut a filtered tail of 1e-5.
    assert np.abs(result.factor.double().numpy() - exact).max() < (2e-5 if below == 1e-6 else 5e-6)
    # Negative control: the same steps without the filter keep part of them.
    if below:
        steps, _ = dwh_weights(cut / 16**0.25)
        x = np.array([below])
        for a, b, c in steps:
            x = x * (a + b * x * x) / (1.0 + c * x * x)
        assert x[0] > 1e-4


def test_close_to_the_cut_the_filter_never_exceeds_one() -> None:
    """Between dropped and kept the device path damps: singular values of the factor lie in [0, 1]."""
    sigma = np.concatenate([[1.0], np.geomspace(1e-4, 1e-7, 15)])
    matrix = torch.from_numpy(with_spectrum(sigma, 64, 16, 0)[0])
    factor = polar(matrix, "dwh", rtol=1e-5, sync=False).factor
    values = torch.linalg.svdvals(factor)
    above = int((sigma > 1e-5).sum())
    assert float(values.max()) < 1 + 1e-3
    # Directions above the cut come out at 1; the Gram of κ = 1e5 carries noise of eps64·κ² = 2e-6.
    assert float(values[above - 1]) > 1 - 1e-3


def test_uncertified_matrices_are_redone_where_the_host_may_look() -> None:
    good = moments(1e3, 64, 16, seed=1, count=2)
    bad = torch.from_numpy(with_spectrum([1.0, 0.5] + [0.0] * 14, 64, 16, 3)[0]).float()
    result = polar(torch.stack([good[0], bad, good[1]]), "dwh")
    assert int(result.fallbacks) == 1
    assert result.effective_rank is not None
    assert result.effective_rank.tolist() == [16, 2, 16]
    exact = polar_by_svd(bad.double().numpy(), 1e-5)[0]
    assert np.abs(result.factor[1].double().numpy() - exact).max() < 1e-6


@pytest.mark.parametrize("method", EXACT)
def test_extreme_magnitudes(method: str) -> None:
    """fp32 matrices near overflow and in the subnormal range have ordinary factors."""
    exact = polar(stack(1), method).factor
    big = stack(1) * 1e37
    torch.testing.assert_close(polar(big, method).factor, exact, rtol=0, atol=1e-5)
    # 1e-30: squares underflow fp32 but not fp64, and the entries are still normal numbers.
    torch.testing.assert_close(polar(stack(1) * 1e-30, method).factor, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("gram", "method"),
    [(torch.eye(3), "gram"), (torch.ones(2, 3, dtype=torch.float64), "gram"), (torch.eye(3).double(), "svd")],
)
def test_inverse_root_names_bad_arguments(gram: torch.Tensor, method: str) -> None:
    with pytest.raises(ValueError, match="inverse_root"):
        inverse_root(gram, 1e-6, method)
