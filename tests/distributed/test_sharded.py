"""DTensors on real gloo ranks: every rule moves shards as it moves whole matrices, whatever the cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import optimizers
from optimizers import moment_sample

if TYPE_CHECKING:
    from tests.distributed.pool import RankPool

EVEN = [(24, 16), (16, 24), (24, 16), (20, 20), (16,)]
# Over four ranks: locals 7,7,7,4 · 1,1,1,0 (an empty shard) · 4,4,4,1.
UNEVEN = [(25, 18), (3, 40), (13, 13), (25, 18), (5,)]
STEPS = 8
LOW = {"rank": 6, "refresh_interval": 3}
PRESETS: dict[str, dict[str, Any]] = {
    "sumo": LOW,
    "sumo_official": LOW,
    "sumo_ns5": {**LOW, "orthogonalizer_dtype": "float32"},
    "galore": LOW,
    "galore_muon": {**LOW, "orthogonalizer_dtype": "float32"},
    "fira": LOW,
    "apollo": LOW,
    "apollo_mini": {"refresh_interval": 3, "alpha": 1.0},
    "ldadam": {"rank": 6},
    "gum": {**LOW, "orthogonalizer_dtype": "float32", "full_rank_probability": 0.5},
    "subtrack": {**LOW, "track_step": 0.01},
    "dct_subspace": {"rank": 6},
    "muon": {"orthogonalizer_dtype": "float32"},
    "muon_svd": {},
    "normuon": {"orthogonalizer_dtype": "float32"},
    "adamuon": {"orthogonalizer_dtype": "float32"},
    "lion": {},
    "dion2": {"orthogonalizer_dtype": "float32"},
    "soap": {"refresh_interval": 3, "gram_dtype": "float64"},
    "adamw": {},
}


def gradients(shapes: list[tuple[int, ...]], step: int) -> list[torch.Tensor]:
    """Of decaying spectrum, so that a basis is a matter of the gradient and not of rounding."""
    generator = torch.Generator().manual_seed(100 + step)
    made = []
    for i, shape in enumerate(shapes):
        if len(shape) == 1:
            made.append(torch.randn(shape, generator=generator))
            continue
        k = min(shape)
        drift = torch.Generator().manual_seed(i)
        left, right = torch.randn(shape[0], k, generator=drift), torch.randn(k, shape[1], generator=drift)
        noise = torch.randn(shape, generator=generator)
        made.append((left * torch.arange(1, k + 1).float().pow(-1.0)) @ right + 0.1 * noise)
    return made


def weights(shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def alone(preset: str, shapes: list[tuple[int, ...]], **more: Any) -> list[torch.Tensor]:
    """What one process makes of the same gradients."""
    named = [(f"layers.{i}.w", nn.Parameter(w)) for i, w in enumerate(weights(shapes))]
    optimizer = optimizers.build(preset, named, lr=0.02, **{**PRESETS[preset], **more})
    for step in range(STEPS):
        for (_, p), gradient in zip(named, gradients(shapes, step)):
            p.grad = gradient
        optimizer.step()
    return [p.detach() for _, p in named]


def sharded(
    rank: int, preset: str, shapes: list[tuple[int, ...]], axis: int, replicas: int, more: dict[str, Any]
) -> dict[str, Any]:
    """Runs on each rank; all weights at the end, gathered, and what the optimizer sent."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,) if replicas == 1 else (replicas, world // replicas))

    def spread(tensor: torch.Tensor) -> Any:
        placement = Shard(axis if tensor.ndim > 1 else 0)
        return distribute_tensor(tensor, mesh, [placement] if replicas == 1 else [Replicate(), placement])

    named: list[Any] = [(f"layers.{i}.w", nn.Parameter(spread(w))) for i, w in enumerate(weights(shapes))]
    optimizer: Any = optimizers.build(preset, named, lr=0.02, **{**PRESETS[preset], **more})
    calls = []
    for step in range(STEPS):
        for (_, p), gradient in zip(named, gradients(shapes, step)):
            p.grad = spread(gradient)
        before = optimizer.collective_calls()
        optimizer.step()
        calls.append(optimizer.collective_calls() - before)
    return {
        "weights": [p.detach().full_tensor() for _, p in named],
        "calls": calls,
        "sent": optimizer.bytes_sent(),
        "state": optimizer.state_bytes(),
    }


def worst(found: list[torch.Tensor], expected: list[torch.Tensor], shapes: list[tuple[int, ...]]) -> float:
    """Largest relative error of a parameter's total change."""
    start = weights(shapes)
    errors = []
    for f, e, s in zip(found, expected, start):
        errors.append(float((f.double() - e.double()).norm() / (e.double() - s.double()).norm()))
    return max(errors)


# Sums of fp32 numbers in another order give 1e-7 a step; a moment with κ up to 1e2 amplifies that, and eight
# steps with two refreshes add up. Wrong algebra shows at 1e-2 and more.
TOLERANCE = 2e-5


FAMILIES = ("sumo", "galore", "muon", "adamw")


@pytest.mark.parametrize(
    ("preset", "axis"),
    [
        # Rows of every preset are cut in the next test, over four ranks.
        pytest.param(preset, axis, marks=[] if axis or preset in FAMILIES else pytest.mark.slow)
        for preset in PRESETS
        for axis in (0, 1)
    ],
)
def test_two_ranks_equal_one_process(two_ranks: RankPool, preset: str, axis: int) -> None:
    results = two_ranks.run(sharded, preset, EVEN, axis, 1, {})
    expected = alone(preset, EVEN)
    for result in results:
        assert worst(result["weights"], expected, EVEN) < TOLERANCE
    assert results[0]["calls"] == results[1]["calls"]


@pytest.mark.parametrize("preset", list(PRESETS))
def test_uneven_and_empty_shards(four_ranks: RankPool, preset: str) -> None:
    more = {"rank": 3} if "rank" in PRESETS[preset] else {}
    expected = alone(preset, UNEVEN, **more)
    for result in four_ranks.run(sharded, preset, UNEVEN, 0, 1, more):
        assert worst(result["weights"], expected, UNEVEN) < TOLERANCE


@pytest.mark.parametrize(
    "preset",
    [*FAMILIES, *(pytest.param(preset, marks=pytest.mark.slow) for preset in ("lion", "soap", "dion2"))],
)
def test_replicas_of_shards(four_ranks: RankPool, preset: str) -> None:
    """HSDP: two replicas of two shards."""
    results = four_ranks.run(sharded, preset, EVEN, 0, 2, {})
    expected = alone(preset, EVEN)
    for result in results:
        assert worst(result["weights"], expected, EVEN) < TOLERANCE
    first = results[0]["weights"]
    assert all(torch.equal(a, b) for result in results for a, b in zip(first, result["weights"]))


def broken(rank: int, preset: str, how: str) -> list[torch.Tensor]:
    """Runs on each rank with one sum over ranks left out."""
    from optimizers.layouts.layout import Unsharded
    from optimizers.layouts.sharded import ShardCollectives
    from optimizers.rules.parts import inner_rules

    original, prefers_gather = getattr(ShardCollectives, how), inner_rules.prefers_gather
    setattr(ShardCollectives, how, getattr(Unsharded, how))
    inner_rules.prefers_gather = lambda length, rank, ranks: False
    try:
        return sharded(rank, preset, EVEN, 0, 1, {})["weights"]
    finally:
        setattr(ShardCollectives, how, original)
        inner_rules.prefers_gather = prefers_gather


def by_scheme(rank: int, preset: str, gathers: bool) -> dict[str, Any]:
    """Runs on each rank with the factor's scheme given: rows to owners, or Grams."""
    from optimizers.rules.parts import inner_rules

    original = inner_rules.prefers_gather
    inner_rules.prefers_gather = lambda length, rank, ranks: gathers
    try:
        return sharded(rank, preset, UNEVEN, 0, 1, {"rank": 3})
    finally:
        inner_rules.prefers_gather = original


@pytest.mark.parametrize("preset", ["sumo", "sumo_official", "sumo_ns5"])
def test_both_schemes_of_the_factor_give_the_same(four_ranks: RankPool, preset: str) -> None:
    expected = alone(preset, UNEVEN, rank=3)
    sent = []
    for gathers in (True, False):
        results = four_ranks.run(by_scheme, preset, gathers)
        assert worst(results[0]["weights"], expected, UNEVEN) < TOLERANCE
        sent.append(results[0]["sent"])
    assert sent[0] != sent[1]


@pytest.mark.parametrize("preset", ["sumo", "sumo_official"])
@pytest.mark.parametrize("how", ["all_reduce", "inverse_roots"])
def test_control_a_sum_that_stays_local_is_seen(two_ranks: RankPool, preset: str, how: str) -> None:
    """What peers do: project or orthogonalize what the rank happens to hold."""
    found = two_ranks.run(broken, preset, how)[0]
    assert worst(found, alone(preset, EVEN), EVEN) > 1e-2


def test_collectives_do_not_grow_with_the_matrices(two_ranks: RankPool) -> None:
    """An ordinary step: kinds times stacks, whatever the number of matrices."""
    for preset in ("sumo", "galore", "muon"):
        few = two_ranks.run(sharded, preset, EVEN, 0, 1, {})[0]["calls"]
        many = two_ranks.run(sharded, preset, EVEN * 4, 0, 1, {})[0]["calls"]
        assert few == many


def test_only_the_chosen_submatrix_travels(two_ranks: RankPool) -> None:
    """A quarter of Muon's traffic and the norms, where the axis that is not chosen from is split; else all of it."""
    wide = [(16, 64)] * 4
    sent = {
        (preset, axis): sum(two_ranks.run(sharded, preset, wide, axis, 1, {})[0]["sent"].values())
        for preset in ("muon", "dion2")
        for axis in (0, 1)
    }
    norms = 4 * 16 * 8.0 * STEPS  # 2B(W - 1)/W of fp64 norms of 16 rows, four matrices
    assert sent["dion2", 0] == sent["muon", 0] == sent["muon", 1]
    assert sent["dion2", 1] == pytest.approx(sent["muon", 1] / 4 + norms, rel=0.01)


def test_state_is_divided(two_ranks: RankPool) -> None:
    """Muon's moments lie at their owners; SUMO's moment or basis lies with the rows."""
    from math import prod

    matrices = [prod(shape) for shape in EVEN if len(shape) == 2]
    muon = two_ranks.run(sharded, "muon", EVEN, 0, 1, {})
    assert sum(r["state"]["moment"] for r in muon) == 4 * sum(matrices)
    sumo = two_ranks.run(sharded, "sumo", EVEN, 0, 1, {})
    for result in sumo:
        # r(m_local + n) numbers of each matrix: rows are divided, columns are not.
        expected = sum(6 * (shape[0] // 2 + shape[1]) * 4 for shape in EVEN if len(shape) == 2)
        assert result["state"]["moment"] + result["state"]["basis"] == expected


def observed(rank: int, preset: str, is_sharded: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of the last step and spectra after it, as numbers."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    def spread(tensor: torch.Tensor) -> Any:
        if not is_sharded:
            return tensor
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return distribute_tensor(tensor, mesh, [Shard(0)])

    named: list[Any] = [(f"layers.{i}.w", nn.Parameter(spread(w))) for i, w in enumerate(weights(EVEN))]
    optimizer: Any = optimizers.build(preset, named, lr=0.02, **PRESETS[preset])
    for step in range(4):
        for (_, p), gradient in zip(named, gradients(EVEN, step)):
            p.grad = spread(gradient)
        optimizer.observe_moments(step == 3)
        optimizer.step()
    figures = {
        name: {key: float(value) for key, value in found.items()}
        for name, found in optimizer.moment_figures().items()
    }
    return figures, {name: values.tolist() for name, values in optimizer.moment_spectra().items()}


def sampled(rank: int, preset: str, is_sharded: bool) -> Any:
    with patch.object(moment_sample, "WORK_ON_CPU", 0.0):
        return observed(rank, preset, is_sharded)[0]


@pytest.mark.parametrize("preset", ["sumo", "muon", "adamw"])
def test_a_sample_of_sharded_moments_has_the_figures_of_the_whole_ones(
    two_ranks: RankPool, preset: str
) -> None:
    everything, _ = observed(0, preset, False)
    figures: dict[str, dict[str, float]] = {}
    for found in two_ranks.run(sampled, preset, True):
        figures.update(found)
    assert len(figures) == 1
    for name, columns in figures.items():
        for key, value in columns.items():
            assert value == pytest.approx(everything[name][key], rel=1e-3, abs=2e-5)


@pytest.mark.parametrize("preset", ["sumo", "sumo_official", "galore", "muon", "dion2", "adamw"])
def test_figures_and_spectra_are_those_of_the_whole_moments(two_ranks: RankPool, preset: str) -> None:
    """Whoever owns a matrix knows them; all owners together know all."""
    expected_figures, expected_spectra = observed(0, preset, False)
    figures: dict[str, dict[str, float]] = {}
    spectra: dict[str, list[float]] = {}
    for found in two_ranks.run(observed, preset, True):
        figures.update(found[0])
        spectra.update(found[1])
    assert figures.keys() == expected_figures.keys()
    assert len(figures) == 4
    for name, columns in expected_figures.items():
        assert figures[name].keys() == columns.keys()
        for key, value in columns.items():
            # Errors are themselves of rounding size (1e-7); condition numbers carry fp32 singular values.
            assert figures[name][key] == pytest.approx(value, rel=1e-3, abs=2e-5)
    for name, values in expected_spectra.items():
        torch.testing.assert_close(
            torch.tensor(spectra[name]), torch.tensor(values), rtol=1e-4, atol=1e-5 * max(values)
        )


def half(rank: int, preset: str, rounding: str, is_sharded: bool) -> list[torch.Tensor]:
    """bf16 weights and gradients; whole, as fp32."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    def spread(tensor: torch.Tensor) -> Any:
        tensor = tensor.to(torch.bfloat16)
        if not is_sharded:
            return tensor
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return distribute_tensor(tensor, mesh, [Shard(0)])

    named: list[Any] = [(f"layers.{i}.w", nn.Parameter(spread(w))) for i, w in enumerate(weights(EVEN))]
    optimizer: Any = optimizers.build(preset, named, lr=0.02, rounding=rounding, **PRESETS[preset])
    for step in range(STEPS):
        for (_, p), gradient in zip(named, gradients(EVEN, step)):
            p.grad = spread(gradient)
        optimizer.step()
    return [(p.detach().full_tensor() if is_sharded else p.detach()).float() for _, p in named]


@pytest.mark.parametrize("rounding", ["nearest", "kahan"])
@pytest.mark.parametrize("preset", ["sumo", "muon"])
def test_half_precision_shards_round_as_whole_matrices_do(
    two_ranks: RankPool, preset: str, rounding: str
) -> None:
    """fp32 updates that differ by 1e-6 round to the same bf16 number but where they straddle a boundary: 2^-8
    apart, one in some thousand elements. Rounding twice, or without the compensation, would move far more."""
    expected = half(0, preset, rounding, False)
    found = two_ranks.run(half, preset, rounding, True)[0]
    for f, e in zip(found, expected):
        differ = f != e
        assert float(differ.float().mean()) < 0.01
        assert float(((f - e).abs() / e.abs().clamp_min(1e-3)).max()) <= 2 * 2.0**-7
    other = half(0, preset, "kahan" if rounding == "nearest" else "nearest", False)
    assert any(float((o != e).float().mean()) > 0.05 for o, e in zip(other, expected))
