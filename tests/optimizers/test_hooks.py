"""Options around any rule, against their formulas in fp64, on the updates that the rule gives without them.

Gradients do not depend on the weights here, so a rule's updates Δ_t are the same with and without the options: a twin
without them and without decay yields Δ_t = (W_t - W_(t+1))/lr, and the formula is applied to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

import optimizers
from optimizers import OptionError
from optimizers.presets import names, resolve
from tests.optimizers.test_masked_steps import assert_same, give_gradients, options, run

LR, STEPS = 0.05, 6
SHAPES = {"a": (16, 12), "b": (12, 16), "c": (16, 12), "norm.weight": (12,), "embed.weight": (20, 12)}
MATRICES = ("a", "b", "c")
Array = np.ndarray[Any, np.dtype[np.float64]]
Trajectory = list[dict[str, Array]]


def trajectory(
    preset: str, steps: int = STEPS, dtype: torch.dtype = torch.float64, **more: Any
) -> Trajectory:
    """Weights before the first and after each step, on gradients that are a function of the step."""
    generator = torch.Generator().manual_seed(0)
    params = {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in SHAPES.items()
    }
    known = resolve(preset)
    base = {
        "rank": 4,
        "refresh_interval": 3,
        "weight_decay": 0.0,
        "aux_weight_decay": 0.0,
        "orthogonalizer_dtype": "float32",
    }
    given = {**{key: value for key, value in base.items() if key in known}, **more}
    optimizer: Any = optimizers.build(preset, params.items(), lr=LR, **given)
    found = [{name: p.detach().double().numpy().copy() for name, p in params.items()}]
    for step in range(steps):
        give_gradients(params, step)
        optimizer.step()
        found.append({name: p.detach().double().numpy().copy() for name, p in params.items()})
    return found


def expected(preset: str, move: Callable[[str, Array, Array, Array], Array], **more: Any) -> Trajectory:
    """Apply `move(name, weight, update, first weight)` to the updates of the bare rule, step by step."""
    bare = trajectory(preset, **more)
    weights = [dict(bare[0])]
    for before, after in pairwise(bare):
        updates = {name: (before[name] - after[name]) / LR for name in before}
        weights.append(
            {name: move(name, weights[-1][name], updates[name], bare[0][name]) for name in updates}
        )
    return weights


def worst(found: Trajectory, wanted: Trajectory) -> float:
    """Largest relative error of a parameter's total change."""
    return max(
        float(
            np.linalg.norm(found[-1][name] - wanted[-1][name])
            / np.linalg.norm(wanted[-1][name] - wanted[0][name])
        )
        for name in wanted[-1]
    )


# Everything is fp64; Δ is a difference of weights over lr, exact to 1e-15/0.05. A wrong formula shows at 1e-2.
TOLERANCE = 1e-11
DECAY = 0.5


def cautious(name: str, weight: Array, update: Array, first: Array) -> Array:
    return weight - LR * update - LR * DECAY * np.where(update * weight >= 0, weight, 0.0)


@pytest.mark.parametrize("preset", ["sumo", "sumo_official", "galore", "muon", "adamw"])
def test_cautious_decay(preset: str) -> None:
    more: dict[str, Any] = {"weight_decay": DECAY}
    if preset != "adamw":
        more["aux_weight_decay"] = DECAY

    def after(name: str, weight: Array, update: Array, first: Array) -> Array:
        shrunk = np.where(update * weight >= 0, 1 - LR * DECAY, 1.0)
        return shrunk * (weight - LR * update)

    def move(name: str, *rest: Array) -> Array:
        decays_after = preset == "sumo_official" and name in MATRICES
        return (after if decays_after else cautious)(name, *rest)

    aux: dict[str, Any] = {"aux_lr": LR} if preset != "adamw" else {}
    wanted = expected(preset, move, **aux)
    found = trajectory(preset, weight_decay_form="cautious", **more, **aux)
    assert worst(found, wanted) < TOLERANCE
    # Control: ordinary decay is another thing.
    assert worst(trajectory(preset, **more, **aux), wanted) > 1e-2


@pytest.mark.parametrize("preset", ["sumo", "galore", "galore_muon", "muon"])
def test_updates_get_the_root_mean_square_that_is_asked_for(preset: str) -> None:
    def move(name: str, weight: Array, update: Array, first: Array) -> Array:
        if name in MATRICES:
            update = update * 0.2 / math.sqrt(float(np.mean(update**2)))
        return weight - LR * update

    aux: dict[str, Any] = {"aux_lr": LR}
    wanted = expected(preset, move, **aux)
    assert worst(trajectory(preset, update_rms=0.2, **aux), wanted) < TOLERANCE
    # The rule's own scale has no say.
    assert worst(trajectory(preset, update_rms=0.2, alpha=3.0, **aux), wanted) < TOLERANCE
    assert worst(trajectory(preset, update_rms=0.21, **aux), wanted) > 1e-2


def normed(matrix: Array) -> Array:
    return matrix / np.linalg.norm(matrix)


@pytest.mark.parametrize("form", ["fixed", "hyperball"])
@pytest.mark.parametrize("preset", ["sumo", "galore", "muon", "adamw"])
def test_norms_of_weights(preset: str, form: str) -> None:
    if preset == "adamw" and form == "hyperball":
        with pytest.raises(OptionError, match="element by element; allowed: free, fixed"):
            trajectory(preset, weight_norm=form)
        return

    def move(name: str, weight: Array, update: Array, first: Array) -> Array:
        if name not in MATRICES:
            return weight - LR * update
        radius = np.linalg.norm(first)
        if form == "hyperball":
            update = radius * normed(update)
        return radius * normed(weight - LR * update)

    aux: dict[str, Any] = {"aux_lr": LR} if preset != "adamw" else {}
    wanted = expected(preset, move, **aux)
    found = trajectory(preset, weight_norm=form, **aux)
    assert worst(found, wanted) < TOLERANCE
    other = "fixed" if form == "hyperball" else "free"
    assert worst(trajectory(preset, weight_norm=other, **aux), wanted) > 1e-2


@pytest.mark.parametrize("form", ["fixed", "hyperball"])
def test_a_matrix_of_zeros_has_no_norm_to_keep(form: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(6, 4))
    optimizer = optimizers.build("muon", [("w", weight)], lr=0.1, weight_norm=form)
    weight.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert 0.1 < float(weight.detach().norm()) < 1.0


@pytest.mark.parametrize("preset", ["sumo", "muon", "adamw"])
def test_the_average_is_corrected_for_its_start(preset: str) -> None:
    beta = 0.9
    params = {
        name: torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for name, shape in SHAPES.items()
    }
    generator = torch.Generator().manual_seed(0)
    for p in params.values():
        p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    given: dict[str, Any] = {"rank": 4} if "rank" in resolve(preset) else {}
    optimizer: Any = optimizers.build(preset, params.items(), lr=LR, average_decay=beta, **given)
    path: Trajectory = []
    for step in range(STEPS):
        give_gradients(params, step)
        optimizer.step()
        path.append({name: p.detach().numpy().copy() for name, p in params.items()})
    shares = np.array([(1 - beta) * beta ** (STEPS - 1 - i) for i in range(STEPS)]) / (1 - beta**STEPS)
    assert shares.sum() == pytest.approx(1.0)
    for name, p in params.items():
        wanted = sum(share * weights[name] for share, weights in zip(shares, path))
        raw = p.detach().clone()
        with optimizer.averaged_weights():
            np.testing.assert_allclose(p.detach().numpy(), wanted, rtol=1e-12, atol=1e-14)
            assert not torch.equal(p, raw)
        assert torch.equal(p, raw)
    sizes = optimizer.state_bytes()
    assert sizes["average"] == 8 * sum(p.numel() for p in params.values())


def test_half_precision_weights_get_their_own_bits_back() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).bfloat16())
    optimizer: Any = optimizers.build("muon", [("w", weight)], lr=0.1, average_decay=0.5)
    for step in range(3):
        give_gradients({"w": weight}, step)
        optimizer.step()
    raw, average = weight.detach().clone(), optimizer.state[weight]["average"].clone()
    assert average.dtype == torch.float32
    with optimizer.averaged_weights():
        assert torch.equal(weight, average.bfloat16())
    assert torch.equal(weight, raw)
    assert torch.equal(optimizer.state[weight]["average"], average)


def test_an_exchange_that_fails_halfway_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    params = {f"w{i}": torch.nn.Parameter(torch.eye(3) * (i + 1)) for i in range(3)}
    optimizer: Any = optimizers.build("adamw", params.items(), lr=0.1, average_decay=0.5)
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    raw = {name: p.detach().clone() for name, p in params.items()}
    averages = {name: optimizer.state[p]["average"].clone() for name, p in params.items()}
    clone, calls = torch.Tensor.clone, []

    def short_of_memory(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return clone(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", short_of_memory)
        with pytest.raises(RuntimeError, match="no memory"), optimizer.averaged_weights():
            pass
    assert len(calls) == 3  # one exchange, one that failed, one back
    for name, p in params.items():
        assert torch.equal(p, raw[name])
        assert torch.equal(optimizer.state[p]["average"], averages[name])


HOOKS: dict[str, dict[str, Any]] = {
    "cautious": {"weight_decay_form": "cautious", "weight_decay": 0.1},
    "rms": {"update_rms": 0.2},
    "fixed": {"weight_norm": "fixed", "weight_decay": 0.0},
    "hyperball": {"weight_norm": "hyperball", "weight_decay": 0.0},
    "average": {"average_decay": 0.9},
    "bf16": {"state_dtype": "bfloat16"},
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("preset", ["sumo", "muon", "adamw"])
def test_a_masked_step_leaves_no_trace(preset: str, hook: str) -> None:
    more = HOOKS[hook]
    if preset == "adamw" and hook in ("rms", "hyperball"):
        return
    clean = run(preset, torch.float32, None, **more)
    for masked_at in (0, 3):
        seen = run(preset, torch.float32, masked_at, **more)
        assert_same(clean[0], seen[0], clean[1], seen[1])


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("preset", ["sumo", "adamw"])
def test_a_state_dict_goes_on_exactly(preset: str, hook: str) -> None:
    more = HOOKS[hook]
    if preset == "adamw" and hook in ("rms", "hyperball"):
        return
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}

    def made() -> tuple[dict[str, torch.nn.Parameter], Any]:
        params = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
        return params, optimizers.build(preset, params.items(), lr=LR, **options(preset, **more))

    params, optimizer = made()
    other, resumed = made()
    for step in range(6):
        if step == 3:
            saved = optimizer.state_dict()
            for name, p in other.items():
                p.data.copy_(params[name].data)
            resumed.load_state_dict(saved)
        for named, one in ((params, optimizer), (other, resumed))[: 2 if step >= 3 else 1]:
            give_gradients(named, step)
            one.step()
    assert_same(params, other, optimizer, resumed)


@pytest.mark.parametrize("preset", ["sumo", "galore", "muon", "adamw"])
def test_moments_in_bf16_are_half_as_large_and_right_on_average(preset: str) -> None:
    """The moment of many equal runs but for the seed of the rounding averages to the fp32 one."""
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}

    def moments(seed: int, dtype: str) -> tuple[torch.Tensor, dict[str, int]]:
        params = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
        given = options(preset, seed=seed, state_dtype=dtype, basis="svd")
        optimizer: Any = optimizers.build(preset, params.items(), lr=LR, **given)
        for step in range(4):
            give_gradients(params, step)
            optimizer.step()
        return optimizer.state[params["a"]]["moment"].double(), optimizer.state_bytes()

    wide, sizes = moments(0, "float32")
    halves = [moments(seed, "bfloat16") for seed in range(32)]
    for kind in ("moment", "second_moment", "aux"):
        if kind in sizes:
            assert halves[0][1][kind] * 2 == sizes[kind]
    assert halves[0][1].get("basis") == sizes.get("basis")
    errors = torch.stack([moment - wide for moment, _ in halves])
    # One rounding is off by up to 2⁻⁸; four are remembered. The mean of 32 is √32 times closer if they are unbiased.
    single = float(errors[0].norm() / wide.norm())
    assert 5e-4 < single < 2**-6
    assert float(errors.mean(0).norm() / wide.norm()) < 0.35 * single
    assert not torch.equal(halves[0][0], halves[1][0])


def test_a_slow_moment_moves_in_bf16() -> None:
    """β₂ = 0.999 moves a moment by less than bf16's spacing: to nearest it would stay where it is."""
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    given = {"betas": (0.9, 0.999), "state_dtype": "bfloat16"}
    optimizer: Any = optimizers.build("adamw", [("w", weight)], lr=0.0, **given)
    for size in [1.0] + [2.0] * 60:
        weight.grad = torch.full_like(weight, size)
        optimizer.step()
    exact = 1e-3
    for _ in range(60):
        exact = 0.999 * exact + 4e-3
    second = optimizer.state[weight]["second_moment"]
    assert second.dtype == torch.bfloat16
    assert float(second.float().mean()) == pytest.approx(exact, rel=5e-3)


@pytest.mark.parametrize(
    ("preset", "given", "message"),
    [
        ("muon_moonlight", {"weight_norm": "fixed"}, "undoes weight_decay=0.1: .*fixed with weight_decay=0"),
        (
            "sumo",
            {"weight_norm": "hyperball", "update_rms": 0.2},
            "both set the size of the update; allowed: null",
        ),
        ("muon_clip", {"weight_norm": "fixed", "weight_decay": 0.0}, "undoes QK-clip"),
        ("soap", {"eps": 0.0}, "divides 0 by 0"),
        ("adamw", {"update_rms": 0.2}, "is not an option of adamw"),
        ("adamw", {"split_heads": True}, "is not an option of adamw"),
        ("sumo", {"weight_decay_form": "gentle"}, "allowed: decoupled, cautious"),
        ("sumo", {"average_decay": 1.0}, "allowed: a number >= 0 and <= 1, null"),
        ("sumo", {"state_dtype": "bf16"}, "did you mean bfloat16"),
    ],
)
def test_what_means_nothing_is_refused(preset: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        resolve(preset, given)


def test_norms_of_half_precision_weights_are_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(8, 6, dtype=torch.bfloat16))
    with pytest.raises(OptionError, match="needs fp32 weights, and w is bfloat16"):
        optimizers.build("muon", [("w", weight)], lr=0.1, weight_norm="fixed")


def test_a_state_dict_with_moments_of_another_dtype_is_refused() -> None:
    def made(dtype: str) -> Any:
        named = [
            ("w", torch.nn.Parameter(torch.ones(8, 6))),
            ("norm.weight", torch.nn.Parameter(torch.ones(6))),
        ]
        return optimizers.build("sumo", named, lr=0.1, rank=2, state_dtype=dtype)

    made("bfloat16").load_state_dict(made("bfloat16").state_dict())
    with pytest.raises(ValueError, match="written with state_dtype=bfloat16, this optimizer has float32"):
        made("float32").load_state_dict(made("bfloat16").state_dict())
    # One that was written before the option existed has what is the default now.
    older = made("float32").state_dict()
    for group in older["param_groups"]:
        del group["state_dtype"]
        group.pop("split_heads", None)
    made("float32").load_state_dict(older)


@pytest.mark.parametrize("preset", [name for name in names() if name != "adamw"])
def test_every_preset_takes_them(preset: str) -> None:
    """Sizes, norms and dtypes as asked for, whatever the rule."""
    given: dict[str, Any] = {
        k: v for k, v in {"rank": 4, "refresh_interval": 2}.items() if k in resolve(preset)
    }
    none: dict[str, Any] = {"weight_decay": 0.0}
    # SOAP's first step fills its state and moves nothing: an update of zeros stays one.
    first = 1 if preset == "soap" else 0
    found = trajectory(preset, 3, update_rms=0.3, **given, **none)[first:]
    for before, after in pairwise(found):
        for name in MATRICES:
            step = (after[name] - before[name]) / LR
            assert float(np.sqrt(np.mean(step**2))) == pytest.approx(0.3, rel=1e-9)
    if preset == "muon_clip":
        none["qk_clip_threshold"] = None  # refused together with norms that are kept
    found = trajectory(preset, 3, weight_norm="hyperball", **given, **none)[first:]
    for name in MATRICES:
        radius = np.linalg.norm(found[0][name])
        for before, after in pairwise(found):
            assert np.linalg.norm(after[name]) == pytest.approx(radius, rel=1e-12)
            # The step before the projection is LR·R long: what is left of it is a chord of about that length.
            assert np.linalg.norm(after[name] - before[name]) == pytest.approx(LR * radius, rel=0.05)
    weight = torch.nn.Parameter(torch.randn(16, 12, generator=torch.Generator().manual_seed(0)))
    optimizer: Any = optimizers.build(preset, [("w", weight)], lr=LR, state_dtype="bfloat16", **given)
    for step in range(3):
        give_gradients({"w": weight}, step)
        optimizer.step()
    kinds = {kind: value.dtype for kind, value in optimizer.state[weight].items() if torch.is_tensor(value)}
    assert kinds
    assert all((dtype == torch.bfloat16) is kind.endswith("moment") for kind, dtype in kinds.items())
    assert torch.bfloat16 in kinds.values()
    assert bool(weight.isfinite().all())


@pytest.mark.parametrize("preset", ["adamw", "muon"])
def test_spectra_of_bfloat16_moments_are_in_fp32(preset: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(16, 12))
    optimizer: Any = optimizers.build(preset, [("w", weight)], lr=LR, state_dtype="bfloat16")
    # σ = 1 … 1e-2: all above the fp32 cut, most below that of bfloat16.
    values = torch.logspace(0, -2, 12)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(k, 12, generator=generator))[0] for k in (16, 12))
    weight.grad = (left * values) @ right.mT
    optimizer.observe_moments()
    optimizer.step()
    stored = optimizer.state[weight]["moment"]
    assert stored.dtype == torch.bfloat16
    exact = torch.linalg.svdvals(stored.double())
    spectrum = optimizer.moment_spectra()["w"]
    assert spectrum.dtype == torch.float32
    torch.testing.assert_close(spectrum.double(), exact, rtol=1e-6, atol=0.0)
    if preset == "adamw":
        condition = float(optimizer.moment_figures()["w"]["condition_number"])
        assert condition == pytest.approx(float(exact[0] / exact[-1]), rel=1e-5)
