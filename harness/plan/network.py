"""The model of a plan on the meta device, at any depth: all decoder layers are alike."""

from __future__ import annotations

from torch import nn

from harness import model
from harness.config.model_facts import facts, full_config
from harness.config.model_keys import config_fields
from harness.config.schema import ModelConfig, Precision

_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")


def depth(config: ModelConfig) -> int | None:
    """Return the number of decoder layers, or None where the model type does not say it."""
    return facts(config).layers


def at_depth(config: ModelConfig, layers: int) -> ModelConfig:
    """Return the same model with another number of decoder layers, described without a folder of weights."""
    known = config_fields(config.model_type) or {}
    values = dict(config.config)
    kind = config.model_type
    if config.path is not None:
        whole = full_config(config)
        kind = str(whole.pop("model_type", kind))
        known = config_fields(kind) or {}
        values = {name: value for name, value in whole.items() if name in known and value is not None}
    names = [name for name in _DEPTHS if name in values] or [name for name in _DEPTHS if name in known][:1]
    # Per-layer lists (attention kinds) are as long as the depth; without them the class makes its own.
    values = {name: value for name, value in values.items() if not (name == "layer_types" and names)}
    return config.model_copy(
        update={"path": None, "model_type": kind, "config": {**values, **dict.fromkeys(names, layers)}}
    )


def build(config: ModelConfig, precision: Precision, *, trust_remote_code: bool = False) -> nn.Module:
    """Return the model on the meta device.

    Args:
        config: of the model.
        precision: of the run.
        trust_remote_code: a folder's own code may be executed.

    Raises:
        InputError: the model refuses its configuration.
    """
    return model.build(
        config, seed=0, precision=precision, device="meta", trust_remote_code=trust_remote_code
    )
