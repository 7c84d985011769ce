"""An optimizer whose rule is not known here is neither right nor wrong; what a group says of a known one is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.audit import Report, watch


def trained(build: Any, rule: str | None = None, steps: int = 3) -> Report:
    """Train a small network, with gradients of different sizes, under `watch`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    optimizer = build(model.parameters())
    generator = torch.Generator().manual_seed(1)
    with watch(model, optimizer, rule=rule, steps=steps, quiet=True) as report:
        for step in range(steps):
            x, y = (torch.randn(16, n, generator=generator) for n in (6, 4))
            ((1 + step) * (model(x) - y).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return report


QUICK, SLOW = ("RMSprop", "RAdam"), ("Adagrad", "NAdam", "Adafactor", "Adamax")


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_an_unknown_rule_is_a_note(name: str) -> None:
    report = trained(lambda parameters: getattr(torch.optim, name)(parameters, lr=1e-3))
    assert report.defects == [], str(report)
    assert report.is_right is None
    assert report.answer == f"{name}: undecided, because no rule is known for {name}; name one with rule="
    assert [f.name for f in report.findings] == ["no rule known"]


@pytest.mark.parametrize(
    ("build", "who"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, dampening=0.1), "SGD with dampening"),
        (lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.5), amsgrad=True), "AdamW with amsgrad"),
    ],
)
def test_a_setting_that_changes_the_rule_makes_it_unknown(build: Any, who: str) -> None:
    report = trained(build)
    assert report.is_right is None, str(report)
    assert f"no rule is known for {who}" in report.answer


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, maximize=True),
        lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1, maximize=True),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1, maximize=True),
    ],
)
def test_maximize_is_read_from_the_group(build: Any) -> None:
    report = trained(build)
    assert report.findings == [], str(report)
    assert report.is_right is True


class MyAdam(torch.optim.AdamW):
    """AdamW under a name that says nothing."""


class Reversed(torch.optim.AdamW):
    """AdamW in the wrong direction, under a name that says nothing."""

    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                gradient: Tensor = p.grad
                gradient.neg_()
        return super().step(closure)


def test_a_rule_that_the_user_names_decides() -> None:
    build: Any = lambda parameters: MyAdam(parameters, lr=1e-3)  # noqa: E731
    assert trained(build).is_right is None
    assert trained(build, rule="adamw").is_right is True
    wrong: Any = lambda parameters: Reversed(parameters, lr=1e-3)  # noqa: E731
    report = trained(wrong, rule="adamw")
    assert report.is_right is False
    assert [f.name for f in report.defects] == ["another learning rate"], str(report)
    # The hooks of the parent's `step` are no update of their own.
    assert len(set(report.optimizers[0].norms)) == 3
