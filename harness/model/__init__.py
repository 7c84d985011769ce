"""Causal language models from their `transformers` configuration, and the loss."""

from harness.model.build import build, count_parameters, decoder_layers
from harness.model.loss import attention_mask, aux_loss_sum, loss_sum, router_coefficient

__all__ = [
    "attention_mask",
    "aux_loss_sum",
    "build",
    "count_parameters",
    "decoder_layers",
    "loss_sum",
    "router_coefficient",
]
