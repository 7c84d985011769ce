"""The fast rules compute what the optimizer classes compute, and steps that rounding swallows are seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analysis.margin import real
from analysis.margin.net import Nets, ToyProblem, ascent
from analysis.margin.optimizer_specs import resolve_spec
from analysis.margin.points import pair
from analysis.margin.real import ToyModule, objective
from analysis.margin.rules import has_fast_rule
from analysis.margin.steps import train
from harness.errors import InputError
from tests.analysis.margin.toys import A, net, optimizer

PRESETS: list[tuple[str, dict[str, object]]] = [
    ("gd", {}),
    ("adam", {}),
    ("adamw", {"weight_decay": 0.1}),
    ("muon", {}),
    ("muon_svd", {"weight_decay": 0.05}),
    ("muon_moonlight", {}),
    ("sumo", {}),
    ("sumo_official", {}),
    ("sumo_ns5", {}),
    ("galore", {}),
    ("galore_muon", {}),
]
TWO = net([2.0, -0.5], [0.1, -0.2])
FOUR = net([2.0, -0.5, 1.2, -1.3], [0.1, -0.2, 0.0, 0.0], [1.0, 1.0, -1.0, -1.0])
# Two separate roundings of one trajectory: a few hundred ulp after thousands of steps. SUMO and GaLore normalize
# small moments, which magnifies them.
TOLERANCE = 1e-10


def apart(start: Nets, name: str, options: dict[str, object], steps: int, ways: tuple[str, str]) -> float:
    """Largest difference of the weights over the way."""
    at = sorted({0, 1, 10, steps})
    chosen = resolve_spec(name, 0.01, options, "auto")
    first, second = (train(start, A, chosen, at, gives_up=False, computed_by=way).snapshots for way in ways)
    return max(float(np.abs(a.nets.hidden - b.nets.hidden).max()) for a, b in zip(first, second))


@pytest.mark.parametrize(("name", "options"), PRESETS, ids=[name for name, _ in PRESETS])
def test_rules_are_the_optimizer_classes(name: str, options: dict[str, object]) -> None:
    for start, steps in ((TWO, 200), (FOUR, 60)):
        assert apart(start, name, options, steps, ("rules", "optimizers")) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), PRESETS, ids=[name for name, _ in PRESETS])
def test_rules_are_the_optimizer_classes_over_10000_steps(name: str, options: dict[str, object]) -> None:
    assert apart(TWO, name, options, 10_000, ("rules", "optimizers")) < 1e-8


@pytest.mark.parametrize("name", ["gd", "ngd", "sign", "spectral"])
def test_references_are_the_torch_references(name: str) -> None:
    """The torch optimizer of mode mlp, against the rules of the toy."""
    chosen = resolve_spec(name, 0.01, {}, "raw")
    found = train(TWO, A, chosen, [0, 200], gives_up=False, computed_by="rules").snapshots[-1].nets
    model = ToyModule(TWO.hidden[..., 0], TWO.output[..., 0], trains=False)
    stepper = real.build(model, chosen)
    x, y = torch.tensor(A.points.augmented), torch.tensor(A.points.y)
    for _ in range(200):
        stepper.zero_grad()
        objective(model(x), y, A, scale_free=False).backward()
        stepper.step()
    assert model.hidden.detach().numpy() == pytest.approx(found.hidden[..., 0], abs=1e-12)


def test_another_rule_is_seen() -> None:
    """Controls: every pair of neighbours in the list differs by far more than the tolerance."""
    ends = []
    for name in ("gd", "adam", "muon", "muon_svd", "sumo", "galore", "galore_muon"):
        ends.append(train(TWO, A, optimizer(name), [0, 300], gives_up=False).snapshots[-1].nets.hidden)
    for i, one in enumerate(ends):
        for other in ends[i + 1 :]:
            assert np.abs(one - other).max() > 1e4 * TOLERANCE


@pytest.mark.parametrize("loss", ["exp", "logistic"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale_free", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_gradients_are_autograds(loss: str, reduction: str, scale_free: bool, trains: bool) -> None:
    problem = ToyProblem(pair(0.7, 1.9, dim=3), loss, reduction, trains)
    rng = np.random.default_rng(0)
    nets = Nets(rng.normal(size=(5, 4, 6)), rng.normal(size=(5, 6)))
    found = ascent(nets, problem, scale_free=scale_free)
    x, y = torch.tensor(problem.points.augmented), torch.tensor(problem.points.y)
    for run in range(nets.runs):
        model = ToyModule(nets.hidden[..., run], nets.output[..., run], trains=trains)
        objective(model(x), y, problem, scale_free=scale_free).backward()
        assert model.hidden.grad is not None
        assert -model.hidden.grad.numpy() == pytest.approx(found.hidden[..., run], rel=1e-12, abs=1e-14)
        if trains:
            assert found.output is not None
            assert model.output.grad is not None
            assert -model.output.grad.numpy() == pytest.approx(found.output[:, run], rel=1e-12, abs=1e-14)


def test_scale_free_gradients_do_not_underflow() -> None:
    far = net([2000.0, -2000.0])
    assert not ascent(far, A, scale_free=False).hidden.any()
    assert np.abs(ascent(far, A, scale_free=True).hidden).max() == pytest.approx(0.5)


def test_float32_sign_descent_on_raw_gradients_underflows_and_is_flagged() -> None:
    """e^-z is 0 in fp32 from z = 104 on, which sign descent with lr 0.01 reaches after 5199 steps."""
    start = net([2.0, -0.5])
    single = Nets(start.hidden.astype(np.float32), start.output.astype(np.float32))
    at = [0, 5000, 5100, 5300, 5400]
    flags = train(single, A, optimizer("sign", grad="raw"), at, gives_up=False).flags
    assert flags[0][0] in (5300, 5400)
    assert "underflow" in flags[0][1]
    assert train(single, A, optimizer("sign"), at, gives_up=False).flags == {}


@pytest.mark.parametrize("way", ["rules", "optimizers"])
def test_a_row_that_the_projection_leaves_out_is_not_rounding(way: str) -> None:
    """GaLore's first subspace of rank 1 has no part of the second neuron, whose gradient is not 0."""
    start = net([1.0, -3.0], [0.5, 0.0])
    stepped = train(start, A, optimizer("galore"), [0, 1, 2, 5, 13, 30, 60], gives_up=False, computed_by=way)
    moved = stepped.snapshots[-1].nets.hidden - start.hidden
    assert np.abs(moved[1]).max() < 1e-14
    assert np.abs(moved[0]).min() > 1e-3
    assert ascent(start, A, scale_free=True).hidden[1].all()
    assert stepped.flags == {}


@pytest.mark.parametrize("way", ["rules", "optimizers"])
def test_an_update_that_rounding_swallows_is_flagged_however_it_was_computed(way: str) -> None:
    start = net([2000.0, -2000.0], [-1985.0, -1985.0])
    single = Nets(start.hidden.astype(np.float32), start.output.astype(np.float32))
    at = [0, 2, 3]
    (flag,) = train(single, A, optimizer("gd"), at, gives_up=False, computed_by=way).flags.values()
    # A torch optimizer tells its update where the step before it moved nothing.
    assert flag == ({"rules": 0, "optimizers": 2}[way], "an update is below half a unit in the last place")
    assert train(start, A, optimizer("gd"), at, gives_up=False, computed_by=way).flags == {}


def test_a_trained_v_takes_steps_too() -> None:
    problem = ToyProblem(pair(1.0, 1.0), train_output=True)
    at = [0, 1, 10, 200]
    for name in ("gd", "ngd", "sign", "adam"):
        ways = [
            train(TWO, problem, optimizer(name), at, gives_up=False, computed_by=w)
            for w in ("rules", "optimizers")
        ]
        first, second = (way.snapshots[-1].nets for way in ways)
        assert first.output == pytest.approx(second.output, abs=1e-11)
        assert np.abs(first.output - TWO.output).max() > 0.005
    assert not has_fast_rule(optimizer("muon"), (2, 2), train_output=True)
    by_class = train(TWO, problem, optimizer("muon"), [0, 5], gives_up=False)
    assert by_class.computed_by == "optimizers"
    with pytest.raises(InputError, match="v is trained"):
        train(TWO, problem, optimizer("spectral"), [0, 5], gives_up=False)


def test_foreign_optimizers_by_import_path() -> None:
    stepped = train(TWO, A, resolve_spec("torch.optim.SGD", 0.01, {}, "auto"), [0, 50], gives_up=False)
    by_rule = train(TWO, A, optimizer("gd"), [0, 50], gives_up=False)
    assert stepped.computed_by == "optimizers"
    assert stepped.snapshots[-1].nets.hidden == pytest.approx(by_rule.snapshots[-1].nets.hidden, abs=1e-14)


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("sumoo", {}, "did you mean sumo"),
        ("gd", {"eps": 1.0}, "gd.eps"),
        ("adam", {"epss": 1.0}, "did you mean eps"),
        ("muon", {"momentum": "much"}, "muon.momentum"),
    ],
)
def test_bad_optimizers(name: str, options: dict[str, object], part: str) -> None:
    with pytest.raises(InputError, match=part):
        resolve_spec(name, 0.01, options, "auto")


def test_weight_decay_is_off_unless_asked_for() -> None:
    assert all(optimizer(name).weight_decay == 0.0 for name in ("adamw", "muon_moonlight", "sumo_official"))
    assert optimizer("adamw", weight_decay=0.1).weight_decay == 0.1
