"""Each known defect, re-created from its mathematics, is red under its own name; its healthy twin is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optimizers
from harness.audit import DEFECTS, NOTES, watch
from tests.harness.verify.watch.defective import Muon
from tests.harness.verify.watch.loops import WIDTH, Net, batches, loss_of, names, net, split, train, watched


def groups(model: nn.Module) -> list[dict[str, Any]]:
    hidden, rest = split(model)
    return [
        {"params": hidden, "use_muon": True, "weight_decay": 0.1},
        {"params": rest, "use_muon": False, "lr": 2e-3},
    ]


IN_THE_OPTIMIZER = (
    "plain SGD under Muon's name",
    "no matrix routed",
    "stale gradient of offload",
    "padding rows change the scale",
    "shard-local Newton–Schulz",
    "clipping after orthogonalization",
    "another momentum",
    "another scale",
    "another learning rate",
    "another weight decay",
    "weight decay in the gradient",
    "unexplained update",
)


QUICK = {
    "plain SGD under Muon's name",
    "clipping after orthogonalization",
    "another momentum",
    "weight decay in the gradient",
}
"""One of each kind: rule, scale, form of the momentum, decay. A factor that is not of the whole matrix has tests of its
own: `test_a_factor_that_is_damped_about_the_cut`, and test_engines.py under FSDP2."""


@pytest.mark.parametrize(
    "defect",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in IN_THE_OPTIMIZER],
)
def test_a_defect_of_the_optimizer_is_named(defect: str) -> None:
    model = net()
    report = watched(model, Muon(groups(model), defect))
    assert names(report) == [defect], str(report)
    assert report.is_right is False
    assert defect in report.answer


@pytest.mark.slow
def test_the_healthy_twin_is_right() -> None:
    model = net()
    report = watched(model, Muon(groups(model)))
    assert names(report) == []
    assert report.is_right is True


@pytest.mark.slow
def test_offload_without_orthogonalization_is_named_by_what_the_engine_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from harness.verify.watch import targets

    make = targets.Target._part

    def offloading(self: Any, optimizer: Any) -> Any:
        part = make(self, optimizer)
        part.engine = {"offload": True}
        return part

    monkeypatch.setattr(targets.Target, "_part", offloading)
    model = net()
    report = watched(model, Muon(groups(model), "offload without orthogonalization"))
    assert names(report) == ["offload without orthogonalization"], str(report)


def test_a_fused_projection_that_should_be_taken_apart() -> None:
    model = net()
    report = watched(model, Muon(groups(model)), fused="parts")
    assert names(report) == ["whole QKV orthogonalized"]
    assert report.defects[0].parameters == ("qkv.weight",)
    model = net()
    by_parts = optimizers.build("muon", model.named_parameters(), modules=model, lr=0.02)
    assert names(watched(model, by_parts, fused="parts")) == []


class Two(nn.Module):
    """Two blocks, each with a fused projection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Net(), Net()])

    def forward(self, ids: Tensor) -> Tensor:
        return self.blocks[0](ids) + self.blocks[1](ids)


@pytest.mark.slow
def test_fused_projections_that_depend_on_the_layout() -> None:
    model = Two()
    # As if only one of them had a shard that divides by three.
    model.blocks[1].qkv.weight.splits = True  # pyright: ignore
    report = watched(model, Muon(groups(model), "fused projections differ"))
    assert names(report) == ["fused projections differ"], str(report)
    assert report.defects[0].parameters == ("blocks.0.qkv.weight",)


class Flat(nn.Module):
    """A linear layer whose weight is a view of a flat parameter, as FSDP1 keeps it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        self.linear.weight = nn.Parameter(self.linear.weight.detach().flatten())
        self.embed = nn.Embedding(16, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids) @ self.linear.weight.view(WIDTH, WIDTH) @ self.embed.weight.mT


def test_flat_parameters_on_adamw() -> None:
    model = Flat()
    by_shape = [
        {"params": [p for p in model.linear.parameters() if p.ndim == 2], "use_muon": True},
        {
            "params": [p for p in model.parameters() if p.ndim != 2 or p is model.embed.weight],
            "use_muon": False,
        },
    ]
    report = watched(model, Muon(by_shape))
    assert names(report) == ["flat parameters routed to AdamW"], str(report)
    assert report.defects[0].parameters == ("linear.weight",)


@pytest.mark.slow
def test_momentum_that_advances_with_every_micro_batch() -> None:
    model = net()
    optimizer = Muon(groups(model))

    def step_per_micro_batch(steps: int) -> None:
        for ids in batches(steps):
            for part in ids.chunk(2):
                (loss_of(model, part) / 2).backward()
                if part.data_ptr() == ids.data_ptr():
                    # Momentum and Newton–Schulz of what has accumulated so far, without a movement.
                    for p in optimizer.param_groups[0]["params"]:
                        optimizer.matrix(p, optimizer.param_groups[0])
            optimizer.step()
            optimizer.zero_grad()

    with watch(model, optimizer, quiet=True) as report:
        step_per_micro_batch(3)
    assert names(report) == ["micro-batch momentum"], str(report)
    model = net()
    assert names(watched(model, Muon(groups(model)), loop={"accumulation": 2})) == []


def test_a_factor_that_is_damped_about_the_cut() -> None:
    model = net()
    report = watched(model, Muon(groups(model), "smooth cut"))
    assert names(report) == ["smooth cut"], str(report)


def test_clipping_that_never_happens() -> None:
    model = net()
    report = watched(model, Muon(groups(model)), max_norm=0.05)
    assert names(report) == ["clipping forgotten"]
    model = net()
    assert names(watched(model, Muon(groups(model)), loop={"max_norm": 0.05})) == []


def test_an_embedding_on_the_matrix_rule() -> None:
    model = net()
    everything = [p for p in model.parameters() if p.ndim == 2]
    optimizer = [torch.optim.Muon(everything, lr=0.02), torch.optim.AdamW(model.norm.parameters(), lr=1e-3)]
    report = watched(model, optimizer)
    assert names(report) == ["embedding on the matrix rule"]
    assert report.defects[0].parameters == ("embed.weight", "lm_head.weight")


@pytest.mark.slow
def test_weight_decay_that_bf16_weights_cannot_hold_is_a_note() -> None:
    model = net(dtype=torch.bfloat16)
    hidden, rest = split(model)
    report = watched(model, [torch.optim.Muon(hidden, lr=0.02), torch.optim.AdamW(rest, lr=2e-3)])
    assert [finding.name for finding in report.findings] == ["weight decay rounded away"]
    assert report.is_right is True


def test_weights_that_never_move() -> None:
    model = net()
    optimizer = Muon(groups(model))

    def forget(*_: Any) -> None:
        model.up.weight.grad = None

    with watch(model, optimizer, quiet=True) as report:
        # After the hook of `watch`, so that it sees a gradient that the optimizer does not.
        optimizer.register_step_pre_hook(forget)
        train(model, optimizer, batches(3))
    assert names(report) == ["weights do not move"], str(report)


def test_every_defect_has_a_meaning_and_no_name_twice() -> None:
    assert not DEFECTS.keys() & NOTES.keys()
    assert all(meaning for meaning in {**DEFECTS, **NOTES}.values())
