"""Factors, bases and sketches on the device are those of the CPU."""

from __future__ import annotations

import pytest
import torch

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
    first, again, other = (
        test_matrix(seed, "layer.weight", 7, (96, 16)).to(gpu_device) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    stack = matrices().to(gpu_device)
    sketch = test_matrix(0, "layer.weight", 7, (96, 16)).to(gpu_device)
    bases = [randomized_basis(stack, 8, "left", sketch) for _ in range(2)]
    assert torch.equal(*bases)
