"""Learning-rate schedules: a factor of the peak, as a pure function of the step, and what longer runs share of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from harness.config.schema import ScheduleConfig
from harness.errors import InputError

Factor = Callable[[int], float]
STRETCHED = ("cosine", "linear")
"""Schedules that reach over all steps: with more steps, every step has another learning rate."""


def factor(config: ScheduleConfig, steps: int) -> Factor:
    """Return the factor of the peak learning rate for step 0 … steps−1.

    Warm-up of w steps: (t+1)/w for t < w, so that no step is spent at lr 0. Then

    * cosine: r + (1−r)·(1 + cos(π·u))/2 with u = (t+1−w)/(steps−w), which ends at r = ``min_lr_ratio``
      exactly at the last step;
    * linear: r + (1−r)·(1−u) with the same u, so that r is reached at the last step, too (transformers'
      ``get_linear_schedule_with_warmup`` is one step behind: it would reach 0 in the step after the last one);
    * wsd: 1 until the decay of d steps begins, then linear down to r at the last step
      (Hu et al. 2024, MiniCPM, arXiv 2404.06395);
    * constant: 1.

    Raises:
        InputError: warm-up and decay are together longer than the run.
    """
    warmup = length(config.warmup, steps)
    decay = length(config.decay, steps) if config.name == "wsd" else 0
    if warmup + decay > steps:
        key = "schedule.decay" if decay else "schedule.warmup"
        raise InputError(
            key,
            decay or warmup,
            f"steps do not fit: warm-up {warmup} + decay {decay} > steps {steps}",
            allowed="shares of the run below 1, or fewer steps",
        )

    def after_warmup(t: int) -> float:
        low = config.min_lr_ratio
        if config.name == "cosine":
            return low + (1 - low) * (1 + math.cos(math.pi * (t + 1 - warmup) / (steps - warmup))) / 2
        if config.name == "linear":
            return low + (1 - low) * (steps - t - 1) / (steps - warmup)
        if config.name == "wsd" and decay:
            return 1 - (1 - low) * max(0, t + 1 - (steps - decay)) / decay
        return 1.0

    return lambda t: (t + 1) / warmup if t < warmup else after_warmup(t)


def length(value: float, steps: int) -> int:
    """Return the number of steps that a share of the run (below 1) or a number of steps means."""
    return round(value * steps) if value < 1 else round(value)


@dataclass(frozen=True)
class ShorterRun:
    """A run that a longer one continues.

    Attributes:
        identity: of the shorter run.
        steps: that it was asked for.
        shared_steps: first steps that both runs do alike: its checkpoints up to there are the longer run's, too.
    """

    identity: str
    steps: int
    shared_steps: int


def shared_steps(config: ScheduleConfig, longer_steps: int, shorter_steps: int) -> int:
    """Return how many first steps have the same learning rates in a longer and in a shorter run."""
    longer, shorter = factor(config, longer_steps), factor(config, shorter_steps)
    return next((step for step in range(shorter_steps) if longer(step) != shorter(step)), shorter_steps)
