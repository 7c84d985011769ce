"""GaLore against galore-torch (with canonical signs in its SVD) and an fp64 numpy oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import optimizers
from optimizers.linalg.subspace import canonical_signs
from optimizers.reference import AdamW, GaLore
from tests.optimizers.problems import run_both
from tests.oracles.galore_torch import galore_adamw
from tests.oracles.streams import Stream

SHAPES = [(24, 16), (16, 24), (20, 20)]
RANK, LR, INTERVAL, STEPS = 4, 0.05, 7, 30
# fp64 on both sides; two SVD algorithms and a gap of 0.2 between neighbouring singular values.
TOLERANCE = 1e-10


def distance(shape: tuple[int, int], oracle: dict[str, Any], **options: Any) -> float:
    reference = GaLore(Stream(shape, RANK).start, RANK, LR, INTERVAL, **oracle)
    given = {"lr": LR, "rank": RANK, "refresh_interval": INTERVAL, **options}
    return run_both("galore", reference, Stream(shape, RANK), Stream(shape, RANK), STEPS, **given)


@pytest.mark.parametrize("shape", SHAPES)
def test_thirty_steps_agree_with_the_fp64_oracle(shape: tuple[int, int]) -> None:
    assert distance(shape, {}) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wrong", [{"side": "short"}, {"alpha": 1.0}, {"interval_": 6}])
def test_wrong_variants_are_told_apart(wrong: dict[str, Any], shape: tuple[int, int]) -> None:
    if "interval_" in wrong:
        assert distance(shape, {}, refresh_interval=wrong["interval_"]) > 1e3 * TOLERANCE
    else:
        assert distance(shape, wrong) > 1e3 * TOLERANCE


@pytest.mark.parametrize("raw", [True, False])
def test_both_places_of_epsilon(raw: bool) -> None:
    form = "raw" if raw else "corrected"
    assert distance((24, 16), {"raw_eps": raw, "eps": 1e-2}, eps_form=form, eps=1e-2) < TOLERANCE
    assert distance((24, 16), {"raw_eps": not raw, "eps": 1e-2}, eps_form=form, eps=1e-2) > 1e-4


def signed_svd(matrix: torch.Tensor, full_matrices: bool = True) -> tuple[torch.Tensor, ...]:
    """torch.linalg.svd in our sign convention for whichever side the projector keeps (the long side's
    partner)."""
    left, values, right = torch._linalg_svd(matrix, full_matrices)[:3]  # pyright: ignore[reportPrivateImportUsage]
    if matrix.shape[0] >= matrix.shape[1]:
        return left, values, canonical_signs(right.mT).mT
    return canonical_signs(left), values, right


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_galore_torch(shape: tuple[int, int], decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    public = galore_adamw()
    monkeypatch.setattr(torch.linalg, "svd", signed_svd)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours, theirs = torch.nn.Parameter(start.float()), torch.nn.Parameter(start.float())
    bias, their_bias = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(5))
    a = optimizers.build(
        "galore",
        [("w", ours), ("bias", bias)],
        lr=LR,
        rank=RANK,
        refresh_interval=INTERVAL,
        alpha=0.25,
        aux_weight_decay=0.0,
        weight_decay=0.0,
    )
    group = {"params": [theirs], "rank": RANK, "update_proj_gap": INTERVAL, "scale": 0.25, "proj_type": "std"}
    b = public([group, {"params": [their_bias]}], lr=LR, weight_decay=0.0, no_deprecation_warning=True)
    if decay:
        a.param_groups[0]["weight_decay"] = decay
        a.param_groups[0]["decay_order"] = "after"
        b.param_groups[0]["weight_decay"] = decay
    stream = Stream(shape, RANK)
    for t in range(20):
        gradient = torch.from_numpy(stream(np.zeros(shape))).float()
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        bias.grad, their_bias.grad = torch.full((5,), 0.1 * t), torch.full((5,), 0.1 * t)
        a.step()
        b.step()
    # Their basis comes from an fp32 SVD, ours from an fp64 Gram: eps32·σ1/gap = 6e-7 per refresh, and Adam
    # divides by small entries of the second moment.
    moved = (theirs - start.float()).norm()
    assert (ours - theirs).norm() / moved < 1e-4
    torch.testing.assert_close(bias, their_bias, rtol=1e-6, atol=1e-7)


def test_the_aux_parameters_follow_the_public_code_s_adam() -> None:
    bias = torch.nn.Parameter(torch.ones(3, 1, 1, dtype=torch.float64))
    weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
    optimizer = optimizers.build("galore", [("w", weight), ("b.bias", bias)], lr=0.1, rank=2)
    oracle = AdamW(np.ones((3, 1, 1)), 0.1, (0.9, 0.999), 1e-6, raw_eps=True)
    for t in range(10):
        bias.grad = torch.full_like(bias, 1e-6 * (t + 1))
        weight.grad = torch.eye(4, dtype=torch.float64)
        optimizer.step()
        oracle.step(bias.grad.numpy())
    np.testing.assert_allclose(bias.detach().numpy(), oracle.weight, rtol=1e-12)


@pytest.mark.parametrize(
    ("shape", "numbers"), [((24, 16), 16 * 4 + 2 * 24 * 4), ((16, 24), 16 * 4 + 2 * 24 * 4)]
)
def test_state_formula(shape: tuple[int, int], numbers: int) -> None:
    """r·short for the basis and 2·r·long for the moments: what the public code stores, not the paper's 2nr +
    mr."""
    optimizer = optimizers.GaLore([torch.nn.Parameter(torch.randn(shape))], rank=4)
    assert sum(optimizer.state_bytes().values()) == 4 * numbers
