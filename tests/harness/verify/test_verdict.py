"""What is green: every criterion alone turns a cell red."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from harness.record.certificates import Cell
from harness.verify import verdict
from harness.verify.cells import MAX_NORM
from harness.verify.session import Certified
from harness.verify.verdict import Result, judge, needs_twins
from tests.harness.verify.reports import NAMES, report


def test_green() -> None:
    second = {"digests": {}, "orthogonalized": [{}, {}], "bytes_per_step": 20.0}
    result = judge(Cell("muon", "fsdp2"), [report(), second])
    assert result.passed
    assert result.figures["orthogonalizations_per_step"] == 2
    assert result.figures["bytes_per_step"] == 20.0
    assert result.figures["replicas_equal"] is None


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"state": "diverged"}, "ended as diverged"),
        ({"replay_error": 1e-5}, "replay error 1.0e-05 of layers.0.w"),
        ({"replay_error": math.nan}, "replay error nan"),
        ({"replay_error": math.inf}, "replay error inf"),
        ({"end_to_end_error": 0.1}, "end-to-end error"),
        ({"delivery_error": 0.01}, "first step's gradients"),
        ({"grad_norms": [1.0, 0.2]}, "nothing is shown"),
        ({"received_norms": [MAX_NORM, 2.0]}, "received gradients of norm 2"),
        ({"received_norms": [MAX_NORM, math.nan]}, "received gradients of norm"),
        ({"matrices": 1}, "1 matrices take the rule, 2 should"),
        ({"orthogonalized": [dict.fromkeys(NAMES, 1), {NAMES[0]: 2, NAMES[1]: 1}]}, "layers.0.w: 2 times"),
        ({"orthogonalized": [dict.fromkeys(NAMES, 1), {NAMES[0]: 1}]}, "layers.1.w: 0 times"),
        ({"digests": {"weights:rank 0": "a", "weights:masters": "b"}}, "replicas"),
    ],
)
def test_each_criterion_turns_it_red(wrong: dict[str, Any], reason: str) -> None:
    result = judge(Cell("muon", "ddp"), [report(**wrong)])
    assert not result.passed
    assert reason in result.reasons[0]
    assert len(result.reasons) == 1


def test_a_bf16_run_is_not_held_to_fp32_gradients() -> None:
    rounded = report(end_to_end_error=0.3, delivery_error=0.05)
    assert judge(Cell("muon", "ddp", "bf16"), [rounded]).passed
    # A missing clip or a wrong mean is off by a factor in bf16 as well.
    assert not judge(Cell("muon", "ddp", "bf16"), [{**rounded, "delivery_error": 0.5}]).passed
    # The rule's arithmetic is fp32 in both.
    assert not judge(Cell("muon", "ddp", "bf16"), [{**rounded, "replay_error": 1e-5}]).passed


def test_a_replay_is_rounding_up_to_a_multiple_of_what_fp32_does_alone() -> None:
    cell = Cell("adamuon", "fsdp2", options="stabilizer=none")
    assert judge(cell, [report(replay_error=3e-4, replay_floor=2e-4)]).passed
    assert not judge(cell, [report(replay_error=3e-4)]).passed
    assert not judge(cell, [report(replay_error=3e-4, replay_floor=2e-5)]).passed
    # However much a rule amplifies, wrong algebra is red.
    assert not judge(cell, [report(replay_error=1e-2, replay_floor=1e-2)]).passed
    assert not judge(cell, [report(replay_error=math.inf, replay_floor=math.inf)]).passed


@pytest.mark.parametrize(
    ("error", "floor", "passed"),
    [
        (5e-2, None, False),
        (5e-2, 1e-4, False),
        (5e-2, 4e-2, True),
        (9e-3, 1e-6, True),
        (0.5, 0.4, False),
        (math.nan, 5e-2, False),
    ],
)
def test_an_end_to_end_error_is_rounding_up_to_a_multiple_of_the_noise_floor(
    error: float, floor: float | None, passed: bool
) -> None:
    result = judge(Cell("lion", "ddp"), [report(end_to_end_error=error)], noise_floor=floor)
    assert result.passed is passed
    assert result.figures["noise_floor"] == floor


@pytest.mark.parametrize(
    ("cell", "error", "floor", "needed"),
    [
        (Cell("lion", "ddp"), 5e-2, 1e-4, True),
        (Cell("lion", "ddp", control="gradients halved"), 5e-2, 1e-4, True),
        (Cell("lion", "ddp"), 5e-2, 5e-2, False),
        (Cell("lion", "ddp"), 5e-3, None, False),
        (Cell("lion", "ddp"), 0.5, None, False),
        (Cell("lion", "ddp", "bf16"), 5e-2, None, False),
        (Cell("torch.optim.Muon", "fsdp2", is_peer=True), 5e-2, None, False),
    ],
    ids=str,
)
def test_more_twins_are_made_where_they_can_decide(
    cell: Cell, error: float, floor: float | None, needed: bool
) -> None:
    result = judge(cell, [report(end_to_end_error=error)], noise_floor=floor)
    assert needs_twins(result) is needed


def test_cautious_decay_may_decide_otherwise_in_single_elements() -> None:
    cell = Cell("muon", "fsdp2", options="weight_decay=0.5 weight_decay_form=cautious")
    assert judge(cell, [report(replay_error=3e-4)]).passed
    assert not judge(cell, [report(replay_error=1e-2)]).passed


def test_a_matrix_counts_once_however_many_ranks_share_it() -> None:
    rows = report(orthogonalized=[dict.fromkeys(NAMES, 1)] * 2)
    assert (
        judge(Cell("sumo", "fsdp2"), [rows, copy.deepcopy(rows)]).figures["orthogonalizations_per_step"] == 2
    )
    first, second = report(orthogonalized=[{NAMES[0]: 1}] * 2), report(orthogonalized=[{NAMES[1]: 1}] * 2)
    assert judge(Cell("muon", "zero1"), [first, second]).passed


def test_a_sign_in_the_place_of_the_factor_orthogonalizes_nothing() -> None:
    idle = report(orthogonalized=[{}, {}])
    assert judge(Cell("sumo", "ddp", options="inner=sign"), [idle]).passed
    assert "0 times" in judge(Cell("sumo", "ddp"), [idle]).reasons[0]
    assert "0 times" in judge(Cell("sumo", "ddp", options="basis=random"), [idle]).reasons[0]


def test_adamw_has_no_matrices_and_owes_none() -> None:
    assert judge(Cell("adamw", "ddp"), [report(matrices=0, matrix_names=[], orthogonalized=[{}, {}])]).passed


def test_replicas_are_compared_within_their_shard() -> None:
    def ranks(*digests: str) -> list[dict[str, Any]]:
        return [report(digests={f"shard {i % 2}:rank {i}": digest}) for i, digest in enumerate(digests)]

    assert judge(Cell("muon", "hsdp", world_size=4), ranks("a", "b", "a", "b")).passed
    assert not judge(Cell("muon", "hsdp", world_size=4), ranks("a", "b", "b", "a")).passed


def test_a_session_passes_when_cells_are_green_and_controls_red() -> None:
    green, red = Result(Cell("muon", "ddp"), True), Result(Cell("muon", "ddp"), False, ("why",))
    caught = Result(Cell("muon", "ddp", control="clipping forgotten"), False, ("why",))
    missed = Result(Cell("muon", "ddp", control="clipping forgotten"), True)
    peer = Result(Cell("torch.optim.Muon", "fsdp2", is_peer=True), False, ("differs",))
    assert Certified([green, caught, peer], {}, 1.0).passed
    assert not Certified([green, red], {}, 1.0).passed
    assert not Certified([green, missed], {}, 1.0).passed


def test_a_crash_is_red_with_its_last_line() -> None:
    result = verdict.crashed(Cell("muon", "ddp"), "Traceback …\n  File …\nValueError: no")
    assert not result.passed
    assert result.reasons == ("ValueError: no",)
    assert result.as_dict()["replay_error"] is None
