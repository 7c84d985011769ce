"""Causal language models and sequence classifiers from their `transformers` configuration, and the loss."""

from harness.model.build import build, build_deferred, count_parameters, decoder_layers
from harness.model.compilation import compile_layers
from harness.model.heads import ClassificationHead
from harness.model.loss import CausalLMObjective, loss_sum
from harness.model.specialization import specialize

__all__ = [
    "CausalLMObjective",
    "ClassificationHead",
    "build",
    "build_deferred",
    "compile_layers",
    "count_parameters",
    "decoder_layers",
    "loss_sum",
    "specialize",
]
