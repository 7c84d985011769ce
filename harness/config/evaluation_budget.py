"""How many evaluations a run has, and on how many tokens, where the keys leave that to us. Torch-free.

Forward and backward pass cost three times a forward pass, so evaluation on n tokens costs what training on n/3 does.
Only keys that all arms of a comparison share enter: arms are evaluated at the same steps on the same tokens, a resumed
run goes on with them, and no clock decides.
"""

from __future__ import annotations

from harness.config.schema import RunConfig

MOST_TOKENS = 32768
"""Of an evaluation with ``eval.tokens=auto``; fewer only where the last evaluation alone would exceed `MOST_SHARE`."""
MOST_EVALUATIONS = 10
SHARE = 0.1
"""Of the training compute, that evaluations with ``eval.every=auto`` take."""
FEW_EVALUATIONS = 4
"""A curve through fewer points shows little: a short run gets these if they fit in `MOST_SHARE`."""
MOST_SHARE = 0.25
FORWARD_SHARE = 1 / 3
"""Compute of a forward pass over that of a forward and backward pass."""


def tokens(config: RunConfig) -> int:
    """Return ``eval.tokens``, or for ``auto`` those of `default_tokens`."""
    return default_tokens(config) if config.eval.tokens == "auto" else config.eval.tokens


def default_tokens(config: RunConfig) -> int:
    """Return the tokens of an evaluation that the run's length allows: whole rows, at least one."""
    affordable = int(MOST_SHARE * _train_tokens(config) / FORWARD_SHARE)
    return max(config.seq_len, min(MOST_TOKENS, affordable - affordable % config.seq_len))


def every(config: RunConfig) -> int | None:
    """Return the steps between evaluations, None for the last step alone.

    ``auto`` spreads up to ten evaluations evenly over the run, as many as take `SHARE` of the training compute, or
    up to `FEW_EVALUATIONS` of them within `MOST_SHARE`.
    """
    if config.eval.every != "auto":
        return config.eval.every
    one = FORWARD_SHARE * tokens(config) / _train_tokens(config)
    # The small term keeps a share that is met exactly from being lost to rounding.
    usual, short = (int(share / one + 1e-9) for share in (SHARE, MOST_SHARE))
    count = max(1, min(MOST_EVALUATIONS, max(usual, min(FEW_EVALUATIONS, short))))
    return -(-config.steps // count)


def share(config: RunConfig) -> float:
    """Return the compute of all evaluations over that of training."""
    between = every(config) or config.steps
    count = config.steps // between + (config.steps % between > 0)
    return count * FORWARD_SHARE * tokens(config) / _train_tokens(config)


def _train_tokens(config: RunConfig) -> int:
    return config.steps * config.batch_size * config.seq_len
