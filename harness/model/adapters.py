"""LoRA adapters inside a model: frozen weights, a trained product of two small matrices next to each (`peft`).

`peft` puts its layers into the model in place, so that the model keeps its class, its configuration and its head. The
weight ``q_proj.weight`` is then called ``q_proj.base_layer.weight``, next to ``q_proj.lora_A.default.weight`` (rank ×
inputs) and ``q_proj.lora_B.default.weight`` (outputs × rank).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from harness.config.schema import ModelConfig
from harness.errors import InputError
from harness.model import heads
from harness.model.heads import ClassificationHead
from harness.protocols import Put, WeightSource
from optimizers.module_patterns import first_match, matches
from optimizers.routing import route

_ADAPTER = "default"
"""Name of the only adapter, a component of the names of its weights."""


def add(
    model: Any, config: ModelConfig, head: ClassificationHead | None, seed: int
) -> Callable[[WeightSource], WeightSource]:
    """Add the adapter that a configuration asks for, in place, and freeze what is not trained.

    Trained are the adapter and, of a classifier, the head. On the meta device adapters have no numbers either.

    Args:
        model: constructed.
        config: of the model.
        head: of a classifier.
        seed: of the adapter's numbers: A is uniform as in `peft`, B is zero.

    Returns:
        A function that makes of the source of the model's numbers that of the model with its adapter.

    Raises:
        InputError: a target is not the name of a hidden linear layer.
    """
    if config.adapter is None:
        return lambda weights: weights
    from peft import LoraConfig, inject_adapter_in_model

    targets = target_names(model, config)
    own = [name for name, _ in model.named_parameters()]
    is_meta = next(model.parameters()).is_meta
    first = model.get_submodule(targets[0])
    lora = config.lora
    adapter = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] (it is divided by the rank)
        lora_dropout=lora.dropout,
        target_modules=targets,
        # Stored as (inputs, outputs), in which GPT-2 differs.
        fan_in_fan_out=type(first).__name__ == "Conv1D",
    )
    inject_adapter_in_model(adapter, model, adapter_name=_ADAPTER, low_cpu_mem_usage=is_meta)
    head_weights = set(heads.head_names(model, own)) if head is not None else set()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_adapter(name) or name in head_weights)
    if not is_meta:
        for name, value in _initial(model, seed):
            model.get_parameter(name).data.copy_(value)
    return lambda weights: _AdapterWeights(model, weights, own, seed)


def target_names(model: Any, config: ModelConfig) -> list[str]:
    """Return the names of the linear layers that get an adapter.

    Raises:
        InputError: a pattern of `model.lora.targets` names none, or the model has none.
    """
    named = [(name, p) for name, p in model.named_parameters() if name.endswith(".weight")]
    hidden = [r.name.removesuffix(".weight") for r in route(named, "muon", model) if r.rule != "adamw"]
    layers = [name for name in hidden if type(model.get_submodule(name)).__name__ in ("Linear", "Conv1D")]
    patterns, known = config.lora.targets, sorted({name.rpartition(".")[2] for name in layers})
    if not layers:
        reason = f"finds no hidden linear layer in {config.model_type}"
        raise InputError("model.adapter", config.adapter, reason, fix="model.adapter=null")
    for pattern in patterns or ():
        if not any(matches(name, pattern) for name in layers):
            reason = f"names no hidden linear layer of {config.model_type}"
            fix = f"model.lora.targets=[{','.join(known)}], or null for all of them"
            raise InputError("model.lora.targets", pattern, reason, allowed=known, fix=fix)
    return layers if patterns is None else [name for name in layers if first_match(name, patterns)]


@torch.no_grad()
def merge(model: nn.Module) -> bool:
    """Add each adapter's product to its weight and remove the adapter, in place; return False if there is none.

    Weights and names are then those of the model without an adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, layer in layers:
        merged: Any = layer
        merged.merge()
        model.set_submodule(name, merged.get_base_layer())
    if layers:
        # Left by `peft` on the model; `save_pretrained` would read it.
        vars(model).pop("peft_config", None)
    return bool(layers)


class _AdapterWeights:
    """The numbers of a model with an adapter: the model's under their new names, then the adapter's.

    Args:
        model: with its adapter.
        weights: of the model without.
        own: names that the model's parameters had.
        seed: of the adapter's numbers.
    """

    def __init__(self, model: nn.Module, weights: WeightSource, own: list[str], seed: int) -> None:
        self._weights = weights
        now = [name for name, _ in model.named_parameters() if not _is_adapter(name)]
        # In the order of before: layers keep their places.
        self._names = dict(zip(own, now, strict=True))
        self._initial = dict(_initial(model, seed))

    def deliver(self, put: Put) -> None:
        """Hand over every parameter and buffer, tied ones under their first name."""
        self._weights.deliver(lambda name, value: put(self._names.get(name, name), value))
        for name, value in self._initial.items():
            put(name, value)


def _initial(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the numbers of the adapter, fp32 on the CPU: the same whether the model has memory or not."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if _is_adapter(name):
            value = torch.zeros(parameter.shape, device="cpu")
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
            yield name, value


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name
