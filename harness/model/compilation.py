"""torch.compile, layer by layer."""

from __future__ import annotations

from torch import nn

from harness.model.build import decoder_layers


def compile_layers(model: nn.Module) -> None:
    """Compile each decoder layer by itself, in place; a model without decoder layers is compiled whole.

    Layers are alike, so one graph serves all of them. Sharding hooks stay outside of it: no graph breaks, and
    `fully_shard` gathers a layer's weights before its graph starts. ZeRO-3 gathers weights in hooks of every module
    inside a layer, which cut its graph. Embedding, head and loss stay eager: they are a few large products. Names of
    modules and parameters stay. Called before the engine takes the model over.

    Args:
        model: a `transformers` model.
    """
    for module in decoder_layers(model) or [model]:
        module.compile()
