"""Frozen parameters wait in the groups, without state, and start with their first gradient."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import optimizers
from optimizers.named_state import assemble, load, pieces
from optimizers.options import OptionError
from optimizers.presets import names
from tests.optimizers.test_masked_steps import bits, options

PRESETS = sorted(set(names()) - {"sumo", "muon_moonlight"})
FROZEN = ("0", "2")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 16),
        nn.Linear(16, 16),
        nn.LayerNorm(16),
        nn.Linear(16, 16, bias=False),
        nn.Linear(16, 8),
    )


def freeze(model: nn.Module, on: bool = True) -> list[str]:
    changed = [name for name, _ in model.named_parameters() if name.split(".")[0] in FROZEN]
    for name in changed:
        model.get_parameter(name).requires_grad_(not on)
    return changed


def give(model: nn.Module, t: int) -> None:
    """Gradients that don't depend on what is frozen."""
    generator = torch.Generator().manual_seed(t)
    for p in model.parameters():
        gradient = torch.randn(p.shape, generator=generator)
        p.grad = gradient if p.requires_grad else None


def build(preset: str, model: nn.Module, **more: Any) -> Any:
    return optimizers.build(
        preset, model.named_parameters(), modules=model, lr=0.05, **options(preset, **more)
    )


def run(preset: str, model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for t in range(first, last):
        give(model, t)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("preset", PRESETS)
def test_an_unfrozen_layer_trains_as_if_it_were_new(preset: str) -> None:
    """The oracle: an optimizer of its own, built when the layer was unfrozen."""
    model = net()
    frozen = freeze(model)
    optimizer = build(preset, model)
    assert not set(frozen) & {route.name for route in optimizer.routes}
    bytes_before = sum(optimizer.state_bytes().values())
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(preset, model, optimizer, 0, 3)
    assert all(torch.equal(start[name], model.get_parameter(name)) for name in frozen)
    assert all(not optimizer.state[model.get_parameter(name)] for name in frozen)
    freeze(model, False)
    run(preset, model, optimizer, 3, 7)

    twin = net()
    freeze(twin)
    early = build(preset, twin)
    run(preset, twin, early, 0, 3)
    freeze(twin, False)
    late = optimizers.build(
        preset,
        [(name, twin.get_parameter(name)) for name in frozen],
        modules=twin,
        lr=0.05,
        **options(preset),
    )
    for t in range(3, 7):
        give(twin, t)
        early_only = {name: twin.get_parameter(name).grad for name in frozen}
        for name in frozen:
            twin.get_parameter(name).grad = None
        early.step()
        for name, gradient in early_only.items():
            twin.get_parameter(name).grad = gradient
        late.step()
    for name, p in model.named_parameters():
        assert torch.equal(bits(p), bits(twin.get_parameter(name))), name
    assert optimizer.steps_by_name() == {
        name: 4 if name in frozen else 7 for name, _ in model.named_parameters()
    }
    assert set(frozen) < {route.name for route in optimizer.routes}
    assert sum(optimizer.state_bytes().values()) > bytes_before


def test_zero_grad_reaches_them() -> None:
    model = net()
    freeze(model)
    optimizer = build("muon", model)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(
        map(id, model.parameters())
    )
    freeze(model, False)
    x = torch.randn(4, 12)
    model(x).square().mean().backward()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_what_stays_frozen_costs_nothing_and_changes_nothing() -> None:
    model, twin = net(), net()
    freeze(model)
    freeze(twin)
    optimizer = build("sumo", model, refresh_stagger=True)
    trained = [(name, p) for name, p in twin.named_parameters() if p.requires_grad]
    other = optimizers.build("sumo", trained, modules=twin, lr=0.05, **options("sumo", refresh_stagger=True))
    assert sum(optimizer.state_bytes().values()) == sum(other.state_bytes().values())  # type: ignore[attr-defined]
    run("sumo", model, optimizer, 0, 5)
    run("sumo", twin, other, 0, 5)
    for a, b in zip(model.parameters(), twin.parameters()):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("preset", ["sumo", "galore", "muon", "adamw"])
@pytest.mark.parametrize("how", ["state_dict", "named", "deepcopy", "pickle"])
def test_it_is_saved_and_goes_on(preset: str, how: str) -> None:
    model = net()
    freeze(model)
    optimizer = build(preset, model)
    run(preset, model, optimizer, 0, 2)
    freeze(model, False)
    run(preset, model, optimizer, 2, 4)
    if how in ("deepcopy", "pickle"):
        pair = (model, optimizer)
        twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    else:
        twin = net()
        freeze(twin)
        other = build(preset, twin)
        twin.load_state_dict(model.state_dict())
        if how == "state_dict":
            other.load_state_dict(optimizer.state_dict())
        else:
            whole = assemble(pieces(optimizer))
            load(other, optimizer.steps_by_name(), lambda part: part.of(whole[part.name, part.kind]))
        freeze(twin, False)
    run(preset, model, optimizer, 4, 7)
    run(preset, twin, other, 4, 7)
    for a, b in zip(model.parameters(), twin.parameters()):
        assert torch.equal(bits(a), bits(b))
    assert other.steps_by_name() == optimizer.steps_by_name()


def test_a_frozen_one_is_saved_as_frozen() -> None:
    model = net()
    freeze(model)
    optimizer = build("sumo", model)
    run("sumo", model, optimizer, 0, 2)
    twin = net()
    freeze(twin)
    other = build("sumo", twin)
    other.load_state_dict(optimizer.state_dict())
    assert other.steps_by_name() == optimizer.steps_by_name()
    assert len(other.steps_by_name()) == 5


def test_a_rank_that_does_not_fit_is_refused_when_the_matrix_starts() -> None:
    model = nn.Sequential(nn.Linear(3, 16, bias=False), nn.Linear(16, 16, bias=False))
    model.get_parameter("0.weight").requires_grad_(False)
    optimizer = optimizers.build("sumo", model.named_parameters(), modules=model, rank=8)
    model.get_parameter("0.weight").requires_grad_()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(OptionError, match=r"0.weight \(16×3\)"):
        optimizer.step()


def test_frozen_groups_follow_the_scheduler() -> None:
    model = net()
    freeze(model)
    first = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
    rest = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = optimizers.SUMO([{"params": first, "lr": 0.5}, {"params": rest}], lr=0.1, modules=model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    run("sumo", model, optimizer, 0, 1)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25, 0.05, 0.05]
    freeze(model, False)
    before = model.get_parameter("0.weight").detach().clone()
    run("sumo", model, optimizer, 1, 2)
    assert not torch.equal(before, model.get_parameter("0.weight"))


def test_slices_of_deepspeed_cannot_start_later() -> None:
    model = net()
    freeze(model)
    optimizer = optimizers.build("muon", model.named_parameters(), modules=model, layout="partitioned")
    optimizer.step()
    freeze(model, False)
    with pytest.raises(RuntimeError, match=r"0.weight: was frozen .* use ddp, fsdp2 or zero0"):
        optimizer.step()
