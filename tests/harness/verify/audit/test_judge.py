"""The reference, its noise floor, and what a verdict says about a trajectory."""

from __future__ import annotations

import copy

import pytest
import torch

from harness.verify.audit import judge as judging
from harness.verify.audit import oracle
from harness.verify.audit.cells import STEPS, EngineCell
from harness.verify.audit.classify import Class
from harness.verify.audit.document import CellReport
from harness.verify.audit.given_model import given
from harness.verify.audit.judge import Trajectory, judge
from harness.verify.audit.targets import Target

RULES = "tests.harness.verify.audit.rules"
ADAMW = Target("torch.optim.AdamW", {"weight_decay": 0.0})
DATA = given("even")
ELEMENTWISE = Class("elementwise", "")


def trajectory(target: Target = ADAMW) -> Trajectory:
    """What one fp32 process computes: it differs from the reference by rounding alone."""
    made = oracle.train(target, DATA.start, DATA.gradients, torch.float32)
    return Trajectory([dict(row) for row in DATA.gradients], made)


def judged(run: Trajectory, cell: EngineCell | None = None, target: Target = ADAMW) -> CellReport:
    return judge(cell or EngineCell("zero1"), target, DATA, run, ELEMENTWISE)


def test_the_reference_of_adam_is_its_formula_in_fp64() -> None:
    reference = oracle.reference(ADAMW, DATA.start, DATA.gradients)
    assert reference.dtype == torch.float64
    name = "block.up.weight"
    weight, first, second = DATA.start[name].double(), 0.0, 0.0
    for step, row in enumerate(DATA.gradients, 1):
        gradient = row[name].double()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        weight = weight - 1e-3 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        assert torch.allclose(reference.steps[step - 1][name], weight, rtol=1e-13, atol=1e-15)


def test_the_noise_floor_is_rounding_and_no_more() -> None:
    floors = oracle.reference(ADAMW, DATA.start, DATA.gradients).floors[-1]
    # A weight of 0.05 is rounded by 2e-9, its change is 6e-3.
    assert all(1e-8 < floor < 2e-5 for floor in floors.values())
    low = oracle.reference(Target("torch.optim.Muon", form="matrices"), DATA.start, DATA.gradients)
    # Its products are rounded to bf16.
    assert all(1e-3 < floor < 0.1 for floor in low.floors[-1].values())


def test_rules_that_cannot_run_in_fp64_or_draw_are_replayed_in_fp32() -> None:
    drawing = oracle.reference(Target(f"{RULES}.Drawing"), DATA.start, DATA.gradients)
    assert drawing.dtype == torch.float32
    assert "random numbers" in drawing.note
    low = oracle.reference(ADAMW, DATA.start, DATA.gradients, torch.bfloat16)
    assert low.dtype == torch.bfloat16


def test_rounding_is_safe() -> None:
    report = judged(trajectory())
    assert (report.verdict, report.first_step, report.parameter, report.reason) == ("safe", None, None, "")
    assert report.replay_error is not None
    assert report.noise_floor is not None
    assert 0 < report.replay_error <= report.noise_floor


@pytest.mark.parametrize("step", [1, 3, STEPS])
def test_the_first_step_and_the_parameter_that_differ_are_named(step: int) -> None:
    run = copy.deepcopy(trajectory())
    for weights in run.made[step - 1 :]:
        weight = weights["block.down.weight"]
        # One element in a thousand of the update is off by as much as it is.
        weight.view(-1)[5] += 1e-3
    report = judged(run)
    assert (report.verdict, report.first_step, report.parameter) == ("wrong", step, "block.down.weight")
    assert "does not explain" in report.reason


def test_a_learning_rate_that_is_off_by_a_thousandth_is_wrong() -> None:
    other = Target("torch.optim.AdamW", {"lr": 1.001e-3, "weight_decay": 0.0})
    assert judged(trajectory(other)).verdict == "wrong"


def test_gradients_that_are_not_the_mean_are_wrong_whatever_the_optimizer_makes_of_them() -> None:
    run = copy.deepcopy(trajectory())
    for row in run.received:
        for gradient in row.values():
            gradient.mul_(0.5)
    # AdamW does not see the scale, so the weights are right.
    report = judged(run)
    assert (report.verdict, report.first_step) == ("wrong", 1)
    assert "does not get the mean gradient" in report.reason
    assert "does not get the clipped mean" in judged(trajectory(), EngineCell("ddp", is_clipped=True)).reason
    missing = Trajectory(
        [{k: v for k, v in row.items() if k != "head.bias"} for row in run.received], run.made
    )
    assert judged(missing).verdict == "wrong"


def test_unequal_replicas_are_wrong() -> None:
    run = trajectory()
    report = judged(Trajectory(run.received, run.made, replicas_equal=False), EngineCell("ddp"))
    assert report.verdict == "wrong"
    assert "copies" in report.reason


@pytest.mark.parametrize("target", [Target("torch.optim.SGD", {"lr": 1e-9}), Target(f"{RULES}.Nothing")])
def test_what_cannot_be_seen_is_not_safe(target: Target) -> None:
    report = judged(trajectory(target), target=target)
    assert report.verdict == "refused"
    assert report.reason.startswith("not judged, because nothing is shown")


COARSE = given("even", is_coarse=True)
DDP_BF16 = EngineCell("ddp", variant="bf16", dtype="bf16_pure")


def in_bf16(target: Target, other: Target | None = None) -> CellReport:
    """Judge bf16 weights that ``other``, or else the target itself, trained."""
    made = oracle.train(other or target, COARSE.start, COARSE.gradients, torch.bfloat16)
    run = Trajectory([dict(row) for row in COARSE.gradients], made)
    return judge(DDP_BF16, target, COARSE, run, ELEMENTWISE)


def test_equal_bits_are_safe_where_an_ulp_of_the_gradients_changes_some() -> None:
    """Updates of 1e-4 are below half an ulp of most bf16 weights, so that every bound is above a whole update."""
    report = in_bf16(Target("torch.optim.AdamW", {"lr": 1e-4}))
    assert (report.verdict, report.replay_error) == ("safe", 0.0), report.reason
    expected = oracle.reference(
        Target("torch.optim.AdamW", {"lr": 1e-4}), COARSE.start, COARSE.gradients, torch.bfloat16
    )
    assert min(min(bounds.values()) for bounds in expected.bounds) > judging.SEES_NOTHING


def test_below_rounding_other_bits_are_not_safe() -> None:
    report = in_bf16(Target("torch.optim.AdamW", {"lr": 1e-4}), Target("torch.optim.AdamW", {"lr": 1.1e-4}))
    assert report.verdict == "refused"
    assert report.replay_error
    assert "rounding alone may move" in report.reason


def test_equal_bits_show_nothing_where_an_ulp_of_the_gradients_changes_none() -> None:
    """A sign of momentum does not see rounding, so that its bits would also be equal after an error."""
    assert in_bf16(Target(f"{RULES}.Sign", {"lr": 1e-4})).verdict == "refused"


def test_parameters_that_are_not_judged_are_named() -> None:
    """Twins differ by more than an update in one parameter; another one never moves."""
    expected = oracle.reference(ADAMW, DATA.start, DATA.gradients)
    noisy, still = "block.up.weight", "block.norm.weight"
    for bounds in expected.bounds:
        bounds.update({noisy: 6.9, still: 0.0})
    for weights in expected.steps:
        weights[still] = DATA.start[still].double()
    run = trajectory()
    made = [{**weights, still: DATA.start[still].clone()} for weights in run.made]
    judging.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "reference", lambda *_: expected)
        report = judged(Trajectory(run.received, made))
        made[-1][still] += 1e-3
        moved = judged(Trajectory(run.received, made))
    judging.forget()
    assert report.verdict == "safe"
    assert report.reason == (
        f"except what is not judged: rounding alone may move {noisy} by 7 of an update or more; "
        f"the optimizer does not move {still}"
    )
    assert (moved.verdict, moved.parameter) == ("wrong", still)


def test_a_reference_is_computed_once_for_equal_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Target] = []
    reference = oracle.reference

    def counted(target: Target, *args: object) -> oracle.Reference:
        calls.append(target)
        return reference(target, *args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(judging, "reference", counted)
    judging.forget()
    judged(trajectory())
    judged(trajectory(), EngineCell("ddp"))
    assert len(calls) == 1
    judging.forget()
