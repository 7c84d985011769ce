"""Classes of updates, on rules whose class is known by their formula and on published ones."""

from __future__ import annotations

import pytest

from harness.verify.audit import ranks
from harness.verify.audit.cells import LATE_STEPS, STEPS
from harness.verify.audit.classify import Class, classify
from harness.verify.audit.given_model import GivenModel, given
from harness.verify.audit.targets import Target, TargetError, probe

RULES = "tests.harness.verify.audit.rules"


def measured(name: str) -> Class:
    data = given("even", steps=LATE_STEPS)
    target = probe(Target(name), lambda: GivenModel(data.start), lambda model: model(data.gradients[0]))
    return classify(target, data)


@pytest.mark.parametrize(
    ("rule", "name", "axes"),
    [
        ("Elementwise", "elementwise", (0, 1)),
        ("Rowwise", "rowwise", (0,)),
        ("Columnwise", "rowwise", (1,)),
        ("Matrix", "matrix", ()),
        ("Global", "global", (0, 1)),
        ("Ordered", "global", ()),
        ("Drawing", "nondeterministic", ()),
        ("Unrepeatable", "nondeterministic", ()),
        ("Late", "matrix", ()),
        ("Waiting", "elementwise", (0, 1)),
    ],
)
def test_a_rule_has_the_class_of_its_formula(rule: str, name: str, axes: tuple[int, ...]) -> None:
    result = measured(f"{RULES}.{rule}")
    assert result.name == name
    if name not in ("nondeterministic", "global"):
        assert result.axes == axes
    assert result.steps == (LATE_STEPS if rule in ("Late", "Waiting") else STEPS)
    assert result.draws == (rule == "Drawing")


def test_a_rule_that_moves_nothing_has_no_class() -> None:
    found = ranks.measure_class(Target(f"{RULES}.Nothing"))
    assert isinstance(found, TargetError)
    assert found.reason == f"moves no weight within {LATE_STEPS} steps, so that nothing can be judged"


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("torch.optim.AdamW", "elementwise"),
        ("pytorch_optimizer.Lion", "elementwise"),
        ("pytorch_optimizer.Adan", "elementwise"),
        ("pytorch_optimizer.Lamb", "matrix"),
        ("pytorch_optimizer.AdaFactor", "matrix"),
        ("pytorch_optimizer.CAME", "matrix"),
        ("pytorch_optimizer.SOAP", "matrix"),
        ("pytorch_optimizer.Muon", "matrix"),
        ("torch.optim.Muon", "matrix"),
        ("pytorch_optimizer.Shampoo", "matrix"),
        ("pytorch_optimizer.Prodigy", "global"),
        ("muon", "matrix"),
        ("adamw", "elementwise"),
    ],
)
def test_published_optimizers_have_the_class_of_their_papers(target: str, name: str) -> None:
    assert measured(target).name == name
