"""Each check passes a correct optimizer and fails one with the defect that it looks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import optimizers
from harness.verify.audit import checks
from harness.verify.audit.document import Check
from harness.verify.audit.subject import Named, NotRunnable, Subject
from harness.verify.audit.targets import Target
from tests.harness.verify.audit import defective

DEFECTS: list[tuple[str, type[defective.Momentum], str]] = [
    ("repeatable", defective.Draws, "differ"),
    ("state bytes", defective.Grows, "history grew"),
    ("state bytes", defective.Overclaims, "state_bytes() says"),
    ("resume", defective.Forgets, "self.moments"),
    ("resume weights only", defective.Pickles, "weights_only"),
    ("lr schedule", defective.CopiesRate, "keep no copy"),
    ("lr schedule", defective.ReadsLastGroup, "of another group"),
    ("tensor lr", defective.NeedsFloat, "lr must be a float"),
    ("tensor lr", defective.WritesRate, "writes into"),
    ("weight decay", defective.IgnoresDecay, "ignored"),
    ("weight decay", defective.Inflates, "wrong sign"),
    ("weight decay", defective.CoupledUnderFlag, "weight_decouple=True"),
    ("frozen parameter", defective.DecaysFrozen, "no gradient and moves"),
    ("late unfrozen", defective.SkipsLate, "does not move"),
    ("added group", defective.SkipsLate, "does not move"),
    ("zero gradients", defective.DividesByZero, "not finite"),
    ("nonfinite gradients", defective.SpreadsNan, "reaches"),
    ("sparse gradients", defective.DropsSparse, "ignored"),
    ("no gradients", defective.CountsAlways, "the step counts"),
    ("keeps gradients", defective.OverwritesGradient, "overwrites"),
    ("closure", defective.LosesLoss, "returns None"),
    ("closure", defective.NoGradClosure, "without gradients"),
    ("silence", defective.Prints, "prints"),
    ("vectors and scalars", defective.NeedsRows, "scalar ()"),
    ("higher ranks", defective.Unpacks, "experts (3, 4, 6)"),
    ("empty parameters", defective.BreaksOnEmpty, "no_rows (0, 6)"),
    ("transposed parameters", defective.ReadsMemoryOrder, "contiguous"),
    ("tied weights", defective.SilentTwice, "without a warning"),
    ("parameter order", defective.DependsOnPlace, "order of parameters"),
    ("bf16 parameters", defective.Vanishes, "master weights"),
    ("foreach", defective.ForeachDiffers, "foreach=True"),
    ("fused", defective.FusedDiffers, "fused=True"),
    ("host syncs", defective.ReadsHost, "12 per step"),
    ("torch.compile", defective.DiffersCompiled, "eager"),
]

FACTS = {"keeps gradients", "bf16 parameters", "host syncs"}
"""Checks that tell a fact, and never that something is wrong: no contract of torch forbids it."""


def build_of(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[Named], Any]:
    """Return the function that checks call."""
    return lambda named: kind([p for _, p in named], **options)


def test_every_check_has_a_defect() -> None:
    assert {name for name, *_ in DEFECTS} == set(checks.CHECKS)


@pytest.mark.parametrize(
    ("name", "kind", "words"), DEFECTS, ids=lambda value: getattr(value, "__name__", value)
)
def test_defect_is_found(name: str, kind: type[defective.Momentum], words: str) -> None:
    (found,) = checks.checks_of(build_of(kind), [name])
    assert found.name == name
    assert found.passed is (None if name in FACTS else False), found.detail
    assert words in found.detail


def failed(found: list[Check]) -> list[str]:
    """Return the failed checks, with their details."""
    return [f"{check.name}: {check.detail}" for check in found if check.passed is False]


def test_correct_optimizer_fails_nothing() -> None:
    found = checks.checks_of(build_of(defective.Momentum))
    assert not failed(found)
    assert {check.name for check in found if check.passed is None} == {
        # It has no such options, refuses sparse gradients, and lets a NaN into the state of its own parameter.
        "foreach",
        "fused",
        "sparse gradients",
        "nonfinite gradients",
    }


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.Muon])
def test_torch_fails_nothing(kind: type[torch.optim.Optimizer]) -> None:
    names = [name for name in checks.CHECKS if name != "torch.compile"]
    found = checks.checks_of(build_of(kind, lr=3e-3), names)
    assert not failed(found)


@pytest.mark.parametrize(
    "preset",
    ["sumo", *(pytest.param(name, marks=pytest.mark.slow) for name in optimizers.names() if name != "sumo")],
)
def test_presets_fail_nothing(preset: str) -> None:
    names = [name for name in checks.CHECKS if name != "torch.compile"]
    found = checks.checks_of(lambda named: optimizers.build(preset, named, lr=2e-3), names)
    assert not failed(found)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (torch.optim.AdamW, {}, "decoupled: lr · weight_decay of the weights per step"),
        (torch.optim.Adam, {}, "coupled: as decay · W in the gradient"),
        (torch.optim.SGD, {"momentum": 0.7}, "coupled: as decay · W in the gradient"),
        # Less than weights resolve, at the usual decay.
        (torch.optim.AdamW, {"lr": 1e-7}, "decoupled: lr · weight_decay of the weights per step"),
        # Without momentum, both kinds are one rule.
        (torch.optim.SGD, {}, "decoupled: lr · weight_decay of the weights per step"),
    ],
)
def test_weight_decay_is_classified(kind: Any, options: dict[str, Any], words: str) -> None:
    (found,) = checks.checks_of(build_of(kind, **{"lr": 1e-3, **options}), ["weight decay"])
    assert (found.passed, found.detail) == (True, words)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (defective.DecaysAfter, "decoupled: lr · weight_decay of the weights per step"),
        (defective.DecaysWithoutRate, "which does not follow the schedule of the rate"),
        (defective.TrustRatio, "in the rule's own way: neither decoupled, nor decay · W in the gradient"),
    ],
)
def test_weight_decay_of_other_forms(kind: type[defective.Momentum], words: str) -> None:
    (found,) = checks.checks_of(build_of(kind), ["weight decay"])
    assert found.passed is not False
    assert found.detail.endswith(words)


def test_state_is_measured_per_element() -> None:
    """Adam's two moments and a counter per parameter, by arithmetic."""
    (found,) = checks.checks_of(build_of(torch.optim.Adam), ["state bytes"])
    elements = 24 * 8 + 8 * 8 + 16 * 8 + 8 * 16 + 8 + 12
    counters = 6 * 4 / elements
    assert found.detail == (
        f"{8 + counters:.2f} bytes per parameter element (exp_avg 4.00, exp_avg_sq 4.00, step {counters:.2f})"
    )


def test_time_limit_is_no_failure() -> None:
    class Sleeps(defective.Momentum):
        def update(self, p: Any, gradient: Any, group: Any) -> None:
            if group["weight_decay"]:
                while True:
                    pass
            super().update(p, gradient, group)

    (found,) = checks.checks_of(build_of(Sleeps), ["weight decay"], limit_s=0.2)
    assert (found.passed, found.detail) == (None, "did not end within 0.2 s")


def test_a_slow_first_step_is_one_plain_sentence() -> None:
    target = Target("tests.harness.verify.audit.defective.Endless")
    expected = Check("first step", None, "the first step did not end within 0.2 s")
    assert checks.first_step(target, limit_s=0.2) == expected
    assert checks.checks_of(build_of(defective.Endless), limit_s=0.2) == [expected]


def test_checks_run_one_by_one_on_one_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target("torch.optim.AdamW")
    assert checks.first_step(target) == list(checks.CHECKS)
    monkeypatch.setattr(checks, "Subject", None)
    assert checks.run_check(target, "zero gradients").passed is True


def test_unexpected_exception_fails_the_check() -> None:
    class Breaks(defective.Momentum):
        def state_dict(self) -> Any:
            raise OverflowError("no state today")

    (found,) = checks.checks_of(build_of(Breaks), ["resume"])
    assert (found.passed, found.detail) == (False, "OverflowError: no state today")


def test_optimizer_that_cannot_step_is_no_finding() -> None:
    class Refuses(defective.Momentum):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("needs a second loss")

    (found,) = checks.checks_of(build_of(Refuses))
    assert (found.name, found.passed) == ("first step", None)
    assert "needs a second loss" in found.detail
    with pytest.raises(NotRunnable, match="needs a second loss"):
        Subject(build_of(Refuses))


def test_target_is_built_from_its_form() -> None:
    target = Target("pytorch_optimizer.Muon", {"lr": 0.01}, form="groups")
    found = checks.run_check(target, "state bytes")
    assert found.passed is True


def test_target_that_takes_the_model() -> None:
    target = Target("tests.harness.verify.audit.defective.of_model", form="model")
    found = checks.run_check(target, "parameter order")
    assert found.passed is True, found.detail


@pytest.mark.parametrize(("lag", "words"), [(1, "one step late"), (0, "0.1 as far")])
def test_late_rate_is_told(lag: int, words: str) -> None:
    class Lags(defective.Momentum):
        def update(self, p: Any, gradient: Any, group: Any) -> None:
            rates = self.state[p].setdefault("rates", [])
            rates.append(group["lr"])
            moment = self.state[p].setdefault("moment", torch.zeros_like(p)).add_(gradient)
            p.sub_(rates[-1 - lag if len(rates) > lag else -1] * self.direction(moment))

    (found,) = checks.checks_of(build_of(Lags), ["lr schedule"])
    assert found.passed is True
    assert found.detail.endswith(words)


def test_late_starter_is_watched_longer() -> None:
    """Nothing moves in the first 5 steps, and the history of gradients is as long as it gets."""

    class Waits(defective.Momentum):
        def update(self, p: Any, gradient: Any, group: Any) -> None:
            self.state[p].setdefault("moment", torch.zeros_like(p))
            history = self.state[p].setdefault("history", [])
            history.append(gradient.clone())
            if len(history) > 5:
                super().update(p, history.pop(0), group)

    found = checks.checks_of(build_of(Waits))
    assert not failed(found)
    assert Subject(build_of(Waits)).steps == 3 + 5


def test_drawn_numbers_are_no_dependence_on_order() -> None:
    class Noisy(defective.Momentum):
        def direction(self, moment: Any) -> Any:
            return super().direction(moment) * (1 + 0.1 * torch.rand_like(moment))

    (found,) = checks.checks_of(build_of(Noisy), ["parameter order"])
    assert (found.passed, found.detail) == (None, "it draws random numbers, in the order of parameters")
    assert not Subject(build_of(defective.Momentum)).draws


def test_parameters_that_a_rule_leaves_alone_are_not_stuck() -> None:
    class TrainsEmbedding(defective.Momentum):
        def update(self, p: Any, gradient: Any, group: Any) -> None:
            if p.shape[:1] == (24,):
                super().update(p, gradient, group)

    found = checks.checks_of(build_of(TrainsEmbedding), ["vectors and scalars", "higher ranks"])
    assert not failed(found)


def test_rounding_that_iterations_amplify_is_no_finding() -> None:
    """One ulp in the gradient becomes 1e-4 of the update here, whatever the order of the parameters."""

    class Amplifies(defective.DependsOnPlace):
        def update(self, p: Any, gradient: Any, group: Any) -> None:
            place = next(i for i, other in enumerate(group["params"]) if other is p)
            rough = (gradient * 1e9).sin() * 1e-4 * (1 + 1e-3 * place)
            defective.Momentum.update(self, p, gradient * (1 + rough), group)

    (found,) = checks.checks_of(build_of(Amplifies), ["parameter order"])
    assert found.passed is True, found.detail
    assert Subject(build_of(Amplifies)).rounding > 1e-5 == Subject(build_of(defective.Momentum)).rounding


def test_matrices_alone_are_tried() -> None:
    assert all(len(shape) == 2 for shape in Subject(build_of(torch.optim.Muon)).shapes.values())
