"""Schedules against closed forms."""

from __future__ import annotations

import math

import pytest

from harness import schedule
from harness.config.schema import ScheduleConfig
from harness.errors import InputError


def test_warmup_rises_linearly_and_wastes_no_step() -> None:
    factor = schedule.factor(ScheduleConfig(name="constant", warmup=4), 10)
    assert [factor(t) for t in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_halves_in_the_middle_and_ends_at_its_minimum() -> None:
    factor = schedule.factor(ScheduleConfig(name="cosine", warmup=0, min_lr_ratio=0.1), 100)
    assert factor(49) == pytest.approx(0.55)  # half of the way between 1 and 0.1
    assert factor(99) == pytest.approx(0.1)
    expected = 0.1 + 0.9 * (1 + math.cos(math.pi * 25 / 100)) / 2
    assert factor(24) == pytest.approx(expected)


def test_cosine_never_rises_after_the_warmup() -> None:
    # A rival's learning rate rises again in the last step; this is the control for that mistake.
    factor = schedule.factor(ScheduleConfig(name="cosine", warmup=0.1), 40)
    values = [factor(t) for t in range(3, 40)]
    assert values == sorted(values, reverse=True)


def test_linear_falls_to_its_minimum_at_the_last_step() -> None:
    factor = schedule.factor(ScheduleConfig(name="linear", warmup=2, min_lr_ratio=0.0), 10)
    assert [factor(t) for t in range(10)] == pytest.approx([0.5, 1, *(k / 8 for k in range(7, -1, -1))])


@pytest.mark.parametrize("warmup", [0, 5])
def test_linear_is_one_step_ahead_of_that_of_transformers(warmup: int) -> None:
    # Which wastes no first step (warm-up) and no more than the last step; GaLore's run_glue.py uses theirs.
    import torch
    from transformers import get_linear_schedule_with_warmup

    factor = schedule.factor(ScheduleConfig(name="linear", warmup=warmup, min_lr_ratio=0.0), 20)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimizer, warmup, 20)
    expected = []
    for _ in range(20):
        optimizer.step()
        theirs.step()
        expected.append(theirs.get_last_lr()[0])
    assert [factor(t) for t in range(20)] == pytest.approx(expected)


def test_linear_keeps_a_minimum() -> None:
    factor = schedule.factor(ScheduleConfig(name="linear", warmup=0, min_lr_ratio=0.2), 4)
    assert [factor(t) for t in range(4)] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_wsd_is_flat_and_then_falls_linearly() -> None:
    factor = schedule.factor(ScheduleConfig(name="wsd", warmup=2, decay=0.4, min_lr_ratio=0.0), 10)
    assert [factor(t) for t in range(10)] == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0])


def test_shares_and_steps_are_told_apart() -> None:
    assert schedule.length(0.1, 200) == 20
    assert schedule.length(20, 200) == 20
    assert schedule.length(0, 200) == 0


def test_warmup_and_decay_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"schedule\.decay: 8 steps do not fit"):
        schedule.factor(ScheduleConfig(name="wsd", warmup=4, decay=8), 10)
