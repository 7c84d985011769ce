"""Replicas on two processes: each basis comes from one of them, and everything stays bit-equal."""

from __future__ import annotations

import hashlib
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import optimizers

if TYPE_CHECKING:
    from tests.distributed.pool import RankPool


def build(preset: str, **options: Any) -> tuple[list[tuple[str, nn.Parameter]], Any]:
    torch.manual_seed(0)
    shapes = [(16, 12), (12, 16), (16, 12), (12,), (16, 16)]
    named = [(f"layers.{i}.w", nn.Parameter(torch.randn(s))) for i, s in enumerate(shapes)]
    return named, optimizers.build(preset, named, lr=0.05, **options)


def train(named: list[tuple[str, nn.Parameter]], optimizer: Any, steps: int = 7) -> list[bytes]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for _, p in named:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach().numpy().tobytes() for _, p in named]


def replica(rank: int, preset: str, disturb: bool) -> tuple[str, list[bytes], dict[str, int]]:
    """Runs on each rank; with `disturb` rank 1 finds other singular vectors than rank 0, as other hardware
    may."""
    import torch.distributed as dist

    from optimizers.rules.parts import subspaces

    calls: dict[str, int] = {"broadcast": 0, "all_reduce": 0, "all_gather": 0}
    originals = {name: getattr(dist, name) for name in calls}
    makers = subspaces.svd_basis, subspaces.randomized_basis

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in calls:
            setattr(dist, name, counting(name))
        if disturb and rank == 1:
            subspaces.svd_basis = lambda *a, **k: -makers[0](*a, **k)  # type: ignore[assignment]
            subspaces.randomized_basis = lambda *a, **k: -makers[1](*a, **k)  # type: ignore[assignment]
        options = {"rank": 4, "refresh_interval": 3} if preset in ("sumo", "galore", "sumo_official") else {}
        named, optimizer = build(preset, process_group=dist.group.WORLD, **options)
        weights = train(named, optimizer)
        state = hashlib.sha256()
        for entries in optimizer.state.values():
            for key in sorted(entries):
                value = entries[key]
                state.update(
                    value.numpy().tobytes() if isinstance(value, torch.Tensor) else str(value).encode()
                )
        return state.hexdigest(), weights, calls
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
        subspaces.svd_basis, subspaces.randomized_basis = makers


@pytest.mark.parametrize("preset", ["sumo", "sumo_official", "galore", "muon", "adamw"])
def test_replicas_stay_bit_equal_and_equal_to_one_process(two_ranks: RankPool, preset: str) -> None:
    first, second = two_ranks.run(replica, preset, False)
    assert first[:2] == second[:2]
    options = {"rank": 4, "refresh_interval": 3} if preset in ("sumo", "galore", "sumo_official") else {}
    assert first[1] == train(*build(preset, **options))


@pytest.mark.parametrize("preset", ["sumo_official", "galore"])
def test_ranks_that_find_other_vectors_use_those_of_the_owner(two_ranks: RankPool, preset: str) -> None:
    first, second = two_ranks.run(replica, preset, True)
    assert first[:2] == second[:2]


def test_one_broadcast_per_owner_and_refresh_and_nothing_else(two_ranks: RankPool) -> None:
    """Four stacks of three shapes; refreshes at 0, 3 and 6."""
    for _, _, calls in two_ranks.run(replica, "sumo", False):
        assert calls == {"broadcast": 2 * 3, "all_reduce": 0, "all_gather": 0}


def slow_makers(rank: int, seconds: float, timeout: float) -> tuple[int, list[bytes]]:
    """Runs on each rank: six bases that take time, in a group whose collectives may not."""
    import torch.distributed as dist

    from optimizers.interfaces import BroadcastBasis
    from optimizers.layouts.communicator import Communicator
    from optimizers.layouts.replicated import ReplicaCollectives

    group = dist.new_group(timeout=timedelta(seconds=timeout))
    made = []

    def make(number: int) -> torch.Tensor:
        time.sleep(seconds)
        made.append(number)
        return torch.full((2, 3), float(number), dtype=torch.float32 if number % 2 else torch.float64)

    assert isinstance(group, dist.ProcessGroup)
    requests = [BroadcastBasis(lambda i=i: make(i), make_like(i), work=1.0 + i) for i in range(6)]
    bases = ReplicaCollectives(Communicator(group)).broadcast_bases(requests)
    dist.destroy_process_group(group)
    return len(made), [basis.numpy().tobytes() for basis in bases]


def make_like(number: int) -> torch.Tensor:
    return torch.empty((2, 3), dtype=torch.float32 if number % 2 else torch.float64)


def test_no_rank_waits_until_another_one_has_made_all_bases(two_ranks: RankPool) -> None:
    """Six bases of 0.5 s each on one process would exceed the timeout of 2 s."""
    expected = [torch.full_like(make_like(i), float(i)).numpy().tobytes() for i in range(6)]
    assert two_ranks.run(slow_makers, 0.5, 2.0) == [(3, expected), (3, expected)]


def split(rank: int, preset: str, options: dict[str, Any]) -> dict[str, Any]:
    """Runs on each rank: each matrix computed by one of them."""
    import torch.distributed as dist

    named, optimizer = build(preset, process_group=dist.group.WORLD, work="split", **options)
    weights = train(named, optimizer)
    return {
        "weights": [p.detach() for _, p in named],
        "bytes": weights,
        "state": optimizer.state_bytes(),
        "sent": optimizer.bytes_sent(),
        "spectra": sorted(optimizer.moment_spectra()),
        "counted": optimizer.orthogonalizations,
    }


LOW = {"rank": 4, "refresh_interval": 3}


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("sumo", LOW),
        ("sumo_official", LOW),
        ("galore", LOW),
        ("galore_muon", LOW),
        ("fira", LOW),
        ("apollo", LOW),
        ("ldadam", {"rank": 4}),
        ("gum", {**LOW, "full_rank_probability": 0.5}),
        ("subtrack", {**LOW, "track_step": 0.01}),
        ("dct_subspace", {"rank": 4}),
        ("muon", {}),
        ("adamw", {}),
    ],
)
def test_split_work_gives_the_same_weights(two_ranks: RankPool, preset: str, options: dict[str, Any]) -> None:
    first, second = two_ranks.run(split, preset, options)
    assert first["bytes"] == second["bytes"]
    named, optimizer = build(preset, **options)
    train(named, optimizer)
    # The same products in other batches: rounding of fp32, over seven steps.
    for found, (_, expected) in zip(first["weights"], named):
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=2e-6)
    if preset != "adamw":
        assert first["counted"] + second["counted"] == optimizer.orthogonalizations
        both = first["spectra"] + second["spectra"]
        assert sorted(both) == sorted(optimizer.moment_spectra())


def test_split_work_divides_the_state_and_sends_factors(two_ranks: RankPool) -> None:
    """SUMO: r(m + n) numbers of each matrix kept once, and sent once a step to the other process."""
    results = two_ranks.run(split, "sumo", LOW)
    numbers = sum(4 * (m + n) for m, n in [(16, 12), (12, 16), (16, 12), (16, 16)])
    assert sum(r["state"]["moment"] + r["state"]["basis"] for r in results) == 4 * numbers
    assert sum(sum(r["sent"].values()) for r in results) == 7 * 4 * numbers
    # The two matrices of one shape have an owner each, all others are alone.
    pair = 2 * 4 * (16 + 12)
    assert [r["sent"]["all_gather"] for r in results] == [7 * 4 * pair / 2] * 2
    whole = two_ranks.run(split, "muon", {})
    elements = sum(m * n for m, n in [(16, 12), (12, 16), (16, 12), (16, 16)])
    assert sum(sum(r["sent"].values()) for r in whole) == 7 * 4 * elements
