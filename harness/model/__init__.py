"""Causal language models from their `transformers` configuration, and the loss."""

from harness.model.build import build, count_parameters
from harness.model.loss import loss_sum

__all__ = ["build", "count_parameters", "loss_sum"]
