"""Bases: exact against numpy's SVD, randomized by captured energy, signs, warm starts, row shards."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizers.linalg import robust, subspace
from optimizers.linalg.requests import AllGather, AllReduce, Eigh, drive
from optimizers.linalg.subspace import (
    basis_cut,
    canonical_signs,
    randomized_basis,
    svd_basis,
    test_matrix,
)
from tests.optimizers.linalg.host_reads import HostReads
from tests.oracles.polar import with_spectrum

SIDES = ["left", "right"]


def gradient(m: int, n: int, decay: float = 0.5, seed: int = 0) -> torch.Tensor:
    sigma = np.arange(1, min(m, n) + 1, dtype=np.float64) ** -decay
    return torch.from_numpy(with_spectrum(sigma, m, n, seed)[0]).float()


def captured(matrix: torch.Tensor, basis: torch.Tensor) -> float:
    """Energy inside the basis over the energy of the best subspace of that dimension."""
    wide, b = matrix.double().numpy(), basis.double().numpy()
    inside = b.T @ wide if b.shape[0] == wide.shape[0] and b.shape[0] != wide.shape[1] else wide @ b
    best = np.linalg.svd(wide, compute_uv=False)[: b.shape[1]]
    return float(np.sum(inside**2) / np.sum(best**2))


def orthonormality(basis: torch.Tensor) -> float:
    """Largest deviation of BᵀB from the identity on its non-zero columns."""
    b = basis.double()
    present = (b.abs().amax(0) > 0).double()
    return float((b.mT @ b - torch.diag(present)).abs().max())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (30, 30), (1, 9), (9, 1)])
def test_the_exact_basis_is_numpys(shape: tuple[int, int], side: str) -> None:
    rank = max(1, min(shape) // 3)
    matrix = gradient(*shape, decay=1.0)
    basis = svd_basis(matrix, rank, side)
    left, _, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    vectors = left[:, :rank] if side == "left" else right[:rank].T
    reference = canonical_signs(torch.from_numpy(np.ascontiguousarray(vectors)))
    # fp64 Gram: eps64·(σ1²/gap) of about 1e-12; what remains is the rounding to fp32.
    np.testing.assert_allclose(basis.numpy(), reference.numpy(), atol=2e-7)
    assert basis.dtype == torch.float32


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(60, 30), (30, 60)])
def test_columns_below_the_cut_are_exactly_zero(shape: tuple[int, int], side: str) -> None:
    sigma = np.concatenate([np.geomspace(1.0, 0.1, 7), np.full(8, 1e-8)])
    matrix = torch.from_numpy(with_spectrum(sigma, *shape, seed=1)[0]).float()
    sketch = test_matrix(0, "w", 0, (shape[1], 16))
    warm = svd_basis(matrix, 12, side)
    for basis in (
        warm,
        randomized_basis(matrix, 12, side, sketch),
        randomized_basis(matrix, 12, side, sketch, passes=2),
        randomized_basis(matrix, 12, side, sketch, warm=warm),
    ):
        assert basis.shape == (shape[0] if side == "left" else shape[1], 12)
        assert basis.abs().amax(0).gt(0).tolist() == [True] * 7 + [False] * 5
        assert orthonormality(basis) < 1e-6
    zero = torch.zeros(shape)
    assert not svd_basis(zero, 3, side).any()
    assert not randomized_basis(zero, 12, side, sketch).any()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("decay", "passes", "least"), [(0.5, 1, 0.93), (0.5, 2, 0.98), (1.0, 1, 0.995), (1.0, 2, 0.999)]
)
def test_captured_energy(side: str, decay: float, passes: int, least: float) -> None:
    """Floors a little under what the project's study measured for these spectra at 768×512, r = 64."""
    matrix = gradient(192, 128, decay, seed=2)
    sketch = test_matrix(1, "w", 0, (128, 24))
    basis = randomized_basis(matrix, 16, side, sketch, passes=passes)
    energy = captured(matrix, basis)
    # "right" sees the gradient one product less than "left" at the same number of passes.
    assert least - (0.05 if side == "right" else 0.0) < energy <= 1 + 1e-6
    assert orthonormality(basis) < 1e-6
    # Negative control: a random orthonormal basis of the same size.
    rows = basis.shape[0]
    random = torch.linalg.qr(torch.randn(rows, 16, generator=torch.Generator().manual_seed(0)))[0]
    assert captured(matrix, random) < 0.6


@pytest.mark.parametrize("side", SIDES)
def test_a_warm_start_beats_a_cold_one_and_the_old_basis(side: str) -> None:
    old = gradient(192, 128, 0.5, seed=3)
    noise = torch.randn(192, 128, generator=torch.Generator().manual_seed(1))
    new = old + 0.3 * noise * torch.linalg.matrix_norm(old) / torch.linalg.matrix_norm(noise)
    sketch = test_matrix(1, "w", 7, (128, 24))
    kept = svd_basis(old, 16, side)
    warm = randomized_basis(new, 16, side, sketch, passes=1, warm=kept)
    cold = randomized_basis(new, 16, side, sketch, passes=1)
    assert captured(new, warm) > captured(new, cold)
    assert captured(new, warm) > captured(new, kept)
    assert captured(new, warm) > 0.99


@pytest.mark.parametrize("side", SIDES)
def test_zero_columns_of_the_old_basis_are_sketched_anew(side: str) -> None:
    matrix = gradient(60, 40, 1.0)
    kept = svd_basis(matrix, 10, side)
    kept[:, 4:] = 0.0
    basis = randomized_basis(matrix, 10, side, test_matrix(0, "w", 1, (40, 14)), passes=2, warm=kept)
    assert bool((basis.abs().amax(0) > 0).all())
    assert captured(matrix, basis) > 0.98


@pytest.mark.parametrize("side", SIDES)
def test_an_ill_conditioned_sketch_stays_orthonormal(side: str) -> None:
    """κ from 1e2 to 1e8 inside the sketch: CholeskyQR on fp64 Grams, eigenvalues where it breaks down."""
    for kappa in (1e2, 1e4, 1e6, 1e8):
        matrix = torch.from_numpy(
            with_spectrum(np.geomspace(1.0, 1.0 / kappa, 24), 80, 50, seed=4)[0]
        ).float()
        basis = randomized_basis(matrix, 20, side, test_matrix(0, "w", 0, (50, 24)), passes=2)
        assert orthonormality(basis) < 2e-6


class Meeting:
    """Ranks as threads that answer each other's requests."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world)
        self.slots: list[torch.Tensor] = [torch.empty(0)] * world
        self.asked: list[list[str]] = [[] for _ in range(world)]

    def answer(self, rank: int, request: Any) -> Any:
        if isinstance(request, AllReduce) and not request.partial:
            return request.tensor
        self.asked[rank].append(type(request).__name__)
        self.slots[rank] = request.gram if isinstance(request, Eigh) else request.tensor
        self.barrier.wait(timeout=60)
        everything = torch.stack(self.slots)
        self.barrier.wait(timeout=60)
        if isinstance(request, AllGather):
            return everything
        if isinstance(request, AllReduce):
            return everything.sum(0)
        assert all(torch.equal(everything[0], other) for other in everything)
        return torch.linalg.eigh(everything[0])

    def drive(self, rank: int, steps: subspace.Steps) -> torch.Tensor:
        return drive(steps, partial(self.answer, rank))


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("cuts", [(0, 20, 48), (0, 1, 48), (0, 0, 31, 48)])
@pytest.mark.parametrize("kind", ["cold", "warm", "exact"])
def test_shards_give_the_basis_of_the_whole_matrix(
    split: int, side: str, cuts: tuple[int, ...], kind: str
) -> None:
    """Rows or columns over ranks; an empty shard is a shard like any other. Signs included."""
    matrix = gradient(48, 30, 0.7, seed=5) if split == 0 else gradient(30, 48, 0.7, seed=5)
    other = gradient(matrix.shape[0], matrix.shape[1], 0.2, seed=6)
    sketch = test_matrix(0, "w", 2, (matrix.shape[1], 14))
    old = svd_basis(matrix + 0.1 * other, 10, side) if kind == "warm" else None
    rtol = basis_cut(matrix.shape, matrix.dtype)
    whole = (
        svd_basis(matrix, 10, side)
        if kind == "exact"
        else randomized_basis(matrix, 10, side, sketch, passes=2, warm=old)
    )
    world = len(cuts) - 1
    meeting = Meeting(world)
    results: list[torch.Tensor] = [torch.empty(0)] * world
    basis_is_split = (side == "left") == (split == 0)

    def rank(index: int) -> None:
        lo, hi = cuts[index], cuts[index + 1]
        mine = matrix.narrow(split, lo, hi - lo)[None]
        kept = None if old is None else (old[lo:hi] if basis_is_split else old)[None]
        tests = (sketch[lo:hi] if split == 1 else sketch)[None]
        steps = (
            subspace.sharded_svd_basis(mine, 10, side, rtol, split)
            if kind == "exact"
            else subspace.range_finder(mine, 10, side, tests, 2, kept, rtol, split)
        )
        results[index] = meeting.drive(index, subspace.sharded_canonical_signs(steps, basis_is_split, lo))[0]

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(asked == meeting.asked[0] for asked in meeting.asked)
    basis = torch.cat(results) if basis_is_split else results[0]
    if not basis_is_split:
        assert all(torch.equal(basis, other) for other in results)
    # Sums of fp32 rows in another order: a few eps, amplified by σ1 over the gaps of the Ritz values, here
    # ~30.
    torch.testing.assert_close(basis, whole, rtol=0, atol=2e-5)


def test_the_largest_component_may_live_on_another_rank() -> None:
    """The negative control: signs fixed by each rank for itself disagree."""
    basis = torch.tensor([[0.1, -0.2], [0.3, 0.4], [-0.9, 0.5], [0.2, -0.7]])
    expected = canonical_signs(basis)
    assert torch.equal(expected, -basis)
    meeting = Meeting(2)
    results: list[torch.Tensor] = [torch.empty(0)] * 2

    def steps(part: torch.Tensor) -> subspace.Steps:
        return part
        yield

    def rank(index: int) -> None:
        part = basis[2 * index : 2 * index + 2][None]
        results[index] = meeting.drive(index, subspace.sharded_canonical_signs(steps(part), True, 2 * index))[
            0
        ]

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.cat(results), expected)
    assert not torch.equal(torch.cat([canonical_signs(basis[:2]), canonical_signs(basis[2:])]), expected)


@pytest.mark.parametrize("side", SIDES)
def test_a_device_makes_the_same_basis_without_asking_which_block_broke_down(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three gradients have rank 6 of 12: Cholesky breaks down, and the pseudo-inverse root takes over."""
    low = np.r_[np.geomspace(1.0, 0.1, 6), np.zeros(24)]
    stack = torch.from_numpy(np.stack([with_spectrum(low, 40, 30, seed)[0] for seed in (0, 1)])).float()
    stack = torch.cat([stack, gradient(40, 30)[None]])
    sketch = test_matrix(0, "w", 0, (30, 16))
    with HostReads() as reads:
        expected = randomized_basis(stack, 12, side, sketch, passes=2)
    assert reads.count["nonzero"] > 0
    monkeypatch.setattr(robust, "host_may_look", lambda stack: False)  # as on CUDA
    monkeypatch.setattr(subspace, "host_may_look", lambda stack: False)
    with HostReads() as reads:
        basis = randomized_basis(stack, 12, side, sketch, passes=2)
    # The eigenproblem of the rotation: torch's own status, and one number to see whether it worked.
    assert dict(reads.count) == {"_linalg_eigh": 1, "_local_scalar_dense": 1}
    assert not bool(basis[:2, :, 6:].any())
    # Bases in fp32, of Grams whose cut is 1e-6.
    torch.testing.assert_close(basis, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("side", SIDES)
def test_stacks_equal_single_matrices(side: str) -> None:
    stack = torch.stack([gradient(24, 18, 1.0, s) for s in range(6)]).view(2, 3, 24, 18)
    sketches = torch.stack([test_matrix(0, str(i), 0, (18, 9)) for i in range(6)]).view(2, 3, 18, 9)
    exact = svd_basis(stack, 5, side)
    randomized = randomized_basis(stack, 5, side, sketches, passes=2)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(exact[i, j], svd_basis(stack[i, j], 5, side), rtol=0, atol=1e-6)
            single = randomized_basis(stack[i, j], 5, side, sketches[i, j], passes=2)
            torch.testing.assert_close(randomized[i, j], single, rtol=0, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 30),
    r=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    flips=st.lists(st.sampled_from([-1.0, 1.0]), min_size=6, max_size=6),
)
def test_canonical_signs_forget_the_signs(n: int, r: int, seed: int, flips: list[float]) -> None:
    basis = torch.randn(n, r, generator=torch.Generator().manual_seed(seed))
    turned = basis * torch.tensor(flips[:r])
    result = canonical_signs(basis)
    assert torch.equal(result, canonical_signs(turned))
    assert torch.equal(result.abs(), basis.abs())
    leaders = result.gather(0, result.abs().argmax(0, keepdim=True))
    assert bool((leaders > 0).all())


def test_ties_fall_to_the_lowest_index_also_under_rounding() -> None:
    hadamard = torch.tensor([[0.5, -0.5], [-0.5, 0.5], [0.5, 0.5], [-0.5, -0.5]])
    for noise in (0.0, 3e-8, -3e-8):
        disturbed = hadamard.clone()
        disturbed[1] *= 1 + noise
        disturbed[2] *= 1 - noise
        assert bool((canonical_signs(disturbed)[0] > 0).all())
        assert bool((canonical_signs(-disturbed)[0] > 0).all())
    assert torch.equal(canonical_signs(torch.zeros(3, 2)), torch.zeros(3, 2))


def test_the_sketch_depends_on_seed_name_and_refresh_alone() -> None:
    first = test_matrix(3, "layers.0.q", 5, (40, 12))
    torch.manual_seed(0)
    torch.randn(7)
    state = torch.random.get_rng_state()
    assert torch.equal(first, test_matrix(3, "layers.0.q", 5, (40, 12)))
    assert torch.equal(state, torch.random.get_rng_state())
    for other in ((4, "layers.0.q", 5), (3, "layers.0.k", 5), (3, "layers.0.q", 6)):
        assert not torch.equal(first, test_matrix(*other, (40, 12)))
    assert first.dtype == torch.float32
    # Standard normal: the mean of 480 numbers is within 5 standard errors.
    assert abs(float(first.mean())) < 5 / 480**0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g, t: svd_basis(g, 3, "rows"), "side"),
        (lambda g, t: svd_basis(g, 9, "left"), "rank 9"),
        (lambda g, t: svd_basis(g, 0, "left"), "rank 0"),
        (lambda g, t: randomized_basis(g, 3, "up", t), "side"),
        (lambda g, t: randomized_basis(g, 3, "right", t, passes=0), "passes"),
        (lambda g, t: randomized_basis(g, 3, "left", t, passes=-1), "passes"),
        (lambda g, t: randomized_basis(g, 7, "left", t), "rank 7"),
        (lambda g, t: randomized_basis(g, 3, "left", t[:5]), "test matrix"),
    ],
)
def test_bad_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(10, 8), torch.ones(8, 6))
