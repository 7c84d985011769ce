"""SUMO against an fp64 numpy oracle written from the paper, and the numerical facts that its algebra
implies."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import optimizers
from optimizers.reference import Sumo
from optimizers.reference.matrices import polar
from tests.optimizers.problems import run_both
from tests.oracles.streams import Stream

SHAPES = [(24, 16), (16, 24), (20, 20)]
RANK, LR, INTERVAL, STEPS = 4, 0.05, 7, 30

# fp64 weights are stepped in fp64. What remains is the randomized basis, whose subspace error with two passes
# and a gap of 40 between signal and tail is below 40⁻⁵ = 1e-8, times the spectrum's amplification of about
# 10.
TOLERANCE = 1e-7

ORACLES: dict[str, dict[str, Any]] = {
    "sumo_paper": {},
    "sumo_official": {
        "side": "long",
        "transport": False,
        "nesterov": "stored",
        "alpha": 4.0,
        "decay": 0.01,
        "decay_last": True,
        "offset": 1,
    },
    "sumo_ns5": {"orthogonalizer": "newton_schulz"},
    "galore_muon": {
        "side": "long",
        "transport": False,
        "nesterov": True,
        "orthogonalizer": "newton_schulz",
        "residual": 0.0,
    },
}


def distance(preset: str, shape: tuple[int, int], oracle: dict[str, Any], **options: Any) -> float:
    """‖W - W_oracle‖ / ‖W_oracle - W_0‖ after 30 steps with refreshes inside, each on its own feedback."""
    lr = LR / 4 if preset == "sumo_official" else LR
    reference = Sumo(Stream(shape, RANK).start, RANK, lr, INTERVAL, **oracle)
    given = {"rank": RANK, "refresh_interval": INTERVAL, "orthogonalizer_dtype": "float32", **options}
    return run_both(preset, reference, Stream(shape, RANK), Stream(shape, RANK), STEPS, lr=lr, **given)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preset", sorted(ORACLES))
def test_thirty_steps_agree_with_the_fp64_oracle(preset: str, shape: tuple[int, int]) -> None:
    assert distance(preset, shape, ORACLES[preset]) < TOLERANCE


def test_our_preset_is_still_the_paper_s() -> None:
    """Once it differs, docs/optimizers.md has to justify it by measurements, and it needs an oracle of its own."""
    # When the matrices of a large model are refreshed is no part of Algorithm 1, which has one matrix.
    ours, paper = optimizers.resolve("sumo"), optimizers.resolve("sumo_paper")
    assert {key for key in ours if ours[key] != paper[key]} == {"refresh_stagger"}


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize(
    ("wrong", "preset"),
    [
        ({"side": "long"}, "sumo_paper"),
        ({"side": "short"}, "sumo_official"),
        ({"transport": False}, "sumo_paper"),
        ({"residual": 0.0}, "sumo_paper"),
        ({"offset": 0}, "sumo_official"),
        ({"nesterov": True}, "sumo_official"),
        ({"orthogonalizer": "svd"}, "sumo_ns5"),
        ({"momentum": 0.9}, "sumo_paper"),
    ],
)
def test_wrong_variants_are_told_apart(wrong: dict[str, Any], preset: str, shape: tuple[int, int]) -> None:
    assert distance(preset, shape, {**ORACLES[preset], **wrong}) > 1e3 * TOLERANCE


@pytest.mark.parametrize("preset", ["sumo_paper", "sumo_official"])
def test_fp32_weights_stay_at_fp32_rounding_of_the_oracle(preset: str) -> None:
    # 30 steps of fp32 arithmetic on a feedback loop: 30·eps32 ≈ 4e-6, times the condition number (≈ 10).
    reference = Sumo(Stream((24, 16), RANK).start, RANK, LR, INTERVAL, **ORACLES[preset])
    error = run_both(
        preset,
        reference,
        Stream((24, 16), RANK),
        Stream((24, 16), RANK),
        STEPS,
        dtype=torch.float32,
        lr=LR,
        rank=RANK,
        refresh_interval=INTERVAL,
    )
    assert error < 1e-4


@pytest.mark.parametrize("basis", ["svd", "randomized"])
def test_both_bases_give_the_same_weights_where_the_subspace_is_clear(basis: str) -> None:
    assert distance("sumo_paper", (24, 16), {}, basis=basis) < TOLERANCE


# The numbered checks of the dossier (science/sumo.md §8) follow. 8 and 9 are about linalg, 10 about memory
# formulas.


def one_step(shape: tuple[int, int], gradient: np.ndarray, **options: Any) -> tuple[np.ndarray, Any]:
    """ΔW/lr of a first step from W = 0, and the optimizer."""
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    weight.grad = torch.from_numpy(gradient.copy())
    optimizer = optimizers.SUMO([weight], lr=1.0, preset="sumo_paper", **options)
    optimizer.step()
    return -weight.detach().numpy(), optimizer


@pytest.fixture
def gradient() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((24, 16))


def basis_of(optimizer: Any) -> np.ndarray:
    (state,) = optimizer.state.values()
    return state["basis"].numpy()


def test_1_the_residual_form_needs_no_residual(gradient: np.ndarray) -> None:
    delta, optimizer = one_step((24, 16), gradient, rank=4, update_scale="none")
    q = basis_of(optimizer)
    o = polar(q.T @ gradient)
    np.testing.assert_allclose(delta, (gradient - q @ q.T @ gradient) + q @ o, atol=1e-13)
    np.testing.assert_allclose(delta, gradient - q @ (q.T @ gradient - o), atol=1e-13)


def test_2_the_orthogonal_part_has_unit_spectral_norm(gradient: np.ndarray) -> None:
    delta, _ = one_step((24, 16), gradient, rank=4, update_scale="none", residual_scale=0.0)
    assert np.linalg.norm(delta, 2) == pytest.approx(1.0, abs=1e-12)
    assert np.linalg.norm(delta) == pytest.approx(2.0, abs=1e-12)  # √r


def test_3_ema_and_sum_give_the_same_factor() -> None:
    assert distance("sumo_paper", (24, 16), {}, momentum_form="ema") < TOLERANCE


def test_4_with_transport_nothing_depends_on_the_basis_chosen() -> None:
    """Another orthonormal basis of the same subspaces: the signs flipped at each refresh."""
    flipped = Sumo(Stream((24, 16), RANK).start, RANK, LR, INTERVAL)
    refresh, count = flipped.refresh, 0

    def refresh_and_flip(gradient: np.ndarray) -> None:
        nonlocal count
        refresh(gradient)
        assert flipped.basis is not None
        turn = np.linalg.qr(np.random.default_rng(count).standard_normal((RANK, RANK)))[0]
        flipped.basis, flipped.moment, count = flipped.basis @ turn, turn.T @ flipped.moment, count + 1

    flipped.refresh = refresh_and_flip  # type: ignore[method-assign]
    options = {"lr": LR, "rank": RANK, "refresh_interval": INTERVAL}
    streams = Stream((24, 16), RANK), Stream((24, 16), RANK)
    assert run_both("sumo_paper", flipped, *streams, STEPS, **options) < TOLERANCE


def test_4_control_without_transport_the_basis_matters() -> None:
    assert distance("sumo_paper", (24, 16), {"transport": False}) > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_5_with_no_history_both_sides_agree(shape: tuple[int, int]) -> None:
    gradient = np.random.default_rng(4).standard_normal(shape)
    short, _ = one_step(shape, gradient, rank=4, side="short", basis="svd")
    long, _ = one_step(shape, gradient, rank=4, side="long", basis="svd")
    u, _, vt = np.linalg.svd(gradient)
    np.testing.assert_allclose(short, long, atol=1e-12)
    residual = gradient - u[:, :4] @ u[:, :4].T @ gradient
    np.testing.assert_allclose(short - residual, 0.2 * np.sqrt(max(shape)) * u[:, :4] @ vt[:4], atol=1e-12)


def test_6_the_limiter_never_fires_with_an_exact_factor() -> None:
    off = distance("sumo_paper", (24, 16), {})
    on = distance("sumo_paper", (24, 16), {}, norm_growth_limit=1.1)
    assert max(on, off) < TOLERANCE


def test_6_control_it_fires_with_newton_schulz_when_a_limit_is_tight() -> None:
    limited = {"orthogonalizer": "newton_schulz", "limiter": 1.001}
    assert distance("sumo_ns5", (24, 16), limited, norm_growth_limit=1.001) < TOLERANCE
    assert distance("sumo_ns5", (24, 16), limited) > 1e3 * TOLERANCE


def test_7_transport_is_a_contraction() -> None:
    weight = torch.nn.Parameter(torch.zeros(24, 16, dtype=torch.float64))
    optimizer = optimizers.SUMO([weight], lr=0.1, rank=4, refresh_interval=1, basis="svd")
    stream = Stream((24, 16), 4)
    old = None
    for _ in range(5):
        weight.grad = torch.from_numpy(stream(weight.detach().numpy()))
        optimizer.step()
        new = basis_of(optimizer).copy()
        if old is not None:
            assert np.linalg.norm(new.T @ old, 2) <= 1 + 1e-12
        old = new


def test_11_stored_nesterov_is_a_recursion_with_decay_mu_squared(gradient: np.ndarray) -> None:
    weight = torch.nn.Parameter(torch.zeros(24, 16, dtype=torch.float64))
    optimizer = optimizers.SUMO([weight], lr=0.1, preset="sumo_official", rank=4)
    moment = 0.0
    for scale in (1.0, -0.5, 2.0):
        weight.grad = torch.from_numpy(gradient * scale)
        optimizer.step()
        moment = 1.95 * (scale * gradient) @ basis_of(optimizer) + 0.95**2 * moment
    (state,) = optimizer.state.values()
    np.testing.assert_allclose(state["moment"].numpy(), moment, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preset", ["sumo_paper", "sumo_official", "sumo_ns5", "galore_muon"])
def test_12_the_state_is_r_times_m_plus_n_numbers(preset: str, shape: tuple[int, int]) -> None:
    weight = torch.nn.Parameter(torch.randn(shape))
    optimizer = optimizers.build(preset, [("w", weight)], rank=4)
    tensors = [v for v in optimizer.state_dict()["state"][0].values() if isinstance(v, torch.Tensor)]
    assert sum(t.numel() for t in tensors) == 4 * sum(shape)
    assert sum(optimizer.state_bytes().values()) == 4 * 4 * sum(shape)  # type: ignore[attr-defined]


def test_13_directions_that_a_rank_deficient_moment_lacks_are_dropped() -> None:
    random = np.random.default_rng(5)
    gradient = random.standard_normal((24, 3)) @ random.standard_normal((3, 16))
    for basis in ("svd", "randomized"):
        delta, optimizer = one_step((24, 16), gradient, rank=8, basis=basis, update_scale="none")
        assert np.linalg.norm(delta) ** 2 == pytest.approx(3.0, abs=1e-9)
        assert np.count_nonzero(np.linalg.norm(basis_of(optimizer), axis=0)) == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [("none", 1.0), ("rms_max", 0.2 * 24**0.5), ("rows_cols", 1.5**0.5), ("rms_rank", 0.2 * 96**0.5)],
)
def test_update_scales(gradient: np.ndarray, name: str, expected: float) -> None:
    delta, _ = one_step((24, 16), gradient, rank=4, update_scale=name, residual_scale=0.0)
    assert np.linalg.norm(delta, 2) == pytest.approx(expected, rel=1e-12)


def test_rms_rank_makes_the_rms_independent_of_the_rank(gradient: np.ndarray) -> None:
    for rank in (1, 4, 16):
        delta, _ = one_step((24, 16), gradient, rank=rank, update_scale="rms_rank", residual_scale=0.0)
        assert np.sqrt((delta**2).mean()) == pytest.approx(0.2, rel=1e-12)


def test_alpha_scales_the_update_and_not_the_decay(gradient: np.ndarray) -> None:
    def moved(alpha: float) -> np.ndarray:
        weight = torch.nn.Parameter(torch.ones(24, 16, dtype=torch.float64))
        weight.grad = torch.from_numpy(gradient.copy())
        optimizers.SUMO([weight], lr=0.1, rank=4, alpha=alpha, weight_decay=0.5).step()
        return weight.detach().numpy() - (1 - 0.1 * 0.5)

    np.testing.assert_allclose(moved(3.0), 3.0 * moved(1.0), atol=1e-13)


@pytest.mark.parametrize("target", ["factor", "residual", "total"])
def test_the_limiter_bounds_the_growth_of_its_target(target: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(24, 16, dtype=torch.float64))
    optimizer = optimizers.SUMO(
        [weight],
        lr=1.0,
        rank=4,
        update_scale="none",
        refresh_interval=100,
        norm_growth_limit=1.5,
        norm_growth_target=target,
        orthogonalizer="newton_schulz",
    )
    stream, norms = Stream((24, 16), 4), []
    for t in range(6):
        before = weight.detach().clone()
        weight.grad = torch.from_numpy(stream(np.zeros((24, 16))) * 3.0**t)
        optimizer.step()
        q = torch.from_numpy(basis_of(optimizer))
        delta = before - weight.detach()
        inside = q @ (q.T @ delta)
        part = {"factor": inside, "residual": delta - inside, "total": delta}[target]
        norms.append(float(part.norm()))
    growth = [b / a for a, b in pairwise(norms)]
    assert max(growth) <= 1.5 + 1e-9
    if target == "residual":
        assert max(growth) > 1.49  # it grows by 3 a step without the limiter


def test_a_residual_criterion_refreshes_one_step_after_the_projection_got_small() -> None:
    weight = torch.nn.Parameter(torch.zeros(24, 16, dtype=torch.float64))
    optimizer = optimizers.SUMO(
        [weight], lr=0.1, rank=2, refresh_interval=1000, refresh_threshold=0.5, basis="svd"
    )
    random = np.random.default_rng(0)
    first = np.outer(random.standard_normal(24), random.standard_normal(16))
    second = np.outer(random.standard_normal(24), random.standard_normal(16))
    bases = []
    for t in range(6):
        g = first + 1e-3 * second if t < 2 else 1e-3 * first + second
        weight.grad = torch.from_numpy(g * (1.0 if t < 2 else 0.01) if t < 3 else g)
        optimizer.step()
        bases.append(basis_of(optimizer).copy())
    same = [bool(np.array_equal(a, b)) for a, b in pairwise(bases)]
    # Step 2 projects to less than ς, so step 3 takes a new basis; afterwards the projection is large again.
    assert same == [True, True, False, True, True]


def test_staggered_refreshes_are_spread_over_the_interval() -> None:
    weights = [torch.nn.Parameter(torch.zeros(12, 8)) for _ in range(4)]
    optimizer = optimizers.SUMO(
        weights, lr=0.01, rank=2, refresh_interval=8, refresh_stagger=True, basis="svd"
    )
    generator = torch.Generator().manual_seed(0)
    refreshed: list[list[int]] = [[] for _ in weights]
    old: list[torch.Tensor] = [torch.zeros(1) for _ in weights]
    for t in range(20):
        for w in weights:
            w.grad = torch.randn(w.shape, generator=generator)
        optimizer.step()
        for i, w in enumerate(weights):
            basis = optimizer.state[w]["basis"].clone()
            if t == 0 or not torch.equal(basis, old[i]):
                refreshed[i].append(t)
            old[i] = basis
    assert refreshed == [[0, 8, 16], [0, 6, 14], [0, 4, 12], [0, 2, 10, 18]]


def test_a_basis_that_a_zero_gradient_left_empty_is_taken_at_the_next_step(gradient: np.ndarray) -> None:
    weight = torch.nn.Parameter(torch.zeros(24, 16, dtype=torch.float64))
    optimizer = optimizers.SUMO([weight], lr=0.1, rank=4, refresh_interval=100)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert not weight.any()
    assert not basis_of(optimizer).any()
    weight.grad = torch.from_numpy(gradient.copy())
    optimizer.step()
    assert np.linalg.norm(basis_of(optimizer), 2) == pytest.approx(1.0)


def test_clipping_after_orthogonalization_is_another_optimizer() -> None:
    """The gradient's scale does not reach QO, so clipping the gradient and clipping the update differ."""
    shape = (24, 16)
    reference = Sumo(Stream(shape, RANK).start, RANK, LR, INTERVAL, residual=0.0)
    free, clipped_after = (
        Stream(shape, RANK),
        Sumo(Stream(shape, RANK).start, RANK, LR, INTERVAL, residual=0.0),
    )
    options = {"lr": LR, "rank": RANK, "refresh_interval": INTERVAL, "residual_scale": 0.0}
    # Clipped before: the same weights, because the factor ignores a positive scale of all its gradients.
    clip = 0.1
    error = run_both(
        "sumo_paper", reference, free, Stream(shape, RANK), STEPS, gradient_scale=clip, **options
    )
    assert error < TOLERANCE
    clipped_after.scale = clip
    error = run_both("sumo_paper", clipped_after, Stream(shape, RANK), Stream(shape, RANK), STEPS, **options)
    assert error > 0.1


def test_the_randomized_basis_captures_the_energy_of_real_gradients() -> None:
    """At least 0.98 of what the best basis of the same rank does, from a cold start and warmed up by the last one."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    net = LlamaForCausalLM(config)
    options = {"rank": 12, "refresh_interval": 3, "basis": "randomized"}
    optimizer = optimizers.build("sumo", net.named_parameters(), modules=net, lr=1e-3, **options)
    for t in range(4):
        ids = torch.randint(0, 64, (4, 32))
        optimizer.zero_grad()
        net(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if t % 3:
            continue
        for parameter in optimizer.param_groups[0]["params"]:
            gradient, basis = parameter.grad, optimizer.state[parameter]["basis"]
            left = gradient.shape[0] >= gradient.shape[1]
            captured = (basis.mT @ gradient if left else gradient @ basis).square().sum()
            best = torch.linalg.svdvals(gradient)[:12].square().sum()
            assert captured >= 0.98 * best
