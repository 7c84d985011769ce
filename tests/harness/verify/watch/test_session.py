"""`watch` changes no bit of the training, goes away after its updates, and refuses what it cannot watch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad

from harness.audit import watch
from harness.errors import InputError
from tests.harness.verify.watch.defective import Muon
from tests.harness.verify.watch.loops import batches, loss_of, names, net, split, train, watched, weights


def muon(model: nn.Module, **options: Any) -> list[Any]:
    hidden, rest = split(model)
    return [torch.optim.Muon(hidden, lr=0.02, **options), torch.optim.AdamW(rest, lr=2e-3)]


def test_the_weights_are_the_same_bits_with_and_without() -> None:
    states, found = [], []
    for watching in (False, True):
        model = net()
        torch.manual_seed(7)
        found.append(weights(model, muon(model), watching, max_norm=0.5, accumulation=2))
        states.append(torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert torch.equal(*states)


def test_every_hook_is_gone_after_the_recorded_updates() -> None:
    model = net()
    optimizers = muon(model)
    clip = clip_grad._clip_grads_with_norm_
    with watch(model, optimizers, steps=2, quiet=True) as report:
        assert clip_grad._clip_grads_with_norm_ is not clip
        train(model, optimizers, batches(2), max_norm=0.5)
        assert report.is_finished
        assert report.is_right is True
        assert clip_grad._clip_grads_with_norm_ is clip
        assert not any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in optimizers)
        assert not any(p._backward_hooks for p in model.parameters())
        train(model, optimizers, batches(2), max_norm=0.5)
    assert report.steps == 2


def test_an_exception_in_the_block_propagates_and_leaves_nothing() -> None:
    model = net()
    optimizers = muon(model)
    clip = clip_grad._clip_grads_with_norm_

    def broken() -> None:
        with watch(model, optimizers, quiet=True):
            train(model, optimizers, batches(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert clip_grad._clip_grads_with_norm_ is clip
    assert not any(o._optimizer_step_pre_hooks for o in optimizers)
    assert names(watched(model, optimizers)) == []


def test_a_block_that_ends_early_reports_what_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    model = net()
    optimizers = muon(model)
    with watch(model, optimizers) as report:
        train(model, optimizers, batches(1))
    assert report.steps == 1
    assert "is right: yes" in capsys.readouterr().out
    with watch(model, optimizers, quiet=True) as nothing:
        pass
    assert nothing.is_right is None
    assert "undecided" in nothing.answer


def test_a_watch_in_the_middle_of_training_reads_the_state() -> None:
    model = net()
    optimizers = muon(model)
    train(model, optimizers, batches(3))
    report = watched(model, optimizers, data=batches(3, seed=5))
    assert names(report) == [], str(report)
    assert {p.explanation.momentum.mu for p in report.parameters if p.explanation.momentum} == {0.95}


def test_a_schedule_with_warm_up_from_zero() -> None:
    model = net()
    optimizers = muon(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizers[0], lambda step: step / 3)
    report = watched(model, optimizers, loop={"scheduler": scheduler})
    assert names(report) == [], str(report)
    up = next(p for p in report.parameters if p.name == "up.weight")
    assert len(up.explanation.fits[0].scales) == 2
    assert [s.number("lr") for s in up.record.settings] == pytest.approx([0, 0.02 / 3, 0.04 / 3])


def test_only_learning_rate_zero_decides_nothing() -> None:
    model = net()
    optimizers = muon(model)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 0.0
    assert watched(model, optimizers).is_right is None


def test_a_memory_bound_samples_every_shape() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(6)), nn.Linear(16, 8, bias=False))
    optimizer = torch.optim.Muon(model.parameters(), lr=0.02)
    one = 16 * 16 * 4 * 7
    with watch(model, optimizer, max_bytes=4 * one, quiet=True) as report:
        for _ in range(3):
            model(torch.randn(64, 16)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    kept = {p.name for p in report.parameters}
    assert {"0.weight", "6.weight"} <= kept
    assert len(kept) == 4
    assert len(report.left_out) == 3
    assert "not recorded" in str(report)


def test_frozen_parameters_and_missing_gradients_are_no_defect() -> None:
    model = net()
    model.up.weight.requires_grad_(False)
    hidden, rest = split(model)
    optimizers = [
        torch.optim.Muon([p for p in hidden if p.requires_grad], lr=0.02),
        torch.optim.AdamW([*rest, model.up.weight], lr=1e-3),
    ]
    report = watched(model, optimizers)
    assert names(report) == []
    rules = {p.name: p.explanation.rule for p in report.parameters}
    assert rules["up.weight"] == "no gradient"


def test_the_report_is_json_and_a_page(tmp_path: Path) -> None:
    model = net()
    hidden, rest = split(model)
    groups = [{"params": hidden, "use_muon": True}, {"params": rest, "use_muon": False, "lr": 2e-3}]
    report = watched(model, Muon(groups, "padding rows change the scale"))
    document = json.loads(report.json())
    assert document["schema_version"] == 1
    assert document["right"] is False
    assert document["findings"][0]["name"] == "padding rows change the scale"
    assert document["findings"][0]["meaning"]
    up = next(p for p in document["parameters"] if p["name"] == "up.weight")
    assert up["rule"] == "orthogonalized"
    assert up["momentum"] == 0.95
    page = report.html(tmp_path / "report.html").read_text()
    assert "padding rows change the scale" in page
    assert "<script" not in page


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"steps": 0}, "steps"),
        ({"rule": "muoon"}, "rule"),
        ({"fused": "maybe"}, "fused"),
        ({"optimizer": None}, "watch"),
        ({"optimizer": object()}, "watch"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(2))])}, "watch"),
        ({"model": object()}, "watch"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], key: str) -> None:
    model = net()
    given = {"model": model, "optimizer": muon(model), **arguments}
    with pytest.raises(InputError, match=key), watch(**given):
        pass
    with watch(model, muon(model), quiet=True):
        pass


def test_two_watches_at_once_are_refused() -> None:
    model = net()
    with watch(model, muon(model), quiet=True):
        with pytest.raises(InputError, match="one watch at a time"), watch(model, muon(model)):
            pass


def test_a_comparison_that_fails_does_not_stop_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr("harness.verify.watch.session.judge", broken)
    model = net()
    with pytest.warns(UserWarning, match="broken on purpose"):
        report = watched(model, muon(model))
    assert report.is_right is None
    assert "broken on purpose" in report.answer


def test_closures_are_recorded_with_the_gradients_that_they_compute() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with watch(model, optimizer, quiet=True) as report:
        for ids in batches(3):

            def closure(ids: torch.Tensor = ids) -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, ids)
                loss.backward()
                return loss

            optimizer.step(closure)
    assert names(report) == [], str(report)
    assert report.is_right is True


def clip_each(model: nn.Module, bound: float) -> None:
    for part in model.children():
        torch.nn.utils.clip_grad_norm_(part.parameters(), bound)


def test_clipping_by_module_bounds_no_common_norm() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with watch(model, optimizer, quiet=True) as report:
        for ids in batches(3):
            loss_of(model, ids).backward()
            clip_each(model, 0.01)
            optimizer.step()
            optimizer.zero_grad()
    assert report.optimizers[0].norms[0] > 0.015
    assert names(report) == [], str(report)
    assert report.optimizers[0].max_norm is None


@pytest.mark.parametrize("then_by_module", [False, True])
def test_the_clipping_that_counts_is_the_one_over_all_gradients(then_by_module: bool) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with watch(model, optimizer, quiet=True) as report:
        for ids in batches(3):
            loss_of(model, ids).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            if then_by_module:
                clip_each(model, 1e9)
            else:
                # The clipping comes undone, which is the defect itself.
                for p in model.parameters():
                    assert p.grad is not None
                    p.grad *= 10
            optimizer.step()
            optimizer.zero_grad()
    assert report.optimizers[0].max_norm == 0.05
    assert names(report) == ([] if then_by_module else ["clipping forgotten"])


def test_an_infinite_bound_measures_the_norm_and_the_json_stays_one() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    report = watched(model, optimizer, loop={"max_norm": float("inf")})

    def refused(word: str) -> None:
        raise AssertionError(word)

    document = json.loads(report.json(), parse_constant=refused)
    assert report.is_right is True
    assert document["optimizers"][0]["max_norm"] is None
    raw, received = (document["optimizers"][0][key] for key in ("raw_norms", "received_norms"))
    assert raw == pytest.approx(received)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_a_gradient_of_zero_is_no_defect(decay: float) -> None:
    class Branch(nn.Module):
        """The second branch has no tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.unused = net(), nn.Linear(12, 7)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.net(ids) + 0.0 * self.unused(ids.new_ones(12).float()).sum()

    model = Branch()
    report = watched(model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=decay))
    assert names(report) == [], str(report)
    assert report.is_right is True
    rules = {p.name: p.explanation.rule for p in report.parameters}
    assert rules["unused.weight"] == rules["unused.bias"] == "no gradient"
    assert f"{len(rules) - 2} of {len(rules)} parameters" in report.answer


def test_a_sparse_gradient_leaves_only_its_parameter_undecided() -> None:
    model = net()
    model.embed.sparse = True
    rest = [p for p in model.parameters() if p is not model.embed.weight]
    optimizers = [torch.optim.SparseAdam([model.embed.weight], lr=1e-3), torch.optim.AdamW(rest, lr=1e-3)]
    report = watched(model, optimizers)
    assert report.error is None
    assert report.is_right is True, str(report)
    undecided = [p.name for p in report.parameters if p.explanation.rule == "undecided"]
    assert undecided == ["embed.weight"]


def test_the_import_is_light() -> None:
    heavy = "deepspeed transformers accelerate omegaconf wandb datasets pandas"
    code = f"import sys, harness.audit; print([m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
