"""Half-precision weights: moments in fp32, one rounding, and the two ways not to lose small updates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import optimizers
from optimizers.rounding import Rounding, compensated, stochastic_bf16
from tests.optimizers.test_masked_steps import give_gradients, options, parameters


def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour() -> None:
    value = torch.full((200_000,), 1.0 + 2.0**-7 * 0.3)
    rounded = stochastic_bf16(value, Rounding("stochastic", 1).bits(value, "w", 0)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2.0**-7}
    # Standard error of the share: √(.3·.7/2e5) = 1e-3; five of them.
    share = (rounded > 1.0).float().mean().item()
    assert share == pytest.approx(0.3, abs=5e-3)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -2.0, float("inf"), float("-inf")])
def test_what_bf16_can_hold_stays(value: float) -> None:
    x = torch.full((1000,), value)
    assert torch.equal(stochastic_bf16(x, Rounding("stochastic").bits(x, "w", 3)).float(), x)


def test_nan_stays_nan() -> None:
    x = torch.full((100,), float("nan"))
    assert stochastic_bf16(x, Rounding("stochastic").bits(x, "w", 3)).isnan().all()


def test_the_bits_depend_on_seed_name_and_step_alone() -> None:
    x = torch.zeros(64)
    bits = Rounding("stochastic", 1).bits(x, "w", 5)
    torch.manual_seed(99)
    assert torch.equal(bits, Rounding("stochastic", 1).bits(x, "w", 5))
    for other in (Rounding("stochastic", 2).bits(x, "w", 5), Rounding("stochastic", 1).bits(x, "v", 5)):
        assert not torch.equal(bits, other)


def test_kahan_keeps_what_bf16_drops() -> None:
    weight, lost = torch.ones(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    for _ in range(1000):
        weight, lost = compensated(weight, torch.full((1,), 1e-4), lost)
    # 1000 · 1e-4 = 0.1; the compensation itself has 8 bits, so each step may lose 2⁻⁹ of it.
    assert (weight + lost).float().item() == pytest.approx(1.1, rel=5e-3)
    plain = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(1000):
        plain = (plain.float() + 1e-4).bfloat16()
    assert plain.item() == 1.0


@pytest.mark.parametrize("preset", ["sumo", "muon", "galore", "adamw"])
def test_small_updates_move_bf16_weights_only_with_care(preset: str) -> None:
    """100 steps of a constant direction, each of about 0.04 bf16 ulp of the weight, 4 ulp in all."""
    lr = {"sumo": 4.8e-3, "muon": 7.6e-3, "galore": 3.6e-3, "adamw": 2e-4}[preset]

    def moved(rounding: str, dtype: torch.dtype) -> float:
        weight = torch.nn.Parameter(torch.full((16, 32), 1.0, dtype=dtype))
        known = options(
            preset, weight_decay=0.0, rounding=rounding, norm_growth_limit=None, refresh_interval=100
        )
        optimizer = optimizers.build(preset, [("w", weight)], lr=lr, **known)
        gradient = torch.linspace(0.5, 1.5, 16)[:, None] * torch.ones(32)
        for _ in range(100):
            weight.grad = (0.01 * gradient).to(dtype)
            optimizer.step()
        return (weight.detach().float() - 1.0).mean().item()

    exact = moved("nearest", torch.float32)
    assert -0.03 < exact < -0.01
    assert moved("nearest", torch.bfloat16) == 0.0
    for rounding in ("stochastic", "kahan"):
        # Kahan's weights end within half an ulp (0.002) of where they should be; the mean of 1,024 stochastic
        # ones has a standard deviation of 2·ulp/32.
        assert moved(rounding, torch.bfloat16) == pytest.approx(exact, abs=0.002)


@pytest.mark.parametrize("preset", ["sumo", "muon_svd", "galore"])
def test_a_bf16_step_is_the_fp32_step_rounded_once(preset: str) -> None:
    half, single = parameters(torch.bfloat16), parameters(torch.bfloat16)
    wide = {name: torch.nn.Parameter(p.detach().float()) for name, p in single.items()}
    a: Any = optimizers.build(preset, half.items(), lr=0.05, **options(preset))
    b: Any = optimizers.build(preset, wide.items(), lr=0.05, **options(preset))
    give_gradients(half, 0)
    for name, p in wide.items():
        gradient = half[name].grad
        assert gradient is not None
        p.grad = gradient.float()
    a.step()
    b.step()
    for name in ("a", "b", "c"):
        assert a.state[half[name]]["moment"].dtype == torch.float32
        assert torch.equal(a.state[half[name]]["moment"], b.state[wide[name]]["moment"])
        # One of 192 elements may lie at a tie that a last fp32 bit decides.
        assert (half[name] != wide[name].bfloat16()).sum() <= 1
