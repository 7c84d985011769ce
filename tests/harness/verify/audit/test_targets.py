"""Targets: every form that can be typed, every way in which one cannot be audited."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from harness.errors import InputError
from harness.verify.audit import targets
from harness.verify.audit.document import CellReport, Check, TargetReport, is_good
from harness.verify.audit.targets import Target, TargetError


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(0.1 * torch.randn(6, 4))
        self.bias = nn.Parameter(0.1 * torch.randn(5))

    def forward(self) -> Tensor:
        return self.weight.square().sum() + self.bias.square().sum()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module of the user's, ``mine``, in the working folder."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            import torch

            def make(params, lr=0.1):
                return torch.optim.SGD(params, lr=lr)

            def make_of_model(model):
                return torch.optim.SGD(model.parameters(), lr=0.1)

            def make_of_names(named_parameters):
                return torch.optim.SGD([p for name, p in named_parameters if "weight" in name], lr=0.1)

            def make_nothing(params):
                return 3

            class Grouped(torch.optim.SGD):
                def __init__(self, params, lr=0.1):
                    groups = list(params)
                    for group in groups:
                        if "use_muon" not in group:
                            raise KeyError("use_muon")
                    super().__init__(groups, lr=lr)

            class Needy(torch.optim.SGD):
                def __init__(self, params, total_steps, rank):
                    super().__init__(params, lr=0.1)

            class Curved(torch.optim.SGD):
                def step(self, closure=None):
                    for group in self.param_groups:
                        for p in group["params"]:
                            torch.autograd.grad(p.grad.sum(), p)

            number = 3
            """
        )
    )
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "leaves.py").write_text("raise SystemExit(4)")
    (tmp_path / "lacks.py").write_text("import no_such_package_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("mine", "broken", "leaves", "lacks"):
        sys.modules.pop(name, None)


def probed(word: str, kwargs: str | None = None) -> Target:
    (target,) = targets.parse([word], kwargs)
    return targets.probe(target, _Model, lambda model: model())


def test_arguments_are_typed_behind_the_target_or_for_all_of_them() -> None:
    first, second = targets.parse(
        ["torch.optim.AdamW(lr=0.5, betas=(0.8, 0.9))", "mine:make"], "{'lr': 0.1, 'eps': 1e-6}"
    )
    assert first == Target("torch.optim.AdamW", {"lr": 0.5, "eps": 1e-6, "betas": (0.8, 0.9)})
    assert second == Target("mine.make", {"lr": 0.1, "eps": 1e-6})
    assert second.label == "mine.make(lr=0.1, eps=1e-06)"


@pytest.mark.parametrize(
    ("words", "kwargs", "message"),
    [
        ([], None, "no target is nothing to audit"),
        (["not a target"], None, "is not a target"),
        (["torch.optim.AdamW(lr=open('x'))"], None, "cannot be read"),
        (["torch.optim.AdamW"], "3", "cannot be read"),
        (["torch.optim.AdamW"], "{'a b': 1}", "names no arguments"),
        (["AdamW"], None, "did you mean adamw\\?"),
    ],
)
def test_what_cannot_be_read_is_refused(words: list[str], kwargs: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        targets.parse(words, kwargs)


@pytest.mark.parametrize(
    ("word", "form"),
    [
        ("torch.optim.AdamW", "list"),
        ("torch.optim.Muon", "matrices"),
        ("mine.make(lr=0.2)", "list"),
        ("mine.make_of_model", "model"),
        ("mine.make_of_names", "named"),
        ("mine.Grouped", "groups"),
        ("pytorch_optimizer.Muon", "groups"),
        ("pytorch_optimizer.AdamMini", "model"),
        ("adamw", "list"),
    ],
)
def test_the_form_in_which_parameters_are_passed_is_found(own: Path, word: str, form: str) -> None:
    target = probed(word)
    assert target.form == form
    model = _Model()
    for parameter in model.parameters():
        parameter.requires_grad_(not target.freezes(parameter))
    optimizer = target.build(list(model.named_parameters()), model)
    assert isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("mine.number", "is not a torch.optim.Optimizer but an object of int"),
        ("torch.nn.Linear", "is not a torch.optim.Optimizer but the class Linear"),
        ("mine.make_nothing", "makes no torch.optim.Optimizer but an object of int"),
        ("mine.missing", "mine has no missing"),
        ("not_there.At.all", "there is no module not_there"),
        ("broken.Thing", "crashes on import .ZeroDivisionError"),
        ("leaves.Thing", "crashes on import .SystemExit: 4"),
        ("lacks.Thing", "it needs the module no_such_package_at_all"),
        ("mine.Needy", "needs the arguments total_steps, rank"),
        ("mine.Needy(rank=3)", "needs the arguments total_steps;"),
        ("mine.make(rate=3)", "has no argument rate; it has lr"),
        ("mine.Curved", "needs gradients that have a graph"),
        ("torch.optim.LBFGS", "needs a closure"),
        ("torch.optim.SparseAdam", "needs sparse gradients"),
        ("torch.optim.AdamW(lr=-1)", "cannot be constructed"),
        ("pytorch_optimizer.Lookahead", "wraps another optimizer"),
    ],
)
def test_what_cannot_be_audited_is_named(own: Path, word: str, message: str) -> None:
    with pytest.raises(TargetError) as caught:
        probed(word)
    assert re.search(message, str(caught.value.as_input_error(word)))


def test_the_optimizers_of_a_package_are_listed() -> None:
    torch_names = targets.members("torch.optim")
    assert {"torch.optim.AdamW", "torch.optim.Muon"} <= set(torch_names)
    assert "torch.optim.Optimizer" not in torch_names
    assert len(targets.members("pytorch_optimizer")) > 100
    with pytest.raises(TargetError, match="has no torch"):
        targets.members("json")
    with pytest.raises(TargetError, match="cannot be imported"):
        targets.members("no_such_package_at_all")


def test_the_document_holds_the_contracted_keys_and_no_number_that_json_lacks() -> None:
    cell = CellReport("zero3", 2, "wrong", float("inf"), 1, "q.weight", "flat")
    report = TargetReport("a.B", "matrix", cells=(cell,), checks=(Check("resume", True, "equal"),))
    entry = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert {"target", "class", "cells", "checks"} <= set(entry)
    keys = {"engine", "world_size", "verdict", "replay_error", "first_step", "parameter", "reason"}
    assert keys <= set(entry["cells"][0])
    assert entry["cells"][0]["replay_error"] is None
    assert entry["checks"] == [{"name": "resume", "passed": True, "detail": "equal"}]


def test_a_control_passes_by_being_detected() -> None:
    safe, wrong = CellReport("ddp", 2, "safe"), CellReport("ddp", 2, "wrong")
    assert is_good(safe)
    assert not is_good(wrong)
    assert is_good(CellReport("ddp", 2, "wrong", control="a defect"))
    assert not is_good(CellReport("ddp", 2, "safe", control="a defect"))
    assert not is_good(CellReport("ddp", 2, "crashes", control="a defect"))
    assert not TargetReport("a.B", checks=(Check("resume", False),)).passed
    assert not TargetReport("a.B", error="crashes on import").passed
    assert TargetReport("a.B", cells=(safe,), checks=(Check("host reads", None),)).passed
