"""The controls of `optbench audit` under `watch`: the same defective Muon is red under the same names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from harness.audit import DEFECTS as NAMED
from harness.audit import watch
from harness.verify import cells
from harness.verify.audit.controls import CONTROLS
from harness.verify.audit.defects import BETAS, DEFECTS, EPS, RANK, DefectiveMuon
from harness.verify.watch.subspaces import shard_ranks
from tests.harness.verify.watch.loops import Net, batches, names, split, train, watched
from tests.harness.verify.watch.test_defects import Flat

if TYPE_CHECKING:
    from tests.distributed.pool import RankPool

ON_RANKS = ("shard-local Newton–Schulz", "unsynchronized basis, shards", "unsynchronized basis, replicas")
"""Defects that several ranks show only."""
ROUTED = "flat parameters routed to AdamW"
"""The defect of a loop that gives the right optimizer flat vectors."""


def test_watch_has_a_name_for_every_control() -> None:
    assert {control.name for control in CONTROLS} <= NAMED.keys()
    assert cells.CONTROLS.keys() <= NAMED.keys()


def model_for(defect: str | None) -> Any:
    """Return a model whose gradients have full rank: an exact polar factor has none of the noise in others."""
    torch.manual_seed(0)
    if defect == ROUTED:
        return Flat()
    # Of a 9 × 8 matrix in two shards, the tenth row shows in the scale.
    return Net(width=8, hidden=9) if defect == "padding rows change the scale" else Net(width=12)


def optimizers_of(model: nn.Module, defect: str | None, when: Any = "always") -> list[torch.optim.Optimizer]:
    """Return the defective Muon of hidden matrices, with what it does in its groups, and AdamW."""
    hidden, rest = split(model)
    if isinstance(model, Flat):
        hidden, rest = list(model.linear.parameters()), list(model.embed.parameters())
    elif defect != "whole QKV orthogonalized":
        # The gradients of queries and keys are near rounding, where rules look alike.
        qkv, *hidden = hidden
        rest = [*rest, qkv]
    says = {"params": hidden, "adjust_lr_fn": "original", "betas": BETAS, "eps": EPS}
    own = None if defect == ROUTED else defect
    return [DefectiveMuon([says], defect=own, when=when), torch.optim.AdamW(rest, lr=2e-3)]


@pytest.mark.parametrize(
    "defect",
    [
        "plain SGD under Muon's name",
        "whole QKV orthogonalized",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in DEFECTS
            if name not in ("plain SGD under Muon's name", "whole QKV orthogonalized", *ON_RANKS)
        ),
    ],
)
def test_a_control_of_audit_is_named(defect: str) -> None:
    model = model_for(defect)
    report = watched(model, optimizers_of(model, defect), fused="parts")
    assert names(report) == [defect], str(report)


@pytest.mark.slow
def test_the_right_counterpart_is_right() -> None:
    model = model_for(None)
    assert names(watched(model, optimizers_of(model, None), fused="parts")) == []


def on_ranks(rank: int, defect: str, when: str) -> tuple[list[str], dict[str, str]]:
    """Train shards (or replicas) on half batches; return defects, and the message of each, of rank 0."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = model_for(defect)
    call: Any = model
    if defect.endswith("replicas"):
        call = DistributedDataParallel(model)
    else:
        for part in (model.qkv, model.up, model.down):
            fully_shard(part)
        fully_shard(model)
    optimizers = optimizers_of(model, defect, when)
    with watch(call, optimizers, quiet=True, fused="parts") as report:
        train(model, optimizers, [ids.chunk(2)[rank] for ids in batches(3)], call=call)
    return names(report), {finding.name: finding.message for finding in report.findings}


# test_engines.py has the others with another Muon.
@pytest.mark.parametrize(
    "defect",
    [ON_RANKS[1], *(pytest.param(name, marks=pytest.mark.slow) for name in ON_RANKS if name != ON_RANKS[1])],
)
def test_a_control_of_audit_on_two_ranks_is_named(two_ranks: RankPool, defect: str) -> None:
    found, messages = two_ranks.run(on_ranks, defect, "distributed")[0]
    assert defect in found, messages
    if defect.endswith("shards"):
        # Two slices of six rows have no lower rank than any rule gives them: that matrix says nothing.
        assert set(found) == {defect, "unexplained update"}, messages
        assert messages[defect] == (
            f"the slices of the first update have rank {RANK}, {RANK}, the whole update has rank 12 (1×)"
        )


@pytest.mark.slow
def test_one_common_subspace_is_not_named(two_ranks: RankPool) -> None:
    """Its counterpart projects all rows on one basis, a rule that `watch` has no name for."""
    found, messages = two_ranks.run(on_ranks, "unsynchronized basis, shards", "never")[0]
    assert found == ["unexplained update"], messages


def projected(rows: int, *bases: Tensor) -> Tensor:
    noise = torch.randn(rows * len(bases), bases[0].shape[0], generator=torch.Generator().manual_seed(1))
    parts = [part @ basis @ basis.T for part, basis in zip(noise.double().chunk(len(bases)), bases)]
    return torch.cat(parts)


def test_ranks_of_slices() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.linalg.qr(torch.randn(12, 3, generator=generator).double())[0] for _ in range(2))
    own = shard_ranks(projected(8, one, other), (0, 2), 1e-6)
    assert own is not None
    assert (own.slices, own.whole, own.limits, own.has_own_subspaces) == ((3, 3), 6, (8, 8), True)
    common = shard_ranks(projected(8, one, one), (0, 2), 1e-6)
    assert common is not None
    assert (common.whole, common.has_own_subspaces) == (3, False)
    # A full-rank rule on a gradient with few rows, as that of an embedding.
    few = torch.zeros(16, 12).double()
    few[[0, 1, 9, 10, 11]] = torch.randn(5, 12, generator=generator).double()
    sparse = shard_ranks(few, (0, 2), 1e-6)
    assert sparse is not None
    assert (sparse.slices, sparse.whole, sparse.has_own_subspaces) == ((2, 3), 5, False)
    # What rounding leaves is no rank.
    noisy = shard_ranks(
        projected(8, one, one) + 1e-7 * torch.randn(16, 12, generator=generator), (0, 2), 1e-6
    )
    assert noisy is not None
    assert noisy.whole == 3
    assert shard_ranks(few, (0, 1), 1e-6) is None
    assert shard_ranks(torch.zeros(4, 4), (0, 2), 0.0) is None
