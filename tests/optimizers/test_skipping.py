"""A gradient that is not finite never enters the state: its matrix skips the step, the others go on, one warning."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import optimizers
from optimizers.presets import names
from tests.optimizers.test_masked_steps import bits, give_gradients, options, parameters

PRESETS = sorted(set(names()) - {"sumo", "muon_moonlight"})
STEPS = 6


def one_entry(gradient: torch.Tensor) -> None:
    gradient[-1, 2] = math.nan


def one_row(gradient: torch.Tensor) -> None:
    gradient[3] = math.inf


def opposites(gradient: torch.Tensor) -> None:
    """Their sum is NaN, but each half of a sum may be finite elsewhere."""
    gradient[0, 0], gradient[1, 1] = -math.inf, math.inf


SPOILS: dict[str, Callable[[torch.Tensor], None]] = {f.__name__: f for f in (one_entry, one_row, opposites)}


def run(
    preset: str,
    spoiled: dict[int, str] | None = None,
    spoil: Callable[[torch.Tensor], None] | None = one_entry,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> tuple[dict[str, nn.Parameter], Any]:
    """Six steps; in step t the gradient of `spoiled[t]` is spoiled, or with `spoil` None missing."""
    params = parameters(dtype)
    optimizer: Any = optimizers.build(preset, params.items(), lr=0.05, **options(preset, **more))
    for t in range(STEPS):
        give_gradients(params, t)
        name = (spoiled or {}).get(t)
        if name is not None:
            gradient = params[name].grad
            assert gradient is not None
            if spoil is None:
                params[name].grad = None
            else:
                spoil(gradient)
        optimizer.step()
    return params, optimizer


def assert_equal(name: str, a: tuple[Any, Any], b: tuple[Any, Any]) -> None:
    """Weights and state of one parameter, bit by bit."""
    assert torch.equal(bits(a[0][name]), bits(b[0][name])), name
    first, second = a[1].state[a[0][name]], b[1].state[b[0][name]]
    assert first.keys() == second.keys()
    for kind, value in first.items():
        other = second[kind]
        same = torch.equal(bits(value), bits(other)) if isinstance(value, torch.Tensor) else value == other
        assert same, (name, kind)


@pytest.mark.parametrize("how", SPOILS)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_matrix_skips_the_step_and_no_other_notices(preset: str, how: str) -> None:
    clean = run(preset)
    for name, at in (("a", 0), ("c", 3), ("embed.weight", 2)):  # a first step, a refresh, an ordinary step
        with pytest.warns(RuntimeWarning, match=rf"^{name}: the gradient is not finite") as caught:
            seen = run(preset, {at: name}, SPOILS[how])
        assert len(caught) == 1
        assert seen[1].skipped_steps == {name: 1}
        for other in clean[0]:
            if other != name:
                assert_equal(other, clean, seen)
        # Nothing to learn from is nothing to learn from, whether it is missing or not finite.
        missing = run(preset, {at: name}, None)
        assert seen[1].state[seen[0][name]]["step"] == STEPS - 1
        torch.testing.assert_close(seen[0][name], missing[0][name], rtol=1e-4, atol=1e-5)
        assert all(
            bool(v.isfinite().all()) for v in seen[1].state[seen[0][name]].values() if hasattr(v, "isfinite")
        )


@pytest.mark.parametrize("preset", ["sumo", "muon", "galore", "adamw"])
def test_the_step_leaves_no_bit_behind(preset: str) -> None:
    params = parameters()
    optimizer: Any = optimizers.build(preset, params.items(), lr=0.05, **options(preset))
    for t in range(3):
        give_gradients(params, t)
        optimizer.step()
    before = [{k: v.clone() for k, v in optimizer.state[p].items() if k != "step"} for p in params.values()]
    weights = [p.detach().clone() for p in params.values()]
    give_gradients(params, 3, bad=True)
    with pytest.warns(RuntimeWarning, match="a and 4 more: the gradient is not finite"):
        optimizer.step()
    for p, weight, state in zip(params.values(), weights, before):
        assert torch.equal(bits(p), bits(weight))
        assert all(torch.equal(bits(optimizer.state[p][k]), bits(v)) for k, v in state.items())
        assert optimizer.state[p]["step"] == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert set(optimizer.skipped_steps.values()) == {2}


def test_large_finite_gradients_are_finite() -> None:
    """Their squares are not."""
    params = parameters()
    optimizer: Any = optimizers.build("muon", params.items(), lr=0.05)
    give_gradients(params, 0)
    for p in params.values():
        assert p.grad is not None
        p.grad.mul_(1e30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert optimizer.skipped_steps == {}
    assert optimizer.state[params["a"]]["step"] == 1


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@pytest.mark.parametrize("preset", ["sumo", "muon", "adamw"])
def test_half_precision_weights(preset: str, rounding: str) -> None:
    clean = run(preset, dtype=torch.bfloat16, rounding=rounding)
    with pytest.warns(RuntimeWarning, match="not finite"):
        seen = run(preset, {2: "c"}, dtype=torch.bfloat16, rounding=rounding)
    for other in ("a", "b", "norm.weight", "embed.weight"):
        assert_equal(other, clean, seen)
    assert seen[1].state[seen[0]["c"]]["step"] == STEPS - 1


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = TinyExperts()


class TinyExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(4, 10, 12))


@pytest.mark.parametrize("preset", ["sumo", "muon", "galore"])
def test_one_expert_of_a_stack(preset: str) -> None:
    def trained(spoil_at: int | None) -> tuple[torch.Tensor, Any]:
        torch.manual_seed(3)
        net = Stacked()
        weight = net.experts.down_proj
        optimizer: Any = optimizers.build(
            preset, net.named_parameters(), modules=net, lr=0.05, **options(preset, refresh_interval=100)
        )
        generator = torch.Generator().manual_seed(0)
        for t in range(4):
            weight.grad = torch.randn(weight.shape, generator=generator)
            if t == spoil_at:
                weight.grad[2, 0, 0] = math.nan
            optimizer.step()
        return weight.detach(), optimizer

    clean, _ = trained(None)
    for at in (0, 2):
        with pytest.warns(RuntimeWarning, match=r"^experts.down_proj\[2\]: the gradient"):
            seen, optimizer = trained(at)
        assert optimizer.skipped_steps == {"experts.down_proj[2]": 1}
        assert torch.equal(seen[[0, 1, 3]], clean[[0, 1, 3]])
        assert not torch.equal(seen[2], clean[2])
        assert bool(seen.isfinite().all())
        # It got its subspace one step later, not one interval later.
        basis = optimizer.state[optimizer.parameters_of_groups[0][0]].get("2.basis")
        assert basis is None or bool(basis.any())


@pytest.mark.usefixtures("blind_host")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_host_need_not_look(preset: str, dtype: torch.dtype) -> None:
    clean = run(preset, dtype=dtype)
    with pytest.warns(RuntimeWarning, match="^c: the gradient is not finite"):
        seen = run(preset, {3: "c"}, dtype=dtype)
    assert seen[1].skipped_steps == {"c": 1}
    assert seen[1].state[seen[0]["c"]]["step"] == STEPS - 1
    others = ["a", "b", "norm.weight", "embed.weight"]
    if preset == "adamw":
        # One call of the fused kernel takes one flag.
        assert {seen[1].state[p]["step"] for p in seen[0].values()} == {STEPS - 1}
    else:
        for other in others:
            assert_equal(other, clean, seen)


@pytest.mark.usefixtures("blind_host")
@pytest.mark.parametrize("preset", ["sumo", "muon", "galore", "adamw"])
def test_a_blind_step_leaves_no_bit_behind_and_warns_one_step_later(preset: str) -> None:
    params = parameters()
    optimizer: Any = optimizers.build(preset, params.items(), lr=0.05, **options(preset))
    for t in range(3):
        give_gradients(params, t)
        optimizer.step()
    before = [{k: v.clone() for k, v in optimizer.state[p].items() if k != "step"} for p in params.values()]
    weights = [p.detach().clone() for p in params.values()]
    give_gradients(params, 3, bad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    for p, weight, state in zip(params.values(), weights, before):
        assert torch.equal(bits(p), bits(weight))
        assert all(torch.equal(bits(optimizer.state[p][k]), bits(v)) for k, v in state.items())
    give_gradients(params, 4)
    with pytest.warns(RuntimeWarning, match="4 more: the gradient is not finite"):
        optimizer.step()
    assert {optimizer.state[p]["step"] for p in params.values()} == {4}


@pytest.mark.usefixtures("blind_host")
def test_no_number_is_read_in_a_blind_step() -> None:
    from tests.optimizers.test_batches import Recorder, net

    for preset in ("sumo", "muon", "galore", "adamw"):
        named = net(3)
        optimizer: Any = optimizers.build(preset, named, **options(preset, refresh_interval=100))
        recorder = Recorder()
        for t in range(3):
            for _, p in named:
                p.grad = torch.randn(p.shape)
            if t == 2:
                # What the last step posted arrived long ago; reading it is not a wait.
                optimizer.skipped_steps  # noqa: B018
                with recorder:
                    optimizer.step()
            else:
                optimizer.step()
        assert not [op for op in recorder.calls if "nonzero" in op or "_local_scalar_dense" in op]
