"""Options around any rule on real gloo ranks: every layout moves weights as one process does, and goes on elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.distributed.test_named_state import joined, run, start
from tests.distributed.test_sharded import TOLERANCE

if TYPE_CHECKING:
    from tests.distributed.pool import RankPool

STEPS = 6
DECAY = {"weight_decay": 0.5}
HOOKS: dict[str, dict[str, Any]] = {
    "cautious": {"weight_decay_form": "cautious", **DECAY},
    "rms": {"update_rms": 0.2},
    "hyperball": {"weight_norm": "hyperball"},
    "fixed": {"weight_norm": "fixed"},
    "bf16": {"state_dtype": "bfloat16"},
}
# Every layout rounds with the same bits. Of the elements a share of 1e-7/2⁻⁸ lies within fp32 noise of a boundary and
# may be off by 2⁻⁸: 2e-5 of a moment, amplified by a polar factor. Measured: 4e-6 at most; other bits: 2e-3.
BOUNDS = {"bf16": 2e-4}
CASES = [
    pytest.param(preset, kind, hook, marks=[] if kind in ("fsdp2", "zero1") else pytest.mark.slow)
    for preset, hooks in {
        "sumo": ("cautious", "rms", "hyperball", "bf16"),
        "galore": ("rms", "bf16"),
        "muon": ("cautious", "hyperball", "bf16"),
        "adamw": ("cautious", "fixed", "bf16"),
    }.items()
    for hook in hooks
    for kind in ("split", "fsdp2", "zero1", "zero3")
]


def alone(preset: str, extra: dict[str, Any], last: int = STEPS) -> tuple[list[torch.Tensor], Any]:
    return joined([run(0, preset, "single", 0, last, start(), None, _of(preset, extra))])


def _of(preset: str, extra: dict[str, Any]) -> dict[str, Any]:
    # Decay and norm of the weights exclude each other, and adamw decays by default.
    return {"weight_decay": 0.0, **extra}


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((f - e).norm() / (e - s).norm()) for f, e, s in zip(found, expected, start()))


@pytest.mark.parametrize(("preset", "kind", "hook"), CASES)
def test_two_ranks_equal_one_process(two_ranks: RankPool, preset: str, kind: str, hook: str) -> None:
    extra = _of(preset, HOOKS[hook])
    found, state = joined(two_ranks.run(run, preset, kind, 0, STEPS, start(), None, extra))
    expected, whole = alone(preset, HOOKS[hook])
    assert distance(found, expected) < BOUNDS.get(hook, TOLERANCE)
    assert state[1].keys() == whole[1].keys()
    if hook in ("hyperball", "fixed"):
        for i, (before, after) in enumerate(zip(start(), found)):
            if before.ndim == 2:
                assert float(after.norm()) == pytest.approx(float(before.norm()), rel=1e-6)
                assert float(state[1][f"layers.{i}.w", "weight_norm"]) == pytest.approx(float(before.norm()))


@pytest.mark.parametrize("hook", HOOKS)
def test_control_without_the_option_it_goes_elsewhere(hook: str) -> None:
    expected, _ = alone("adamw" if hook == "fixed" else "sumo", HOOKS[hook])
    bare, _ = alone("adamw" if hook == "fixed" else "sumo", DECAY if hook == "cautious" else {})
    assert distance(bare, expected) > BOUNDS.get(hook, 1e-2)


MOVES = [("zero1", "fsdp2"), ("fsdp2", "zero3"), ("split", "single")]
KEPT = [("sumo", "hyperball"), ("adamw", "fixed"), ("muon", "average"), ("galore", "bf16")]


@pytest.mark.parametrize(
    ("preset", "hook", "before", "after"),
    [
        # Every option moves one way each time, and every way has an option.
        pytest.param(*kept, *move, marks=[] if place == number % len(MOVES) else pytest.mark.slow)
        for number, kept in enumerate(KEPT)
        for place, move in enumerate(MOVES)
    ],
)
def test_a_state_goes_on_elsewhere(
    two_ranks: RankPool, preset: str, hook: str, before: str, after: str
) -> None:
    extra = _of(preset, {**HOOKS, "average": {"average_decay": 0.8}}[hook])
    weights, saved = joined(two_ranks.run(run, preset, before, 0, 3, start(), None, extra))
    if after == "single":
        results = [run(0, preset, after, 3, STEPS, weights, saved, extra)]
    else:
        results = two_ranks.run(run, preset, after, 3, STEPS, weights, saved, extra)
    found, state = joined(results)
    expected, whole = alone(preset, extra)
    assert distance(found, expected) < BOUNDS.get(hook, TOLERANCE)
    assert state[1].keys() == whole[1].keys()
    for key, value in whole[1].items():
        assert state[1][key].dtype == value.dtype
        if key[1] in ("average", "weight_norm"):
            torch.testing.assert_close(state[1][key], value, rtol=1e-4, atol=1e-5)
