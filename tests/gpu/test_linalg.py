"""Factors, bases and sketches on the device are those of the CPU."""

from __future__ import annotations

import pytest
import torch

from optimizers.linalg.counter_normals import counter_normals, counter_words
from optimizers.linalg.newton_schulz import newton_schulz
from optimizers.linalg.polar import EXACT, polar
from optimizers.linalg.subspace import randomized_basis, test_matrix

test_matrix.__test__ = False  # type: ignore[attr-defined]


def matrices(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 48, 96, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", EXACT)
def test_a_factor_is_that_of_the_cpu(method: str, gpu_device: torch.device) -> None:
    expected = polar(matrices().double(), "svd").factor
    factor = polar(matrices().to(gpu_device), method).factor
    assert factor.device == gpu_device
    torch.testing.assert_close(factor.cpu().double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("below", [0.9, 0.5, 0.1, 1e-3])
def test_the_default_method_drops_what_the_cpu_drops(below: float, gpu_device: torch.device) -> None:
    """The last eight of 48 singular values lie below the cut, by this factor."""
    cut = 1.3e-3
    left, _, right = torch.linalg.svd(matrices().double(), full_matrices=False)
    values = torch.cat([torch.logspace(0, -2, 40), torch.full((8,), below * cut)]).double()
    stack = ((left * values) @ right).float()
    expected, result = polar(stack, "gram", rtol=cut), polar(stack.to(gpu_device), "dwh", rtol=cut)
    assert result.effective_rank is not None
    assert result.effective_rank.tolist() == [40, 40, 40]
    assert int(result.fallbacks) == 0
    # One ulp of entries of at most 1.
    torch.testing.assert_close(result.factor.cpu(), expected.factor, rtol=0, atol=3e-7)


def test_numbers_from_a_counter_are_those_of_the_cpu(gpu_device: torch.device) -> None:
    key = 0x9E3779B97F4A7C15
    assert torch.equal(counter_words(key, 1001, gpu_device).cpu(), counter_words(key, 1001, "cpu"))
    ours, theirs = counter_normals(key, (1001,), gpu_device).cpu(), counter_normals(key, (1001,), "cpu")
    torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("method", ["gram", "dwh", "svd"])
def test_tf32_and_autocast_do_not_reach_a_factor(method: str, gpu_device: torch.device) -> None:
    expected = polar(matrices().to(gpu_device), method).factor
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast(gpu_device.type, dtype=torch.bfloat16):
            assert torch.equal(polar(matrices().to(gpu_device), method).factor, expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_newton_schulz_in_bf16_is_near_that_of_the_cpu(gpu_device: torch.device) -> None:
    expected = newton_schulz(matrices(), dtype=torch.bfloat16).float()
    found = newton_schulz(matrices().to(gpu_device), dtype=torch.bfloat16).float().cpu()
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_sketches_and_bases_are_deterministic(gpu_device: torch.device) -> None:
    first, again, other = (test_matrix(seed, "layer.weight", 7, (96, 16), gpu_device) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    stack = matrices().to(gpu_device)
    sketch = test_matrix(0, "layer.weight", 7, (96, 16), gpu_device)
    bases = [randomized_basis(stack, 8, "left", sketch) for _ in range(2)]
    assert torch.equal(*bases)
