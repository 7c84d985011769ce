"""Evaluations of a run: their compute is a bounded share of training, and depends on nothing that arms differ in."""

from __future__ import annotations

from itertools import product

import pytest

from harness.config import checks, compose, derived_defaults
from harness.config.schema import RunConfig


def _config(*overrides: str) -> RunConfig:
    return checks.check(compose.load(list(overrides)), environ={}, devices=0)


def _count(config: RunConfig) -> int:
    """Evaluations as `harness.probes.validation` makes them: every n steps, and after the last one."""
    every = derived_defaults.evaluation_interval(config)
    return sum(
        step == config.steps or (every is not None and step % every == 0)
        for step in range(1, config.steps + 1)
    )


@pytest.mark.parametrize(
    ("steps", "batch_size"),
    list(product([1, 3, 20, 53, 200, 999, 20001], [2, 16, 256])),
)
def test_default_evaluations_are_a_bounded_share_of_the_compute(steps: int, batch_size: int) -> None:
    config = _config(f"steps={steps}", f"batch_size={batch_size}", "world_size=1")
    assert isinstance(config.eval.tokens, int)
    spent, trained = _count(config) * config.eval.tokens, steps * batch_size * config.seq_len
    share = spent / (3 * trained)
    assert derived_defaults.evaluation_share(config) == pytest.approx(share)
    assert _count(config) in range(1, 11)
    # A run may be shorter than the one row that is read at least.
    assert share <= 0.1 + 1e-9 or (_count(config), config.eval.tokens) == (1, config.seq_len)
    if trained >= 4 * 8192 / 0.3 and steps >= 20:
        assert _count(config) >= 4
    if trained >= 4 * 32768 / 0.3:
        assert config.eval.tokens == 32768
    if trained >= 10 * 32768 / 0.3 and steps >= 100:
        assert _count(config) >= 9


def test_control_the_old_rule_of_ten_evaluations_exceeds_the_share() -> None:
    config = _config("steps=20", "eval.every=2", "eval.tokens=32768", "world_size=1")
    assert derived_defaults.evaluation_share(config) > 1


def test_given_numbers_are_kept() -> None:
    config = _config("steps=20", "eval.every=3", "eval.tokens=4096", "world_size=1")
    assert (derived_defaults.evaluation_interval(config), config.eval.tokens) == (3, 4096)
    assert derived_defaults.evaluation_interval(_config("steps=20", "eval.every=null")) is None


@pytest.mark.parametrize(
    "other", ["optimizer=sumo", "engine=fsdp2", "seed=3", "world_size=2", "precision=bf16"]
)
def test_arms_are_evaluated_at_the_same_steps_on_the_same_tokens(other: str) -> None:
    one, two = _config("steps=37", "world_size=1"), _config("steps=37", other)
    assert one.eval.tokens == two.eval.tokens
    assert derived_defaults.evaluation_interval(one) == derived_defaults.evaluation_interval(two)
    assert checks.check(two, environ={}, devices=0).eval == two.eval


def test_quickstart_spends_at_most_a_tenth_on_evaluation() -> None:
    assert derived_defaults.evaluation_share(_config("experiment=quickstart")) <= 0.1
