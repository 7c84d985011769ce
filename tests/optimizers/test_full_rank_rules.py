"""NorMuon, AdaMuon, SOAP, Dion2 and Lion against their fp64 twins and pytorch_optimizer."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

import optimizers
from optimizers import reference
from tests.optimizers.problems import run_both
from tests.oracles.streams import Stream

SHAPES = [(24, 16), (16, 24), (20, 20)]
RANK = 12
"""Of the signal: the momentum is well conditioned enough for fp64 to agree to rounding over the steps."""
STEPS = 30
TOLERANCE = 1e-9
"""fp64 on both sides, 1e-16 a product; Newton–Schulz has the slope 485 at 0, and an element of AdaMuon's factor that
is 1e-4 of the others is known to 1e-4 of their accuracy."""
FP64: dict[str, Any] = {"orthogonalizer_dtype": "float32"}
"""Rules iterate in fp64 where weights are fp64 and this option is not bfloat16."""

RULES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "lion": (reference.Lion, {"decay": 1.0}, {}),
    "normuon": (reference.NorMuon, {"decay": 0.1}, FP64),
    "adamuon": (reference.AdaMuon, {"decay": 0.1}, FP64),
    "soap": (reference.Soap, {"decay": 1e-4, "interval": 3}, {"refresh_interval": 3}),
    "dion2": (reference.Dion2, {"decay": 0.1}, {"orthogonalizer": "svd", "weight_decay": 0.1}),
}
"""Preset → its twin, the twin's settings, and options of the preset."""


def distance(preset: str, shape: tuple[int, int], wrong: dict[str, Any] | None = None, **more: Any) -> float:
    """‖W - W_twin‖ over the twin's way, after `STEPS`."""
    twin, settings, options = RULES[preset]
    oracle = twin(Stream(shape, RANK).start, 0.02, **{**settings, **(wrong or {})})
    streams = Stream(shape, RANK), Stream(shape, RANK)
    return run_both(preset, oracle, *streams, STEPS, lr=0.02, **{**options, **more})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preset", list(RULES))
def test_thirty_steps_agree_with_the_fp64_twin(preset: str, shape: tuple[int, int]) -> None:
    assert distance(preset, shape) < TOLERANCE


@pytest.mark.parametrize(
    ("preset", "wrong"),
    [
        ("lion", {"betas": (0.9, 0.9)}),
        ("lion", {"betas": (0.99, 0.9)}),
        ("lion", {"decay": 0.0}),
        ("normuon", {"beta2": 0.9}),
        ("normuon", {"nesterov": True}),
        ("normuon", {"momentum": 0.9}),
        ("adamuon", {"signs": False}),
        ("adamuon", {"beta2": 0.9}),
        ("adamuon", {"decay": 0.0}),
        ("dion2", {"fraction": 0.5}),
        ("dion2", {"decays_all": True}),
        ("dion2", {"chooses_all": True}),
        ("soap", {"interval": 4}),
        ("soap", {"sorts": False}),
        ("soap", {"left": False}),
        ("soap", {"betas": (0.9, 0.95)}),
    ],
)
def test_wrong_variants_are_told_apart(preset: str, wrong: dict[str, Any]) -> None:
    assert distance(preset, (24, 16), wrong) > 1e6 * TOLERANCE


def test_options_move_the_rule_as_they_move_its_twin() -> None:
    assert (
        distance("normuon", (24, 16), {"nesterov": True, "beta2": 0.9}, nesterov=True, beta2=0.9) < TOLERANCE
    )
    assert distance("dion2", (24, 16), {"fraction": 0.6}, fraction=0.6) < TOLERANCE
    assert distance("adamuon", (24, 16), {"signs": False}, stabilizer="none") < TOLERANCE
    assert distance("lion", (24, 16), {"betas": (0.95, 0.98)}, betas=(0.95, 0.98)) < TOLERANCE


@pytest.mark.parametrize("preset", ["normuon", "adamuon", "dion2"])
def test_control_halves_of_a_matrix_take_another_step(preset: str) -> None:
    """What sharding without communication would do: the factor, and the norms of its rows, of what a rank holds."""
    gradient = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    for axis in (0, 1):
        moved = []
        for parts in (gradient.chunk(2, axis), (gradient,)):
            weights = [torch.nn.Parameter(torch.zeros_like(part)) for part in parts]
            optimizer = optimizers.build(
                preset, [(f"w{i}", w) for i, w in enumerate(weights)], lr=1.0, **FP64
            )
            for weight, part in zip(weights, parts):
                weight.grad = part.clone()
            optimizer.step()
            moved.append(torch.cat([w.detach() for w in weights], axis))
        assert (moved[0] - moved[1]).norm() / moved[1].norm() > 0.05


def test_neurons_of_a_transposed_weight_are_its_columns() -> None:
    """Conv1D of transformers stores (in, out): the step is that of the Linear of the same map, transposed."""
    from transformers.pytorch_utils import Conv1D

    moved = []
    gradient = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    for module, part in ((torch.nn.Linear(6, 20, bias=False), gradient.T), (Conv1D(20, 6), gradient)):
        model = torch.nn.ModuleDict({"layer": module})
        torch.nn.init.zeros_(module.weight)
        optimizer = optimizers.build("normuon", model.named_parameters(), modules=model, lr=1.0, **FP64)
        for _ in range(3):
            module.weight.grad = part.clone()
            optimizer.step()
        moved.append(module.weight.detach())
    torch.testing.assert_close(moved[0].T, moved[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", ["normuon", "adamuon"])
def test_updates_have_the_stated_root_mean_square(preset: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(24, 16))
    optimizer = optimizers.build(
        preset, [("w", weight)], lr=1.0, weight_decay=0.0, factor_rms=0.3, alpha=2.0, **FP64
    )
    weight.grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(2))
    optimizer.step()
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.6, rel=1e-5)
    # A zero gradient moves nothing, and leaves no NaN.
    other = torch.nn.Parameter(torch.ones(5, 7))
    still = optimizers.build(preset, [("w", other)], lr=1.0, weight_decay=0.0, **FP64)
    other.grad = torch.zeros(5, 7)
    still.step()
    assert torch.equal(other.detach(), torch.ones(5, 7))


def test_a_step_of_dion2_moves_the_chosen_slices_only() -> None:
    moved = {}
    for select, shape in (
        ("short", (24, 16)),
        ("short", (16, 24)),
        ("rows", (24, 16)),
        ("columns", (16, 24)),
    ):
        weight = torch.nn.Parameter(torch.zeros(shape))
        optimizer = optimizers.build("dion2", [("w", weight)], lr=1.0, select=select, **FP64)
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        optimizer.step()
        is_moved = weight.detach() != 0
        axis = int(bool(is_moved.any(1).all()))
        largest = weight.grad.abs().sum(1 - axis).topk(shape[axis] // 4).indices.sort().values
        assert torch.equal(is_moved.any(1 - axis).nonzero().flatten(), largest)
        moved[select, shape] = axis
    assert list(moved.values()) == [1, 0, 0, 1]
    # A fraction that floats cannot hold: 0.1 of 30 rows is three of them.
    from optimizers.rules.dion2 import selection

    assert selection((30, 40), {"fraction": 0.1, "select": "short"}) == (0, 3)
    assert selection((3, 40), {"fraction": 0.1, "select": "short"}) == (0, 1)


def test_the_state_is_what_the_papers_need() -> None:
    shapes = {"lion": 24 * 16, "normuon": 24 * 16 + 24, "adamuon": 2 * 24 * 16}
    for preset, numbers in shapes.items():
        weight = torch.nn.Parameter(torch.randn(24, 16))
        optimizer: Any = optimizers.build(preset, [("w", weight)], lr=0.1)
        assert sum(optimizer.state_bytes().values()) == 4 * numbers


def peer(preset: str, weight: torch.nn.Parameter) -> torch.optim.Optimizer:
    """The same rule of pytorch_optimizer, in fp64, with the settings of the paper."""
    import pytorch_optimizer as p

    group = {"params": [weight], "use_muon": True}
    if preset == "lion":
        return p.Lion([weight], lr=0.02, betas=(0.9, 0.99), weight_decay=1.0, weight_decouple=True)
    if preset == "normuon":
        return p.NorMuon(
            [group], lr=0.02, nesterov=False, update_scale="match_rms", weight_decay=0.1, foreach=False
        )
    # Its ε is corrected with V's bias; ours is not: neither matters when it is tiny.
    return p.AdaMuon(
        [group], lr=0.02, betas=(0.95, 0.95), weight_decay=0.1, eps=1e-30, use_adjusted_lr=True, foreach=False
    )


@pytest.mark.skipif(find_spec("pytorch_optimizer") is None, reason="extra: oracles")
@pytest.mark.parametrize(("shape", "max_side"), [((24, 16), 16), ((16, 24), 16), ((20, 20), None)])
def test_soap_of_pytorch_optimizer(shape: tuple[int, int], max_side: int | None) -> None:
    """Both sides of a square matrix, and the short side of others: a basis of more vectors than a gradient determines
    is arbitrary there. It takes QR in fp32, 6e-8 a number, which the condition number of L (1e4) amplifies."""
    import pytorch_optimizer as p

    stream = Stream(shape, RANK, tail=0.1)
    ours, theirs = (torch.nn.Parameter(torch.from_numpy(stream.start.copy())) for _ in range(2))
    settings = {"lr": 0.02, "betas": (0.95, 0.95), "weight_decay": 0.0}
    a = optimizers.build("soap", [("w", ours)], refresh_interval=3, max_side=max_side, **settings)
    b = p.SOAP([theirs], precondition_frequency=3, max_precondition_dim=max_side or 10000, **settings)
    for _ in range(12):
        gradient = torch.from_numpy(stream(np.zeros(shape)))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    start = torch.from_numpy(stream.start)
    assert (ours - theirs).norm() / (theirs - start).norm() < 1e-3


@pytest.mark.skipif(find_spec("pytorch_optimizer") is None, reason="extra: oracles")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preset", ["lion", "normuon", "adamuon"])
def test_pytorch_optimizer(preset: str, shape: tuple[int, int]) -> None:
    """The second implementation. It rounds Newton–Schulz to bf16, which is taken from it here."""
    from pytorch_optimizer.optimizer.muon import adamuon, normuon
    from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5

    stream = Stream(shape, RANK)
    ours, theirs = (torch.nn.Parameter(torch.from_numpy(stream.start.copy())) for _ in range(2))
    more: dict[str, Any] = {"adamuon": {"stabilizer": "none", "eps": 1e-30}}.get(preset, {})
    a = optimizers.build(preset, [("w", ours)], lr=0.02, **RULES[preset][2], **more)
    b = peer(preset, theirs)
    exact = partial(zero_power_via_newton_schulz_5, dtype=torch.float64)
    with (
        patch.object(adamuon, "zero_power_via_newton_schulz_5", exact),
        patch.object(normuon, "zero_power_via_newton_schulz_5", exact),
    ):
        for _ in range(10):
            gradient = torch.from_numpy(stream(np.zeros(shape)))
            ours.grad, theirs.grad = gradient.clone(), gradient.clone()
            a.step()
            b.step()
    start = torch.from_numpy(stream.start)
    assert (ours - theirs).norm() / (theirs - start).norm() < TOLERANCE
