"""NaN, breakdown, missing certificates: what factorizations do when things go wrong. They never raise."""

from __future__ import annotations

import pytest
import torch

from optimizers.linalg import robust
from optimizers.linalg.inverse_root import inverse_root
from optimizers.linalg.polar import EXACT, METHODS, polar
from optimizers.linalg.subspace import randomized_basis, svd_basis, test_matrix

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
def test_a_gram_that_is_not_finite_gives_a_zero_root(method: str) -> None:
    wide = stack().double()
    gram = wide.mT @ wide
    expected = inverse_root(gram, 1e-6, method).root
    gram[1, 0, 0] = float("nan")
    result = inverse_root(gram, 1e-6, method)
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
