"""Heads of `transformers` models: next-token prediction, or one answer for a whole sequence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from harness.config import model_keys
from harness.errors import InputError


@dataclass(frozen=True)
class ClassificationHead:
    """A head that gives a sequence a class, or a number.

    Attributes:
        classes: names in the order of the logits; None: regression, one number.
        pad_id: token that pads rows. Decoders read the answer at the last other token of a row.
    """

    classes: tuple[str, ...] | None
    pad_id: int

    @property
    def outputs(self) -> int:
        """Return the number of logits of a sequence."""
        return 1 if self.classes is None else len(self.classes)


_PROBLEMS: Final = {True: "regression", False: "single_label_classification"}
"""Is a number predicted → ``problem_type`` of `transformers`."""


def automatic_class(head: ClassificationHead | None) -> Any:
    """Return the class of `transformers` that builds a model with this head (None: a causal language model)."""
    return AutoModelForCausalLM if head is None else AutoModelForSequenceClassification


def configure(hf_config: PretrainedConfig, head: ClassificationHead | None) -> PretrainedConfig:
    """Write a head into the configuration that the model is constructed from, and return that.

    An encoder's padding token is part of how it is constructed: embeddings leave it out and RoBERTa counts positions
    from it. A decoder only reads it to find the last token (`finish`): in its embedding it would freeze the row of a
    token that is trained, where padding shares the end-of-text token.
    """
    if head is None:
        return hf_config
    config: Any = hf_config
    config.problem_type = _PROBLEMS[head.classes is None]
    if head.classes is None:
        config.num_labels = 1
    else:
        config.id2label = dict(enumerate(head.classes))
        config.label2id = {name: index for index, name in enumerate(head.classes)}
    if model_keys.is_encoder(config.model_type):
        config.pad_token_id = head.pad_id
    return hf_config


def check_padding(hf_config: PretrainedConfig, head: ClassificationHead | None, folder: Path) -> None:
    """Refuse rows that are padded with another token than the one with which a folder's encoder was trained.

    Raises:
        InputError: naming both tokens.
    """
    own = getattr(hf_config, "pad_token_id", None)
    if head is None or own in (None, head.pad_id) or not model_keys.is_encoder(hf_config.model_type):
        return
    reason = f"pads with token {own}, and the tokenizer of this run with token {head.pad_id}"
    raise InputError("model.path", folder, reason, fix=f"data.tokenizer={folder}")


def finish(model: Any, head: ClassificationHead | None) -> None:
    """Tell a constructed model the padding token of its rows."""
    if head is not None:
        model.config.pad_token_id = head.pad_id
        model.config.get_text_config().pad_token_id = head.pad_id


def head_names(model: Any, names: list[str]) -> list[str]:
    """Return those of the names of weights that belong to a sequence classifier's head, pooler included.

    The head is all that is outside of the base model, and the pooler that the base model of a few encoders ends with.
    """
    base = f"{model.base_model_prefix}."
    return [name for name in names if not name.startswith(base) or "pooler" in name.split(".")]


@torch.no_grad()
def initialize(model: Any, names: list[str], seed: int) -> None:
    """Give weights that a folder lacks their random numbers, in the order in which `transformers` does.

    Args:
        model: whole on the CPU, its other weights loaded.
        names: of parameters, from `head_names`.
        seed: of torch's CPU generator, which is left as it was.

    Raises:
        InputError: the family's code does not initialize one of them.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        # The mark of loaded weights, which transformers' initializers spare.
        tensor._is_hf_initialized = True
    for name in names:
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        module._parameters[key] = nn.Parameter(torch.full_like(module._parameters[key], float("nan")))
    for module in model.modules():
        module._is_hf_initialized = False
    before = torch.get_rng_state()
    # Not by `torch.manual_seed`, which would also seed the GPUs.
    torch.default_generator.manual_seed(seed)
    try:
        model.initialize_weights()
    finally:
        torch.set_rng_state(before)
    for name in names:
        if bool(model.get_parameter(name).isnan().any()):
            reason = f"lacks {name}, which {type(model).__name__} does not initialize by itself"
            raise InputError("model.path", None, reason, fix="give a folder that holds it")
