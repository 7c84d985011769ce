"""Defaults that depend on other keys: the peak learning rate, and how often and on how many tokens a run is evaluated.

A row of `LEARNING_RATES` holds for the model sizes between its two bounds; outside of all rows the nearest one is
taken, with a warning. `tuned` is true where the source searched over learning rates at that size.

Forward and backward pass cost three times a forward pass, so evaluation on n tokens costs what training on n/3 does.
Only keys that all arms of a comparison share enter: arms are evaluated at the same steps on the same tokens, a resumed
run goes on with them, and no clock decides. Torch-free.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from harness.config.schema import RunConfig
from optimizers.presets import PRESETS, names, plugin_rule
from optimizers.rule_options import PeakRate


class LearningRate(NamedTuple):
    """A default. `warning` is None where a row covers the size."""

    lr: float
    source: str
    tuned: bool
    warning: str | None
    aux_lr: float | None = None


LEARNING_RATES: dict[str, tuple[PeakRate, ...]] = {
    name: preset.rates for name, preset in PRESETS.items() if preset.rates
}
"""Preset → its rates, as the module of its rule states them."""


def default_learning_rate(
    optimizer: str, parameters: int, *, from_weights: bool = False, task: str = "pretrain"
) -> LearningRate | None:
    """Return the default peak learning rate of a preset.

    Args:
        optimizer: preset name.
        parameters: number of parameters of the model.
        from_weights: the run starts from trained weights (`model.path`), at which no row was tuned.
        task: of the run; all rows were tuned for pretraining.

    Returns:
        None for an optimizer that is not in the table and is not a plug-in rule with a default lr.
    """
    rows = LEARNING_RATES.get(optimizer)
    if not rows:
        lr = rule_rate(optimizer)
        return None if lr is None else LearningRate(lr, f"default of the rule {optimizer}", False, None)
    row = min(rows, key=lambda row: _distance(row, parameters))
    is_covered = _distance(row, parameters) == 0
    warnings = []
    if not is_covered:
        size = f"{parameters / 1e6:.3g}M"
        warnings.append(
            f"optimizer.lr: no default for {optimizer} at {size} parameters; {row.lr:g} is the nearest "
            f"({row.source}); give optimizer.lr=… for a fair comparison"
        )
    if from_weights:
        warnings.append(
            f"optimizer.lr: {row.lr:g} is a rate for random weights, and this run starts from trained weights, "
            f"which usually need a smaller one; set optimizer.lr=… (docs/model_path.md)"
        )
    elif task != "pretrain":
        warnings.append(
            f"optimizer.lr: {row.lr:g} is a rate for pretraining, and this run has task={task}; set optimizer.lr=…, or "
            "tune it with optbench sweep"
        )
    is_tuned = row.tuned and is_covered and not from_weights and task == "pretrain"
    # A source that says "tuned" at another size, or from other weights, must not read as if it were about this run.
    limits = [
        *(["nearest size"] if not is_covered else []),
        *(["random weights"] if from_weights else []),
        *(["pretraining"] if task != "pretrain" else []),
    ]
    source = f"{', '.join(limits)}: {row.source}" if limits else row.source
    return LearningRate(row.lr, source, is_tuned, "; ".join(warnings) or None, row.aux_lr)


def rule_rate(optimizer: str) -> float | None:
    """Return the learning rate that a rule of an installed package names itself; None: it names none."""
    if optimizer in PRESETS or optimizer not in names():
        return None
    return plugin_rule(optimizer).defaults.get("lr")


def _distance(row: PeakRate, parameters: int) -> float:
    """Return how far outside of a row a size is, as the logarithm of a factor; 0 inside."""
    size = max(parameters, 1)
    return max(0.0, math.log(row.smallest / size), math.log(size / row.largest))


MOST_TOKENS, LEAST_TOKENS = 32768, 8192
"""Of an evaluation with ``eval.tokens=auto``; fewer only where a single one would exceed `SHARE`."""
MOST_EVALUATIONS = 10
FEW_EVALUATIONS = 4
"""A curve through fewer points shows little: a short run reads fewer tokens, down to `LEAST_TOKENS`, to have these."""
SHARE = 0.1
"""Of the training compute, that evaluations take by default."""
FORWARD_SHARE = 1 / 3
"""Compute of a forward pass over that of a forward and backward pass."""


def evaluation_tokens(config: RunConfig) -> int:
    """Return ``eval.tokens``, or for ``auto`` those of `default_evaluation_tokens`."""
    return default_evaluation_tokens(config) if config.eval.tokens == "auto" else config.eval.tokens


def default_evaluation_tokens(config: RunConfig) -> int:
    """Return the tokens of an evaluation that the run's length allows: whole rows, at least one."""
    once = int(SHARE * _train_tokens(config) / FORWARD_SHARE)
    tokens = min(MOST_TOKENS, once, max(LEAST_TOKENS, once // FEW_EVALUATIONS))
    return max(config.seq_len, tokens - tokens % config.seq_len)


def evaluation_interval(config: RunConfig, examples: int | None = None) -> int | None:
    """Return the steps between evaluations, None for the last step alone.

    ``auto`` spreads up to ten evaluations evenly over the run, as many as take `SHARE` of the training compute. A task
    whose validation data are read whole is evaluated once an epoch in up to ten epochs, else ten times, or as often as
    `SHARE` allows.

    Args:
        config: of the run.
        examples: of the validation data of a task; None: not known, or each costs more than a forward pass.
    """
    if config.eval.every != "auto":
        return config.eval.every
    if config.task.name != "pretrain":
        is_by_epoch = config.epochs is not None and 1 < config.epochs <= MOST_EVALUATIONS
        count = math.ceil(config.epochs or 1) if is_by_epoch else MOST_EVALUATIONS
        if examples is not None:
            one = FORWARD_SHARE * examples / (config.steps * config.batch_size)
            count = max(1, min(count, int(SHARE / one + 1e-9)))
        return -(-config.steps // count)
    one = FORWARD_SHARE * evaluation_tokens(config) / _train_tokens(config)
    # The small term keeps a share that is met exactly from being lost to rounding.
    count = max(1, min(MOST_EVALUATIONS, int(SHARE / one + 1e-9)))
    return -(-config.steps // count)


def evaluation_share(config: RunConfig) -> float:
    """Return the compute of all evaluations of a pretraining run over that of training."""
    between = evaluation_interval(config) or config.steps
    count = config.steps // between + (config.steps % between > 0)
    return count * FORWARD_SHARE * evaluation_tokens(config) / _train_tokens(config)


def _train_tokens(config: RunConfig) -> int:
    return config.steps * config.batch_size * config.seq_len
