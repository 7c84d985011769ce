"""Refreshes of large matrices are spread over the interval by default; small models refresh all matrices together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import optimizers
from harness.config import checks, compose
from harness.config.identity import identity
from optimizers import refresh_schedule
from optimizers.refresh_schedule import STAGGERED_SIDE, refresh_offsets

LARGE, SMALL = (STAGGERED_SIDE, 4 * STAGGERED_SIDE), (STAGGERED_SIDE - 1, 4 * STAGGERED_SIDE)


def test_auto_spreads_large_matrices_over_eight_steps_and_leaves_the_others() -> None:
    options = {"refresh_offset": 3, "refresh_interval": 200, "refresh_stagger": "auto"}
    offsets = refresh_offsets([LARGE, SMALL] * 16, options)
    assert offsets[1::2] == [3] * 16
    assert offsets[::2] == [3 + 25 * (number // 2) for number in range(16)]


@pytest.mark.parametrize(("stagger", "expected"), [(False, [1, 1, 1, 1]), (True, [1, 51, 101, 151])])
def test_true_spreads_all_and_false_none(stagger: bool, expected: list[int]) -> None:
    options = {"refresh_offset": 1, "refresh_interval": 200, "refresh_stagger": stagger}
    assert refresh_offsets([LARGE, SMALL, LARGE, SMALL], options) == expected


def test_an_interval_below_the_number_of_groups_and_few_matrices() -> None:
    options = {"refresh_interval": 2, "refresh_stagger": "auto"}
    assert set(refresh_offsets([LARGE] * 16, options)) == {0, 1}
    assert refresh_offsets([LARGE], {"refresh_interval": 200, "refresh_stagger": "auto"}) == [0]
    assert refresh_offsets([], options) == []


def refreshed(stagger: Any, monkeypatch: pytest.MonkeyPatch, side: int) -> list[list[int]]:
    """Return the steps in which each of 16 matrices of 12×8 got a new basis."""
    monkeypatch.setattr(refresh_schedule, "STAGGERED_SIDE", side)
    weights = [torch.nn.Parameter(torch.zeros(12, 8)) for _ in range(16)]
    options = {} if stagger is None else {"refresh_stagger": stagger}
    optimizer = optimizers.SUMO(weights, lr=0.01, rank=2, refresh_interval=16, **options)
    assert optimizer.param_groups[0]["refresh_stagger"] == (
        "auto" if side == 8 and stagger is None else False
    )
    generator = torch.Generator().manual_seed(0)
    steps: list[list[int]] = [[] for _ in weights]
    old = [torch.zeros(1)] * len(weights)
    for t in range(18):
        for w in weights:
            w.grad = torch.randn(w.shape, generator=generator)
        optimizer.step()
        for i, w in enumerate(weights):
            basis = optimizer.state[w]["basis"].clone()
            if t == 0 or not torch.equal(basis, old[i]):
                steps[i].append(t)
            old[i] = basis
    return steps


def test_the_default_refreshes_large_matrices_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [[0, 16], *([0, 16 - 2 * group] for group in range(1, 8))]
    assert refreshed(None, monkeypatch, side=8) == [steps for steps in expected for _ in range(2)]


@pytest.mark.parametrize(("stagger", "side"), [(None, 9), (False, 8)])
def test_small_matrices_and_false_refresh_together(
    stagger: bool | None, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refreshed(stagger, monkeypatch, side) == [[0, 16]] * 16


@pytest.mark.parametrize("built_with", [True, False])
def test_a_loaded_state_brings_its_schedule(built_with: bool) -> None:
    def start(stagger: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(8)))
        options = {"rank": 4, "refresh_interval": 8, "refresh_stagger": stagger}
        return model, optimizers.build("sumo", model.named_parameters(), modules=model, lr=1e-3, **options)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            inputs = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
            model(inputs).square().sum().backward()
            optimizer.step()

    model, optimizer = start(False)
    train(model, optimizer, range(3))
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(3, 12))
    other, loaded = start(built_with)
    other.load_state_dict(weights)
    loaded.load_state_dict(state)
    train(other, loaded, range(3, 12))
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_bad_value_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(optimizers.OptionError, match=r"refresh_stagger.*(?s:.*)auto"):
        optimizers.SUMO([torch.nn.Parameter(torch.zeros(8, 8))], lr=0.1, refresh_stagger="sometimes")


@pytest.mark.parametrize(("model", "is_changed"), [("llama_60m", False), ("llama_1b", True)])
def test_only_runs_of_large_models_have_another_identity(model: str, is_changed: bool) -> None:
    runs = [
        checks.check(compose.load([f"model={model}", "optimizer=sumo", *words]), {}, devices=0)
        for words in ([], ["optimizer.refresh_stagger=false"])
    ]
    assert runs[0].optimizer.options["refresh_stagger"] == ("auto" if is_changed else False)
    first, second = (identity(run, "corpus", "tokenizer") for run in runs)
    assert (first != second) == is_changed
