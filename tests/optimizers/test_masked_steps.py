"""found_inf: a masked step leaves no trace, and after `retract_step` the optimizer never saw it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import optimizers
from optimizers.interfaces import MatrixBatch
from optimizers.presets import names, resolve

Params = dict[str, torch.nn.Parameter]


@pytest.fixture(params=["the host may look", "blind host"], autouse=True)
def host(request: pytest.FixtureRequest) -> str:
    """On accelerators the host may not look at the flag, and every step pays for a mask."""
    if request.param == "blind host":
        request.getfixturevalue("blind_host")
    return request.param


def parameters(dtype: torch.dtype = torch.float32) -> Params:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (16, 12), "b": (12, 16), "c": (16, 12), "norm.weight": (12,), "embed.weight": (20, 12)}
    made = {k: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for k, s in shapes.items()}
    # Signed zeros: a masked "+ 0" would flip their bits.
    made["a"][0, :3] = torch.tensor([-0.0, 0.0, -0.0])
    return {name: torch.nn.Parameter(value) for name, value in made.items()}


def options(preset: str, **more: Any) -> dict[str, Any]:
    known = resolve(preset)
    wanted = {"rank": 4, "refresh_interval": 3, "weight_decay": 0.1, "norm_growth_limit": 1.2, **more}
    if known.get("residual") == "unbiased":
        del wanted["norm_growth_limit"]  # GUM refuses it
    return {key: value for key, value in wanted.items() if key in known}


def give_gradients(params: Params, seed: int, bad: bool = False) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if bad:
            p.grad[0] = float("nan")
            p.grad[-1] = float("inf")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(sizes[tensor.element_size()])


def assert_same(a: Params, b: Params, x: torch.optim.Optimizer, y: torch.optim.Optimizer) -> None:
    """Weights and whole state dicts, bit by bit."""
    for name in a:
        assert torch.equal(bits(a[name]), bits(b[name])), name
    first, second = x.state_dict(), y.state_dict()
    assert first["param_groups"] == second["param_groups"]
    for key, entries in first["state"].items():
        for kind, value in entries.items():
            other = second["state"][key][kind]
            if isinstance(value, torch.Tensor):
                assert torch.equal(bits(value), bits(other)), (key, kind)
            else:
                assert value == other, (key, kind)


def run(preset: str, dtype: torch.dtype, masked_at: int | None, **more: Any) -> tuple[Params, Any]:
    """Seven steps (refreshes at 0, 3, 6), and an extra one full of NaN in front of step `masked_at`."""
    params = parameters(dtype)
    optimizer: Any = optimizers.build(preset, params.items(), lr=0.05, **options(preset, **more))
    zero, one = torch.zeros(()), torch.ones(())
    for t in range(7):
        if t == masked_at:
            give_gradients(params, 100, bad=True)
            optimizer.found_inf = one
            optimizer.step()
            optimizer.retract_step()
        give_gradients(params, t)
        optimizer.found_inf = zero
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", sorted(set(names()) - {"sumo", "muon_moonlight"}))
def test_a_masked_step_leaves_no_trace(preset: str, dtype: torch.dtype) -> None:
    clean = run(preset, dtype, None)
    for masked_at in (0, 1, 3):  # the first refresh, an ordinary step, a later refresh
        seen = run(preset, dtype, masked_at)
        assert_same(clean[0], seen[0], clean[1], seen[1])
        assert int(seen[1].fallbacks) == int(clean[1].fallbacks)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("preset", ["sumo", "adamw"])
def test_nor_with_other_roundings(preset: str, rounding: str) -> None:
    clean = run(preset, torch.bfloat16, None, rounding=rounding)
    seen = run(preset, torch.bfloat16, 3, rounding=rounding)
    assert_same(clean[0], seen[0], clean[1], seen[1])


def test_nor_with_the_residual_criterion() -> None:
    for threshold in (0.0, 5.0, 100.0):  # never, sometimes, always
        clean = run("sumo", torch.float32, None, refresh_threshold=threshold, refresh_interval=100)
        seen = run("sumo", torch.float32, 4, refresh_threshold=threshold, refresh_interval=100)
        assert_same(clean[0], seen[0], clean[1], seen[1])


@pytest.mark.parametrize("preset", ["sumo", "muon", "galore", "adamw"])
def test_a_mask_of_zero_changes_nothing_at_all(preset: str, host: str) -> None:
    params, other = parameters(), parameters()
    a: Any = optimizers.build(preset, params.items(), lr=0.05, **options(preset))
    b: Any = optimizers.build(preset, other.items(), lr=0.05, **options(preset))
    a.found_inf = torch.zeros(1)
    for t in range(4):
        give_gradients(params, t)
        give_gradients(other, t)
        a.step()
        b.step()
    for name in params:
        if host == "blind host":
            # blend() adds in another order when it may be masked: one fp32 rounding.
            torch.testing.assert_close(params[name], other[name], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(bits(params[name]), bits(other[name]))


def test_only_a_blind_host_masks_a_clean_step(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[bool] = []
    plain = MatrixBatch.blend

    def blend(self: MatrixBatch, *args: Any) -> torch.Tensor:
        masks.append(self.masked is not None)
        return plain(self, *args)

    monkeypatch.setattr(MatrixBatch, "blend", blend)
    params = parameters()
    optimizer: Any = optimizers.build("muon", params.items())
    for flag in (0.0, 1.0, 0.0):
        give_gradients(params, 0)
        optimizer.found_inf = torch.full((), flag)
        optimizer.step()
    batches = len(masks) // 3
    is_blind = host == "blind host"
    assert masks == [is_blind] * batches + [True] * batches + [is_blind] * batches


def test_control_an_unmasked_step_of_nan_destroys_the_state() -> None:
    """Whoever sets `found_inf` has looked at the gradients: the optimizer does not look again."""
    params = parameters()
    optimizer: Any = optimizers.build("sumo", params.items(), lr=0.05, rank=4)
    give_gradients(params, 0, bad=True)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert not torch.isfinite(params["norm.weight"]).all()
    assert int(optimizer.fallbacks) > 0


def test_one_step_can_be_retracted_once() -> None:
    params = parameters()
    optimizer: Any = optimizers.build("muon", params.items())
    give_gradients(params, 0)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    optimizer.retract_step()
    optimizer.retract_step()
    assert {state["step"] for state in optimizer.state.values()} == {0}
