"""The low-rank family: each member against its fp64 twin and, where one is installable, against a public code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import optimizers
from optimizers.linalg.counter_normals import counter_normals
from optimizers.linalg.random_bases import coin, refresh_key
from optimizers.options import OptionError
from optimizers.reference.low_rank import Apollo, DctSubspace, Fira, Gum, LDAdam, SubTrack
from optimizers.rules.parts import subspaces
from tests.optimizers.problems import Oracle, run_both
from tests.optimizers.test_galore import signed_svd
from tests.oracles.apollo_torch import apollo_modules
from tests.oracles.streams import Matrix, Stream

SHAPES = [(24, 16), (16, 24), (20, 20)]
RANK, LR, INTERVAL, STEPS = 4, 0.05, 7, 30
# fp64 on both sides. The DCT of one comes from an FFT, and chosen columns that hold little are divided by their own
# root mean square: 1e-16 over (1e-2 · 1e-2)² of the gradient's energy.
TOLERANCE = 1e-9


def normals(step: int, rows: int, rank: int) -> Matrix:
    """The numbers of the matrix "w" under seed 0."""
    return counter_normals(refresh_key(0, "w", step), (rows, rank), "cpu").double().numpy()


def full_rank(period: int) -> bool:
    """Which periods of "w" are full rank at a probability of a half."""
    return coin(refresh_key(0, "w", period, "full rank"), 0.5)


Build = Callable[..., Oracle]
COMMON = {"lr": LR, "rank": RANK}
MEMBERS: dict[str, tuple[str, Build, dict[str, Any]]] = {
    "fira": ("fira", lambda w, **o: Fira(w, RANK, LR, INTERVAL, **o), {"refresh_interval": INTERVAL}),
    "apollo": (
        "apollo",
        lambda w, **o: Apollo(w, RANK, LR, INTERVAL, normals=normals, **o),
        {"refresh_interval": INTERVAL},
    ),
    "apollo_mini": (
        "apollo_mini",
        lambda w, **o: Apollo(
            w, 1, LR, INTERVAL, **{"alpha": 128**0.5, "by_channel": False, "normals": normals, **o}
        ),
        {"refresh_interval": INTERVAL, "rank": 1},
    ),
    "ldadam": ("ldadam", lambda w, **o: LDAdam(w, RANK, LR, **o), {}),
    "subtrack": (
        "subtrack",
        lambda w, **o: SubTrack(w, RANK, LR, INTERVAL, **{"eta": 10.0, **o}),
        {"refresh_interval": INTERVAL},
    ),
    "dct": (
        "dct_subspace",
        lambda w, **o: DctSubspace(w, RANK, LR, **{"interval": INTERVAL, **o}),
        {"refresh_interval": INTERVAL},
    ),
    "dct with feedback": (
        "dct_subspace",
        lambda w, **o: DctSubspace(w, RANK, LR, **{"feedback": True, **o}),
        {"error_feedback": "gradient"},
    ),
    "gum": (
        "gum",
        lambda w, **o: Gum(
            w,
            RANK,
            LR,
            INTERVAL,
            **{"scale": 0.2 * max(w.shape) ** 0.5, "probability": 0.5, "coin": full_rank, **o},
        ),
        {"refresh_interval": INTERVAL, "full_rank_probability": 0.5, "orthogonalizer": "auto"},
    ),
}


def distance(
    member: str, shape: tuple[int, int], wrong: dict[str, Any] | None = None, **options: Any
) -> float:
    """‖W - W_oracle‖ / ‖W_oracle - W_0‖ after 30 steps with refreshes inside, each on its own feedback."""
    preset, build, given = MEMBERS[member]
    oracle = build(Stream(shape, RANK).start, **(wrong or {}))
    values = {**COMMON, **given, **options}
    return run_both(preset, oracle, Stream(shape, RANK), Stream(shape, RANK), STEPS, **values)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("member", list(MEMBERS))
def test_thirty_steps_agree_with_the_fp64_twin(member: str, shape: tuple[int, int]) -> None:
    assert distance(member, shape) < TOLERANCE


@pytest.mark.parametrize(
    ("member", "wrong"),
    [
        ("fira", {"limit": 1.1}),
        ("fira", {"long": False}),
        ("apollo", {"by_channel": False}),
        ("apollo", {"limit": 1.1}),
        ("apollo_mini", {"by_channel": True}),
        ("ldadam", {"rho": 0.5}),
        ("subtrack", {"eta": 1.0}),
        ("dct", {"interval": 6}),
        ("dct with feedback", {"feedback": False}),
        ("gum", {"coin": lambda period: not full_rank(period)}),
        ("gum", {"momentum": 0.9}),
    ],
)
def test_wrong_variants_are_told_apart(member: str, wrong: dict[str, Any]) -> None:
    assert distance(member, (24, 16), wrong) > 1e4 * TOLERANCE


def test_fira_without_its_residual_is_galore() -> None:
    options: dict[str, Any] = {"lr": LR, "rank": RANK, "refresh_interval": INTERVAL}
    weights = []
    for preset, more in (("galore", {}), ("fira", {"residual": "drop", "norm_growth_limit": None})):
        weight = torch.nn.Parameter(torch.ones(24, 16, dtype=torch.float64))
        optimizer = optimizers.build(preset, [("w", weight)], **options, **more)
        stream = Stream((24, 16), RANK)
        for _ in range(10):
            weight.grad = torch.from_numpy(stream(np.zeros((24, 16))))
            optimizer.step()
        weights.append(weight.detach())
    assert torch.equal(*weights)


def fp32_pair(
    preset: str, public: Any, group: dict[str, Any], shape: tuple[int, int], **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Our weight, theirs and the start, after 20 steps in fp32."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).float()
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    a = optimizers.build(preset, [("w", ours)], lr=LR, rank=RANK, refresh_interval=INTERVAL, **options)
    b = public([{"params": [theirs], **group}], lr=LR, weight_decay=0.0)
    stream = Stream(shape, RANK)
    for _ in range(20):
        gradient = torch.from_numpy(stream(np.zeros(shape))).float()
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    return ours.detach(), theirs.detach(), start


@pytest.mark.parametrize("shape", SHAPES)
def test_fira_of_pytorch_optimizer(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """At a scale of 1, with which the public code takes Q R off the gradient, and not a part of it."""
    public = pytest.importorskip("pytorch_optimizer").Fira
    monkeypatch.setattr(torch.linalg, "svd", signed_svd)
    group = {"rank": RANK, "update_proj_gap": INTERVAL, "scale": 1.0, "projection_type": "std"}
    # Its counter starts at 1: the second subspace comes at step K - 1.
    ours, theirs, start = fp32_pair("fira", public, group, shape, alpha=1.0, refresh_offset=1)
    # As for galore-torch: eps32·σ1/gap a refresh, divided by small entries of the second moment.
    assert (ours - theirs).norm() / (theirs - start).norm() < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["channel", "tensor"])
def test_apollo_torch(kind: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of the authors, with our random numbers; it is not free software, and not a dependency."""
    apollo, random_projector = apollo_modules()
    drawn = [0]

    def ours(shape: tuple[int, int], seed: int, device: Any = None, dtype: Any = None) -> torch.Tensor:
        rows, columns = max(shape), min(shape)
        numbers = torch.from_numpy(normals(INTERVAL * drawn[0], rows, columns)).float()
        drawn[0] += 1
        return numbers if shape[0] == rows else numbers.T

    monkeypatch.setattr(random_projector, "stable_randn", ours)
    group = {
        "rank": RANK,
        "proj": "random",
        "scale_type": kind,
        "scale": 4.0,
        "update_proj_gap": INTERVAL,
        "proj_type": "std",
    }

    def public(groups: list[dict[str, Any]], **more: Any) -> Any:
        return apollo.AdamW(groups, no_deprecation_warning=True, **more)

    preset = "apollo" if kind == "channel" else "apollo_mini"
    a, b, start = fp32_pair(preset, public, group, shape, alpha=2.0)
    assert (a - b).norm() / (b - start).norm() < 1e-5


@pytest.mark.parametrize(
    ("preset", "options", "key", "hint"),
    [
        ("sumo", {"residual": "scaled"}, "residual", "scaled with inner=adam"),
        ("sumo", {"gradient_scaling": "channel", "residual": "drop"}, "gradient_scaling", "none"),
        ("galore", {"residual": "unbiased"}, "residual", "unbiased with inner=orthogonalize"),
        ("gum", {"transport": True}, "transport", "false"),
        ("apollo", {"residual": "sgd"}, "residual", "drop"),
        ("galore", {"basis": "gaussian"}, "basis", "random"),
        ("apollo", {"transport": True}, "transport", "false"),
        ("sumo", {"basis": "power"}, "basis", "power with inner=adam"),
        ("sumo", {"transport": "projection_aware"}, "transport", "true"),
        ("sumo", {"error_feedback": "gradient"}, "error_feedback", "false"),
        ("galore", {"error_feedback": "generalized"}, "error_feedback", "gradient"),
        ("galore", {"norm_growth_limit": 1.1, "norm_growth_target": "factor"}, "norm_growth_target", "total"),
        ("fira", {"norm_growth_target": "total"}, "norm_growth_target", "residual"),
        ("apollo", {"norm_growth_target": "residual"}, "norm_growth_target", "total"),
        ("gum", {"norm_growth_limit": 1.1}, "norm_growth_limit", "null"),
        ("gum", {"residual_scale": 0.5}, "residual_scale", "1"),
        ("sumo", {"residual": "drop", "residual_scale": 0.5}, "residual_scale", "0.5 with residual=sgd"),
        ("sumo", {"betas": (0.9, 0.99)}, "betas", None),
        ("galore", {"momentum": 0.9}, "momentum", None),
        ("galore", {"track_step": 1.0}, "track_step", None),
    ],
)
def test_combinations_without_a_meaning_are_refused(
    preset: str, options: dict[str, Any], key: str, hint: str | None
) -> None:
    with pytest.raises(OptionError) as caught:
        optimizers.resolve(preset, options)
    assert caught.value.key == key
    if hint is not None:
        assert hint in caught.value.allowed


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("sumo", {"inner": "adam", "betas": (0.9, 0.99)}),
        ("sumo", {"inner": "sign", "momentum": 0.9}),
        ("sumo", {"basis": "dct"}),
        ("sumo", {"basis": "random", "residual": "drop"}),
        ("sumo", {"basis": "tracked", "track_step": 0.1}),
        ("sumo", {"refresh_threshold": 0.1, "basis": "tracked"}),
        ("galore", {"inner": "orthogonalize", "orthogonalizer": "newton_schulz"}),
        ("galore", {"residual": "scaled", "norm_growth_target": "residual", "norm_growth_limit": 1.01}),
        ("galore", {"residual": "sgd", "transport": "projection_aware"}),
        ("galore", {"basis": "power", "refresh_interval": 1, "transport": "projection_aware"}),
        ("galore", {"norm_growth_limit": 1.1}),
        ("galore", {"refresh_threshold": 0.1, "basis": "random"}),
        ("fira", {"basis": "dct"}),
        ("apollo", {"basis": "svd"}),
        ("ldadam", {"refresh_interval": 3}),
        ("gum", {"basis": "dct"}),
        ("gum", {"refresh_stagger": True}),
        ("apollo", {"update_rms": 0.2}),
        ("fira", {"update_rms": 0.2, "weight_decay": 0.1, "decay_order": "after"}),
        ("fira", {"state_dtype": "bfloat16"}),
    ],
)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_other_combinations_take_steps(preset: str, options: dict[str, Any], shape: tuple[int, int]) -> None:
    """Two matrices in a batch, one of which starts with a zero gradient: eight steps in fp32 are finite and move."""
    named = [(f"layers.{i}.w", torch.nn.Parameter(torch.ones(shape))) for i in range(2)]
    optimizer = optimizers.build(preset, named, **{"lr": 0.01, "rank": 4, "refresh_interval": 3, **options})
    stream, before = Stream(shape, RANK), [p.detach() for _, p in named]
    for step in range(8):
        before = [p.detach().clone() for _, p in named]
        for i, (_, p) in enumerate(named):
            p.grad = torch.from_numpy(stream(np.zeros(shape))).float() * (step > 0 or i == 0)
        optimizer.step()
        assert all(p.isfinite().all() for _, p in named)
        assert not torch.equal(named[0][1].detach(), before[0])
    assert not torch.equal(named[1][1].detach(), before[1])


@pytest.mark.parametrize(
    ("preset", "options", "expected"),
    [
        ("sumo", {"residual_scale": 0.0}, ("drop", 0.0)),
        ("sumo", {"residual": "drop"}, ("drop", 0.0)),
        ("sumo", {"residual_scale": 0.5}, ("sgd", 0.5)),
        ("galore_muon", {}, ("drop", 0.0)),
        ("galore_muon", {"residual": "sgd"}, ("sgd", 1.0)),
        ("galore_muon", {"residual_scale": 0.5}, ("sgd", 0.5)),
        ("galore", {"residual": "sgd"}, ("sgd", 1.0)),
    ],
)
def test_residual_and_its_factor_agree(
    preset: str, options: dict[str, Any], expected: tuple[str, float]
) -> None:
    values = optimizers.resolve(preset, options)
    assert (values["residual"], values["residual_scale"]) == expected


def test_a_group_overrides_what_the_optimizer_has() -> None:
    weights = [torch.nn.Parameter(torch.ones(8, 6)) for _ in range(3)]
    groups = [
        {"params": weights[:1]},
        {"params": weights[1:2], "residual_scale": 0.0},
        {"params": weights[2:], "inner": "adam"},
    ]
    optimizer = optimizers.SUMO(groups, lr=0.1, rank=2)
    assert [g["residual"] for g in optimizer.param_groups] == ["sgd", "drop", "sgd"]
    assert ["betas" in g for g in optimizer.param_groups] == [False, False, True]
    assert "momentum" not in optimizer.param_groups[2]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preset", ["ldadam", "subtrack"])
def test_a_basis_of_a_first_gradient_of_low_rank_is_completed(preset: str, shape: tuple[int, int]) -> None:
    class LowRankFirst(Stream):
        """A stream whose first gradient has rank 2."""

        first = True

        def __call__(self, weight: Matrix) -> Matrix:
            gradient = super().__call__(weight)
            if not self.first:
                return gradient
            self.first = False
            u, s, vt = np.linalg.svd(gradient, full_matrices=False)
            return (u[:, :2] * s[:2]) @ vt[:2]

    start, steps = Stream(shape, 6).start, 21
    oracle: Oracle
    more: dict[str, Any]
    # η·σ stays small: over many turns both sides would lose digits.
    if preset == "ldadam":
        oracle, more = LDAdam(start, 6, LR), {}
    else:
        oracle, more = SubTrack(start, 6, LR, 2, eta=0.1), {"refresh_interval": 2, "track_step": 0.1}
    ours, theirs = LowRankFirst(shape, 6), LowRankFirst(shape, 6)
    # V̂ - M̂² is zero after one step: what rounding leaves of it, 1e-17, is under a root in the new coordinates.
    assert run_both(preset, oracle, ours, theirs, steps, lr=LR, rank=6, **more) < 1e-8

    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer: Any = optimizers.build(preset, [("w", weight)], lr=LR, rank=6, **more)
    stream = LowRankFirst(shape, 6)
    found = []
    for _ in range(steps):
        weight.grad = torch.from_numpy(stream(weight.detach().numpy()))
        optimizer.step()
        found.append(int((optimizer.state[weight]["basis"].norm(dim=0) > 0.5).sum()))
    assert found == [2] + [6] * (steps - 1)


@pytest.mark.parametrize("preset", ["ldadam", "subtrack"])
def test_gradients_that_stay_of_low_rank_cost_few_svds(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more: dict[str, Any] = {} if preset == "ldadam" else {"refresh_interval": 100}
    weight = torch.nn.Parameter(torch.zeros(16, 12))
    optimizer: Any = optimizers.build(preset, [("w", weight)], lr=LR, rank=6, **more)
    seen: list[int] = []
    svd = subspaces.svd_basis

    def counted(*args: Any) -> torch.Tensor:
        seen.append(optimizer.state[weight]["step"])
        return svd(*args)

    monkeypatch.setattr(subspaces, "svd_basis", counted)
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(16, 2, generator=generator), torch.randn(2, 12, generator=generator)
    for _ in range(20):
        weight.grad = left @ right
        optimizer.step()
    assert seen == [0, 1, 2, 4, 8, 16]


def test_half_of_the_periods_are_full_rank_and_the_mean_is_the_gradient() -> None:
    keys = [refresh_key(0, f"layers.{i}.w", k, "full rank") for i in range(40) for k in range(50)]
    share = np.mean([coin(key, 0.25) for key in keys])
    # Binomial: σ = √(q(1 - q)/2000) = 0.0097.
    assert abs(share - 0.25) < 4 * 0.0097


@pytest.mark.parametrize("preset", ["fira", "apollo", "ldadam", "gum", "subtrack", "dct_subspace"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(preset: str) -> None:
    options: dict[str, Any] = {"rank": 4, **({"full_rank_probability": 0.5} if preset == "gum" else {})}
    options |= {} if preset in ("ldadam", "dct_subspace") else {"refresh_interval": 3}

    def build() -> tuple[list[tuple[str, torch.nn.Parameter]], Any]:
        named = [(f"layers.{i}.w", torch.nn.Parameter(torch.ones(12, 8))) for i in range(3)]
        return named, optimizers.build(preset, named, lr=0.05, **options)

    def run(named: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for _, p in named:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    whole, first = build(), build()
    run(*whole, range(9))
    run(*first, range(4))
    second = build()
    for (_, p), (_, q) in zip(second[0], first[0]):
        p.data.copy_(q.data)
    second[1].load_state_dict(first[1].state_dict())
    run(*second, range(4, 9))
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(whole[0], second[0]))


def test_an_old_state_dict_lacks_the_new_options() -> None:
    weight = torch.nn.Parameter(torch.ones(12, 8))
    optimizer = optimizers.SUMO([weight], lr=0.1, rank=4)
    weight.grad = torch.randn(12, 8)
    optimizer.step()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        for key in ("inner", "residual", "gradient_scaling", "error_feedback"):
            del group[key]
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert optimizer.param_groups[0]["inner"] == "orthogonalize"
