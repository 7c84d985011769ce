"""The exact factor of CUDA, run on a CPU: the same sharp cut as "gram", certificates that are true, no host read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from optimizers.linalg import dwh, robust
from optimizers.linalg.dwh import BAND, dwh_weights, largest_eigenvalue, root_above_cut
from optimizers.linalg.inverse_root import inverse_root, root_by_dwh
from optimizers.linalg.polar import polar
from tests.optimizers.linalg.host_reads import HostReads
from tests.oracles.polar import polar_by_svd, with_spectrum

EPS32 = float(np.finfo(np.float32).eps)
CUTS = [1e-5, 6.5e-4, 1.3e-3, 0.1]
"""Default cuts of matrices with a longer side of 84, 5461 and 11008 (the down projections of llama_1b and 7b)."""


def spectra(cut: float, count: int) -> dict[str, np.ndarray]:
    """Return spectra with κ > 1/cut; no σ within 0.1 % of the cut, where fp32 rounding alone decides."""
    half = count // 2
    values = {
        "log-uniform": np.geomspace(1.0, 0.01 * cut, count),
        "a decade below the cut": np.r_[
            np.geomspace(1.0, 2 * cut, half), np.geomspace(0.9, 0.1, count - half) * cut
        ],
        "both sides of the cut": np.r_[1.0, np.linspace(1.3, 0.7, count - 1) * cut],
        "noise": np.r_[np.geomspace(1.0, max(0.01, 2 * cut), half), np.full(count - half, 1e-4 * cut)],
        "cluster on top": np.r_[1.0 - 1e-5 * np.arange(half), np.full(count - half, 0.98 * cut)],
        "rank one": np.r_[1.0, np.zeros(count - 1)],
    }
    return {name: np.where(np.abs(s / cut - 1) < 1e-3, 1.002 * cut, s) for name, s in values.items()}


def case(cut: float, name: str, seed: int = 0) -> tuple[Tensor, np.ndarray, int, float]:
    """Return fp64 moments (4, 96, 24), their factors by an fp64 SVD with that cut, rank and κ of what is kept."""
    sigma = spectra(cut, 24)[name]
    matrices = np.stack([with_spectrum(sigma, 96, 24, seed + i)[0] for i in range(4)])
    exact = np.stack([polar_by_svd(m, cut)[0] for m in matrices])
    kept = sigma[sigma > cut * sigma.max()]
    return torch.from_numpy(matrices), exact, len(kept), float(sigma.max() / kept.min())


def worst(factor: Tensor, exact: np.ndarray) -> float:
    return float(np.linalg.norm(factor.double().numpy() - exact, axis=(1, 2)).max())


def bound(kappa: float, cut: float) -> float:
    """Return what an fp64 Gram allows.

    Its noise, eps64 on eigenvalues of cut², turns directions at both sides of the cut, 1e-3 apart, into each other.
    √r and the constants of 4 to 9 products are 50; the steps end at 1e-10.
    """
    return 1e-9 + 50 * 2.2e-16 * (kappa**2 + cut**-2 * 1e2)


@pytest.mark.parametrize("name", spectra(0.1, 24))
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("method", ["gram", "dwh"])
def test_both_choices_have_the_cut_of_the_fp64_svd(method: str, cut: float, name: str) -> None:
    """One definition on every device: the factor that CPUs compute and the one that CUDA computes."""
    matrices, exact, rank, kappa = case(cut, name)
    result = inverse_root(matrices.mT @ matrices, cut, method)
    assert result.effective_rank.tolist() == [rank] * 4
    assert worst(matrices @ result.root, exact) < bound(kappa, cut)
    # Far below what fp32 moments determine, an fp32 SVD has eps32·κ at least.
    assert bound(kappa, cut) < max(1e-6, 2 * EPS32 / cut)


@pytest.mark.parametrize("name", spectra(0.1, 24))
def test_fp32_moments_have_the_same_factor_by_both_choices(name: str) -> None:
    matrices = case(1.3e-3, name)[0].float()
    by_device, by_cpu = polar(matrices, "dwh", rtol=1.3e-3), polar(matrices, "gram", rtol=1.3e-3)
    assert torch.equal(by_device.effective_rank, by_cpu.effective_rank)  # type: ignore[arg-type]
    assert int(by_device.fallbacks) == 0
    # Half an ulp of entries of at most 1, on either side.
    torch.testing.assert_close(by_device.factor, by_cpu.factor, rtol=0, atol=2 * EPS32)


def smooth_filter(scaled: Tensor, cut: float) -> tuple[Tensor, Tensor, Tensor]:
    """The smoothstep of what Halley steps from the cut leave: the filter that "dwh" had without a host read."""
    residual = scaled
    identity = torch.eye(scaled.shape[-1], dtype=scaled.dtype)
    for a, b, c in dwh_weights(max(cut, 1e-5) / scaled.shape[-1] ** 0.25):
        stage = (b / c) * identity + (a - b / c) * torch.linalg.inv(identity + c * residual)
        residual = stage @ residual @ stage
    for _ in range(2):
        square = residual @ residual
        residual = 3.0 * square - 2.0 * (square @ residual)
    return residual, torch.ones(len(scaled), dtype=scaled.dtype), torch.zeros(len(scaled), dtype=torch.bool)


@pytest.mark.parametrize(
    "name", ["log-uniform", "a decade below the cut", "both sides of the cut", "cluster on top"]
)
def test_a_smooth_filter_would_not_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a filter that needs a decade to fall to 0 keeps what the definition drops."""
    monkeypatch.setattr(dwh, "spectral_projector", smooth_filter)
    matrices, exact, rank, _ = case(1.3e-3, name)
    result = inverse_root(matrices.mT @ matrices, 1.3e-3, "dwh")
    assert all(found > rank for found in result.effective_rank.tolist())
    assert worst(matrices @ result.root, exact) > 0.5


@pytest.mark.parametrize("name", ["log-uniform", "noise"])
def test_nothing_is_read_by_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robust, "host_may_look", lambda stack: False)  # as on CUDA
    matrices = case(1e-3, name)[0]
    gram = matrices.mT @ matrices
    with HostReads() as reads:
        root_by_dwh(gram, 1e-3)
    assert not reads.count
    # Negative control: the eigendecomposition is seen.
    with HostReads() as reads:
        torch.linalg.eigh(gram)
    assert reads.count["_linalg_eigh"] == 1


@pytest.mark.parametrize(
    ("lower", "count"), [(1e-2, 4), (1e-3, 4), (1e-4, 4), (1e-5, 4), (1e-6, 4), (1e-7, 5)]
)
def test_halley_steps_carry_the_interval_to_one(lower: float, count: int) -> None:
    steps = dwh_weights(lower)
    x = np.geomspace(lower, 1.0, 20001)
    for a, b, c in steps:
        x = x * (a + b * x * x) / (1.0 + c * x * x)
    assert len(steps) == count
    assert np.abs(x - 1.0).max() < 1.1e-10


@pytest.mark.parametrize("spacing", [0.0, 1e-9, 1e-6, 1e-4, 1e-2])
def test_the_largest_eigenvalue_is_found_in_clusters_too(spacing: float) -> None:
    sigma = 1.0 - spacing * np.linspace(0, 1, 24) ** 2
    matrices = torch.from_numpy(np.stack([with_spectrum(sigma, 40, 24, seed)[0] for seed in range(3)]))
    top = largest_eigenvalue(matrices.mT @ matrices)
    # ln(24)/2^21 = 1.5e-6 is the bound for the worst cluster.
    assert bool(((top - 1.0).abs() < 1.6e-6).all())
    assert bool((top < 1.0 + 1e-13).all())


@pytest.mark.parametrize("kappa", [1e0, 1e2, 1e3, 1e4, 1e5])
def test_moments_without_directions_to_drop_are_certified(kappa: float) -> None:
    """Spectra as SUMO moments have them, a few outliers and a flat bulk, and log-uniform ones; the cut is 1e-6."""
    rng = np.random.default_rng(7)
    rows = []
    for index in range(6):
        sigma = np.geomspace(1.0, 1.0 / kappa, 24)
        if index % 2:
            sigma = np.clip(rng.uniform(0.9, 3.0, 24) / kappa, None, 1.0)
            sigma[:3] = 1.0, 0.4, 0.2
            sigma[-1] = 1.0 / kappa
        rows.append(with_spectrum(sigma, 96, 24, 7 + index)[0])
    matrices = torch.from_numpy(np.stack(rows)).float()
    exact = np.stack([polar_by_svd(m.double().numpy(), 1e-7)[0] for m in matrices])
    result = polar(matrices, "dwh", rtol=1e-6)
    assert int(result.fallbacks) == 0
    assert worst(result.factor, exact) <= max(worst(polar(matrices, "svd", rtol=1e-7).factor, exact), 5e-6)


@pytest.mark.parametrize("name", spectra(0.1, 24))
@pytest.mark.parametrize("cut", [1e-6, *CUTS])
def test_a_certificate_is_never_wrong(cut: float, name: str) -> None:
    matrices, exact, _, kappa = case(cut, name, seed=10)
    result = root_above_cut(matrices.mT @ matrices, cut)
    error = np.linalg.norm((matrices @ result.root).numpy() - exact, axis=(1, 2))
    # The acceptance rule; κ̂ exceeds κ by at most r^(1/4), 2.2.
    assert (error[result.certified.numpy()] <= max(1e-6, 3 * EPS32 * kappa)).all()
    # Where the band about the cut is free, a certificate is given.
    assert bool(result.certified.all()) or name == "both sides of the cut" or cut < 1e-5


@pytest.mark.parametrize("distance", [0.0, 0.1 * BAND, -0.1 * BAND])
def test_a_direction_on_the_cut_is_not_certified(distance: float) -> None:
    cut = 1e-2
    sigma = np.r_[np.geomspace(1.0, 2 * cut, 15), cut * (1 + distance)]
    matrices = torch.from_numpy(np.stack([with_spectrum(sigma, 64, 16, seed)[0] for seed in range(4)]))
    result = root_above_cut(matrices.mT @ matrices, cut)
    assert not bool(result.certified.any())
    assert int(inverse_root(matrices.mT @ matrices, cut, "dwh").fallbacks) == 4
    # The others are exact, and the one in doubt has a weight between 0 and 1.
    values = torch.linalg.svdvals(matrices @ result.root)
    assert bool(((values[:, :15] - 1).abs() < 1e-8).all())
    assert bool((values[:, 15] < 1 + 1e-8).all())


def test_zero_matrices_have_zero_roots_and_leave_the_others_alone() -> None:
    good = case(1e-3, "log-uniform")[0]
    mixed = torch.cat([torch.zeros(1, 96, 24, dtype=torch.float64), good])
    result, alone = root_above_cut(mixed.mT @ mixed, 1e-3), root_above_cut(good.mT @ good, 1e-3)
    assert not bool(result.root[0].any())
    assert int(result.rank[0]) == 0
    assert bool(result.certified[0])
    assert torch.equal(result.root[1:], alone.root)
