"""Closures, schedulers, groups, state dicts, copies and pickles: as for any torch optimizer."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import optimizers
from optimizers.options import OptionError
from optimizers.presets import names, resolve
from tests.optimizers.test_masked_steps import assert_same, give_gradients, options, parameters

PRESETS = sorted(set(names()) - {"sumo_paper", "muon_moonlight"})


def built(
    preset: str, dtype: torch.dtype = torch.float32, **more: Any
) -> tuple[dict[str, nn.Parameter], Any]:
    params = parameters(dtype)
    return params, optimizers.build(preset, params.items(), lr=0.05, **options(preset, **more))


def advance(params: dict[str, nn.Parameter], optimizer: Any, first: int, last: int) -> None:
    for t in range(first, last):
        give_gradients(params, t)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_state_dict_goes_through_a_file_bit_by_bit(preset: str, dtype: torch.dtype) -> None:
    params, optimizer = built(preset, dtype, rounding="kahan")
    advance(params, optimizer, 0, 5)
    file = io.BytesIO()
    torch.save(
        {"weights": {k: p.detach() for k, p in params.items()}, "optimizer": optimizer.state_dict()}, file
    )
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other, fresh = built(preset, dtype, rounding="kahan")
    with torch.no_grad():
        for name, p in other.items():
            p.copy_(loaded["weights"][name])
    fresh.load_state_dict(loaded["optimizer"])
    assert_same(params, other, optimizer, fresh)
    advance(params, optimizer, 5, 9)
    advance(other, fresh, 5, 9)
    assert_same(params, other, optimizer, fresh)


@pytest.mark.parametrize("preset", ["sumo", "muon", "galore", "adamw"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_alone(preset: str, how: str) -> None:
    params, optimizer = built(preset)
    advance(params, optimizer, 0, 4)
    pair = (params, optimizer)
    other, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert_same(params, other, optimizer, twin)
    frozen = {name: p.detach().clone() for name, p in params.items()}
    advance(other, twin, 4, 8)
    assert all(torch.equal(frozen[name], params[name]) for name in params)
    advance(params, optimizer, 4, 8)
    assert_same(params, other, optimizer, twin)


def test_a_pickle_holds_each_state_once() -> None:
    params = [nn.Parameter(torch.randn(64, 64)) for _ in range(12)]
    optimizer = optimizers.Muon(params)
    stored = 2 * sum(p.numel() * 4 for p in params)  # weights and moments
    assert len(pickle.dumps(optimizer)) < 1.2 * stored


@pytest.mark.parametrize("preset", PRESETS)
def test_torch_s_state_dict_api_moves_nothing(preset: str) -> None:
    """`get_optimizer_state_dict` may step a fresh optimizer with zero gradients and lr 0."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 12))
    before = copy.deepcopy(net.state_dict())
    optimizer = optimizers.build(preset, net.named_parameters(), modules=net, **options(preset))
    saved = get_optimizer_state_dict(net, optimizer)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    twin = copy.deepcopy(net)
    other = optimizers.build(preset, twin.named_parameters(), modules=twin, **options(preset))
    set_optimizer_state_dict(twin, other, saved)
    x = torch.randn(5, 12)
    for model, opt in ((net, optimizer), (twin, other)):
        for _ in range(4):
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
    for a, b in zip(net.parameters(), twin.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_with_zero_gradients_and_no_lr_moves_nothing(preset: str) -> None:
    params, optimizer = built(preset)
    before = {name: p.detach().clone() for name, p in params.items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0

    def closure() -> float:
        for p in params.values():
            p.grad = torch.zeros_like(p)
        return 1.5

    assert optimizer.step(closure) == 1.5
    for name, p in params.items():
        assert torch.equal(p, before[name])
    advance(params, optimizer, 0, 2)
    assert all(torch.isfinite(p).all() for p in params.values())


def test_a_closure_sees_gradients_enabled() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = optimizers.Muon([weight], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first


def test_a_scheduler_moves_scheduled_groups_only() -> None:
    params, optimizer = built("sumo_official")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    matrix, aux = optimizer.param_groups
    assert (matrix["scheduled"], aux["scheduled"]) == (True, False)
    embed, other = params["embed.weight"], parameters()["embed.weight"]
    reference = torch.optim.AdamW([other], lr=1e-5, betas=(0.9, 0.999), eps=0.0, weight_decay=0.0, fused=True)
    aux["eps"] = 0.0
    for t in range(4):
        give_gradients(params, t)
        assert embed.grad is not None
        other.grad = embed.grad.clone()
        optimizer.step()
        reference.step()
        scheduler.step()
    assert matrix["lr"] == pytest.approx(0.05 * 0.5**4)
    # eps is 0, so the two places where it may be added do not matter.
    torch.testing.assert_close(embed, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("preset", ["sumo", "muon", "galore", "adamw"])
def test_learning_rates_scale_updates(preset: str) -> None:
    a, first = built(preset, weight_decay=0.0)
    b, second = built(preset, weight_decay=0.0)
    start = parameters()
    scheduler = torch.optim.lr_scheduler.LambdaLR(second, lambda t: 0.25)
    give_gradients(a, 0)
    give_gradients(b, 0)
    first.step()
    second.step()
    scheduler.step()
    for name in a:
        moved = (a[name] - start[name]) * 0.25
        torch.testing.assert_close(b[name] - start[name], moved, rtol=1e-4, atol=1e-6)


def test_groups_may_differ_in_options_and_are_split_by_rule() -> None:
    params = parameters()
    groups = [
        {"params": [("a", params["a"]), ("norm.weight", params["norm.weight"])], "rank": 2, "lr": 0.3},
        {"params": [("b", params["b"])], "scheduled": False},
        {"params": [("c", params["c"])], "rule": "adamw", "lr": 0.7, "betas": (0.5, 0.6)},
    ]
    optimizer = optimizers.SUMO(groups, lr=0.1, rank=4)
    made = [(g["rule"], g["lr"], g.get("rank"), g["scheduled"]) for g in optimizer.param_groups]
    assert made == [
        ("sumo", 0.3, 2, True),
        ("adamw", 0.3, None, True),
        ("sumo", 0.1, 4, False),
        ("adamw", 0.7, None, True),
    ]
    assert optimizer.param_groups[3]["betas"] == (0.5, 0.6)
    assert optimizer.param_groups[0]["param_names"] == ["a"]


def test_add_param_group_after_some_steps() -> None:
    params = parameters()
    early = {k: params[k] for k in ("a", "embed.weight")}
    optimizer: Any = optimizers.build("sumo", early.items(), lr=0.05, rank=4)
    advance(early, optimizer, 0, 2)
    optimizer.add_param_group({"params": [("b", params["b"])], "lr": 0.01})
    with pytest.raises(OptionError, match="rnk"):
        optimizer.add_param_group({"params": [("c", params["c"])], "rnk": 1})
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": [("a", params["a"])]})
    later = {**early, "b": params["b"]}
    before = params["b"].detach().clone()
    advance(later, optimizer, 2, 4)
    assert not torch.equal(before, params["b"])
    assert optimizer.state[params["b"]]["step"] == 2
    assert optimizer.state[params["a"]]["step"] == 4


def test_parameters_without_gradient_are_left_alone() -> None:
    params, optimizer = built("sumo")
    twin, other = built("sumo")
    del other
    for t in range(4):
        give_gradients(params, t)
        if t % 2:
            params["c"].grad = None  # of the same shape as "a": half of a stack
        frozen = params["c"].detach().clone()
        optimizer.step()
        assert torch.equal(frozen, params["c"]) is bool(t % 2)
    assert optimizer.state[params["c"]]["step"] == 2
    assert not torch.equal(twin["a"], params["a"])


def test_half_a_stack_steps_as_it_would_alone() -> None:
    params, optimizer = built("sumo")
    alone = {"a": parameters()["a"]}
    single = optimizers.build("sumo", alone.items(), lr=0.05, **options("sumo"))
    for t in range(5):
        give_gradients(params, t)
        params["c"].grad = None
        assert params["a"].grad is not None
        alone["a"].grad = params["a"].grad.clone()
        optimizer.step()
        single.step()
    # Another batch size may take another BLAS kernel: rounding only.
    torch.testing.assert_close(params["a"], alone["a"], rtol=1e-5, atol=1e-5)


def _foreign(case: str) -> dict[str, Any]:
    params = parameters()
    if case == "torch":
        return torch.optim.AdamW(params.values()).state_dict()
    ours = options("sumo")
    if case == "preset":
        return optimizers.build("muon", params.items()).state_dict()
    if case == "rank":
        return optimizers.build("sumo", params.items(), **{**ours, "rank": 2}).state_dict()
    if case == "names":
        renamed = {("z" if k == "a" else k): p for k, p in params.items()}
        return optimizers.build("sumo", renamed.items(), **ours).state_dict()
    if case == "fewer":
        return optimizers.build("sumo", list(params.items())[1:], **ours).state_dict()
    if case == "shape":
        state = optimizers.build("sumo", params.items(), **ours).state_dict()
        state["state"][0]["basis"] = torch.zeros(3, 3)
        return state
    if case == "missing":
        state = optimizers.build("sumo", params.items(), **ours).state_dict()
        state["state"] = {k: v for k, v in state["state"].items() if k}
        return state
    return {"model": {}}


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("torch", "another optimizer"),
        ("preset", "rule=muon"),
        ("rank", "rank=2"),
        ("names", "holds z where"),
        ("fewer", "has 2 parameters"),
        ("shape", r"shape \(3, 3\)"),
        ("missing", "no state for parameter 0"),
        ("garbage", "not an optimizer's state dict"),
    ],
)
def test_foreign_state_dicts_are_refused_with_the_reason(case: str, reason: str) -> None:
    params, optimizer = built("sumo")
    advance(params, optimizer, 0, 2)
    twin, untouched = copy.deepcopy((params, optimizer))
    with pytest.raises(ValueError, match=reason):
        optimizer.load_state_dict(_foreign(case))
    assert_same(params, twin, optimizer, untouched)


@pytest.mark.parametrize("preset", PRESETS)
def test_state_bytes_are_what_walking_the_state_finds(preset: str) -> None:
    params, optimizer = built(preset, torch.bfloat16, rounding="kahan")
    advance(params, optimizer, 0, 2)
    walked = sum(
        value.numel() * value.element_size()
        for entries in optimizer.state_dict()["state"].values()
        for value in entries.values()
        if isinstance(value, torch.Tensor)
    )
    assert sum(optimizer.state_bytes().values()) == walked
    storages = {
        v.untyped_storage().data_ptr(): v.untyped_storage().nbytes()
        for entries in optimizer.state.values()
        for v in entries.values()
        if isinstance(v, torch.Tensor)
    }
    assert sum(storages.values()) == walked


@pytest.mark.parametrize("preset", ["sumo", "muon", "galore", "adamw"])
def test_spectra_are_those_of_the_stored_moments(preset: str) -> None:
    params, optimizer = built(preset)
    advance(params, optimizer, 0, 4)
    spectra = optimizer.moment_spectra()
    assert set(spectra) == {"a", "b", "c"}
    for name, values in spectra.items():
        expected = torch.linalg.svdvals(optimizer.state[params[name]]["moment"].double())
        torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-6)
        assert not values.requires_grad


@pytest.mark.parametrize("preset", names())
def test_observed_figures(preset: str) -> None:
    params, optimizer = built(preset)
    advance(params, optimizer, 0, 3)
    assert optimizer.moment_figures() == {}
    optimizer.observe_moments()
    advance(params, optimizer, 3, 4)
    figures = optimizer.moment_figures()
    advance(params, optimizer, 4, 5)
    assert set(figures) == {"a", "b", "c"}
    applied = resolve(preset).get("orthogonalizer")
    for found in figures.values():
        assert all(value.ndim == 0 and torch.isfinite(value) for value in found.values())
        assert ("polar_error" in found) is (applied is not None)
        if applied in ("auto", "svd"):
            # fp32 factors: eps32 times κ, which is below 100 here.
            assert found["polar_error"] < 1e-4
            assert found["orthogonality_error"] < 1e-5
        elif applied == "newton_schulz":
            assert found["polar_error"] > 0.05
    assert optimizer.orthogonalizations == (3 if applied else 0)


def test_plugins_by_import_path() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    assert isinstance(optimizers.build("torch.optim.SGD", [("w", weight)], lr=0.1), torch.optim.SGD)
    assert optimizers.plugin("torch.optim.SGD") is torch.optim.SGD
    for bad in ("torch.optim.NoSuch", "nosuchpackage.X", "torch.nn.Linear"):
        with pytest.raises(OptionError):
            optimizers.plugin(bad)
    with pytest.raises(OptionError, match="not an optimizer"):
        optimizers.build("sumoo", [("w", weight)])


def test_soap_of_pytorch_optimizer_trains() -> None:
    pytest.importorskip("pytorch_optimizer")
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = optimizers.build("pytorch_optimizer.SOAP", [("w", weight)], lr=0.1)
    for _ in range(3):
        weight.grad = weight.detach().clone()
        optimizer.step()
    assert weight.norm() < 4.0


def test_sparse_complex_and_integer_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="floating"):
        optimizers.Muon([nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))])
    with pytest.raises(TypeError, match="names or none"):
        optimizers.Muon([("a", nn.Parameter(torch.ones(3, 3))), nn.Parameter(torch.ones(3, 3))])


@pytest.mark.parametrize("preset", ["sumo", "muon", "galore", "adamw"])
def test_a_tensor_lr_is_one_of_its_own_in_each_group(preset: str) -> None:
    """Schedulers write into a tensor: a group that keeps its rate, or has another factor, must not follow."""
    params = parameters()
    groups = [
        {"params": [("a", params["a"]), ("norm.weight", params["norm.weight"])], "scheduled": False},
        {"params": [("b", params["b"]), ("embed.weight", params["embed.weight"])]},
    ]
    lr = torch.tensor(0.25)
    optimizer: Any = optimizers.Optimizer(groups, lr=lr, preset=preset)
    assert len(
        {id(v) for g in optimizer.param_groups for v in g.values() if isinstance(v, torch.Tensor)}
    ) == sum(isinstance(v, torch.Tensor) for g in optimizer.param_groups for v in g.values())
    start = [float(group["lr"]) for group in optimizer.param_groups]
    assert start.count(0.25) >= 2
    factors = [0.5 ** (i + 1) for i in range(len(optimizer.param_groups))]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda t, f=f: f**t for f in factors])
    scheduler.step()
    assert float(lr) == 0.25
    for group, factor, peak in zip(optimizer.param_groups, factors, start):
        assert float(group["lr"]) == pytest.approx(peak * factor)
        assert float(group["fixed_lr"]) == pytest.approx(peak)
    fixed = copy.deepcopy(params["a"])
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = (params["a"] - fixed).detach()
    twin = {"a": nn.Parameter(fixed.detach().clone())}
    alone: Any = optimizers.build(preset, twin.items(), lr=0.25)
    twin["a"].grad = torch.ones_like(twin["a"])
    alone.step()
    torch.testing.assert_close(moved, (twin["a"] - fixed).detach(), rtol=1e-5, atol=1e-6)


def cycle(kind: str, optimizer: Any) -> Any:
    if kind == "one":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8)
    return torch.optim.lr_scheduler.CyclicLR(optimizer, base_lr=0.01, max_lr=0.1, step_size_up=3)


@pytest.mark.parametrize("kind", ["one", "cyclic"])
def test_adamw_under_a_momentum_cycle_is_torch_s(kind: str) -> None:
    params, other = parameters(), parameters()
    ours: Any = optimizers.build(
        "adamw", params.items(), lr=0.05, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8
    )
    theirs = torch.optim.AdamW(other.values(), lr=0.05, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    schedulers = cycle(kind, ours), cycle(kind, theirs)
    for t in range(6):
        give_gradients(params, t)
        give_gradients(other, t)
        for optimizer, scheduler in zip((ours, theirs), schedulers):
            optimizer.step()
            scheduler.step()
    for name in params:
        torch.testing.assert_close(params[name], other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["one", "cyclic"])
@pytest.mark.parametrize("preset", ["sumo", "muon", "galore", "sumo_official"])
def test_a_momentum_cycle_reaches_matrices_and_adamw(preset: str, kind: str) -> None:
    """The oracle: the same numbers written into the groups by hand."""
    params, optimizer = built(preset)
    other, twin = built(preset)
    scheduler = cycle(kind, optimizer)
    seen = set()
    for t in range(6):
        give_gradients(params, t)
        give_gradients(other, t)
        for group, copied in zip(optimizer.param_groups, twin.param_groups):
            first = group["betas"][0] if preset == "galore" else group["momentum"]
            seen.add(round(first, 4))
            copied["lr"] = group["lr"]
            if "momentum" in copied:
                copied["momentum"] = first
            elif copied["scheduled"]:
                copied["betas"] = (first, copied["betas"][1])
        optimizer.step()
        twin.step()
        scheduler.step()
    assert len(seen) > 3
    for name in params:
        assert torch.equal(params[name], other[name]), name
    assert set(twin.param_groups[1]) >= {"betas"}


@pytest.mark.parametrize("preset", ["sumo", "muon", "galore", "adamw"])
def test_other_schedulers_of_torch(preset: str) -> None:
    from torch.optim import lr_scheduler as schedules

    for make in (
        lambda o: schedules.ReduceLROnPlateau(o, patience=0),
        lambda o: schedules.SequentialLR(
            o, [schedules.LinearLR(o, 0.1, total_iters=2), schedules.CosineAnnealingLR(o, 4)], [2]
        ),
        lambda o: schedules.ChainedScheduler([schedules.ExponentialLR(o, 0.9), schedules.StepLR(o, 2)]),
        lambda o: schedules.CosineAnnealingWarmRestarts(o, 2),
        lambda o: schedules.PolynomialLR(o, 5),
    ):
        for lr in (0.05, torch.tensor(0.05)):
            params = parameters()
            optimizer: Any = optimizers.build(preset, params.items(), lr=lr, **options(preset))
            scheduler = make(optimizer)
            rates = []
            for t in range(4):
                give_gradients(params, t)
                optimizer.step()
                rates.append([float(group["lr"]) for group in optimizer.param_groups])
                if isinstance(scheduler, schedules.ReduceLROnPlateau):
                    scheduler.step(1.0)
                else:
                    scheduler.step()
            assert rates[0] != rates[-1]
            restored = make(optimizer)
            restored.load_state_dict(scheduler.state_dict())
            assert all(bool(p.isfinite().all()) for p in params.values())


@pytest.mark.parametrize("preset", ["sumo", "adamw"])
def test_compiling_the_step_changes_nothing(preset: str) -> None:
    params, optimizer = built(preset)
    other, twin = built(preset)
    compiled = torch.compile(optimizer.step)
    around = torch.compile(lambda: optimizer.step())
    for t in range(3):
        give_gradients(params, t)
        give_gradients(other, t)
        (compiled if t % 2 else around)()
        twin.step()
    assert_same(params, other, optimizer, twin)


@pytest.mark.parametrize("preset", ["sumo", "muon", "galore", "adamw"])
def test_a_sparse_gradient_is_refused_with_the_alternative(preset: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(10, 8, sparse=True), nn.Linear(8, 8))
    optimizer = optimizers.build(preset, net.named_parameters(), modules=net)
    before = copy.deepcopy(net.state_dict())
    net(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"^0.weight: its gradient is sparse.*sparse=False.*SparseAdam"):
        optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_the_scaler_of_torch_skips_and_goes_on() -> None:
    params, optimizer = built("muon")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for t in range(3):
        give_gradients(params, t, bad=t == 1)
        for p in params.values():
            assert p.grad is not None
            p.grad.mul_(scaler.get_scale())
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert {optimizer.state[p]["step"] for p in params.values()} == {2}
    assert optimizer.skipped_steps == {}


def test_averaged_weights_are_copies_of_their_own() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = optimizers.build("sumo", net.named_parameters(), modules=net, lr=0.05)
    average = torch.optim.swa_utils.AveragedModel(net)
    swa = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.01)
    for t in range(4):
        optimizer.zero_grad()
        net(torch.randn(4, 8, generator=torch.Generator().manual_seed(t))).square().mean().backward()
        optimizer.step()
        swa.step()
        average.update_parameters(net)
    mean, last = average.module.get_parameter("0.weight"), net.get_parameter("0.weight")
    assert bool(mean.isfinite().all())
    assert not torch.equal(mean, last)


@pytest.mark.parametrize("preset", ["sumo", "muon", "galore"])
def test_an_adamw_group_that_is_added_later_takes_the_options_of_adamw(preset: str) -> None:
    """The matrix rule's momentum is no β₁ of the group; control: the group that was there from the start."""
    matrix, early, late = (nn.Parameter(torch.ones(shape)) for shape in ((6, 4), (5,), (5,)))
    options: dict[str, Any] = {"rank": 2} if "rank" in optimizers.resolve(preset) else {}
    optimizer = optimizers.build(preset, [("m", matrix), ("early", early)], **options)
    optimizer.add_param_group({"params": [("late", late)]})
    for _ in range(3):
        for parameter in (matrix, early, late):
            parameter.grad = torch.arange(1.0, 1.0 + parameter.numel()).view_as(parameter)
        optimizer.step()
    assert torch.equal(early, late)
