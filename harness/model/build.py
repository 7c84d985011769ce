"""Build a causal language model: any `transformers` configuration, no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from harness.config.errors import InputError
from harness.config.schema import ModelConfig, Precision
from harness.model.precision import cast_parameters


def build(config: ModelConfig, *, seed: int, precision: Precision = "fp32", device: str = "cpu") -> nn.Module:
    """A model in training mode, with parameters that depend on ``config`` and ``seed`` alone.

    Random initialization happens on the CPU in fp32 whatever the device, precision and world size, so that
    every process of every engine starts from the same bits; ``bf16_pure`` rounds those bits once. With
    ``config.path`` weights come from that local folder instead.

    Args:
        config: what to build.
        seed: seeds torch's global CPU generator right before initialization.
        precision: ``bf16_pure`` gives bf16 parameters, all others fp32 (mixed precision is the engine's); buffers
            keep the dtype that the model gives them.
        device: ``"meta"`` builds without memory, to count or plan; else where the model is moved to.

    Raises:
        InputError: unknown model type, a configuration key that this model type does not have, values that
            the model refuses, or a folder without a model.
    """
    dtype = torch.bfloat16 if precision == "bf16_pure" else torch.float32
    model: Any
    if config.path is not None:
        model = _from_folder(config)
    else:
        hf_config = configuration(config)
        with torch.device("meta" if device == "meta" else "cpu"):
            torch.manual_seed(seed)
            model = _construct(hf_config, config)
    cast_parameters(model, dtype)
    if config.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    return model if device == "meta" else model.to(device)


def configuration(config: ModelConfig) -> PretrainedConfig:
    """The `transformers` configuration that ``config`` describes, every key known to the model type."""
    try:
        known = AutoConfig.for_model(config.model_type).to_dict().keys()
    except ValueError as error:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]

        raise InputError(
            "model.model_type", config.model_type, allowed=sorted(CONFIG_MAPPING_NAMES)
        ) from error
    for key in config.config:
        if key not in known:
            raise InputError(
                f"model.config.{key}",
                config.config[key],
                f"is not a key of {config.model_type}",
                allowed=sorted(known),
            )
    try:
        return AutoConfig.for_model(config.model_type, **config.config, use_cache=False)
    except Exception as error:
        # The configuration classes raise whatever their validators raise (TypeError, ValueError, a hub's own).
        raise InputError(
            "model.config", dict(config.config), f"is refused by {config.model_type}: {error}"
        ) from error


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _construct(hf_config: PretrainedConfig, config: ModelConfig) -> nn.Module:
    try:
        return AutoModelForCausalLM.from_config(
            hf_config, attn_implementation=config.attention, dtype=torch.float32
        )
    except ValueError as error:
        raise InputError("model", config.name, f"cannot be built: {str(error).splitlines()[0]}") from error


def _from_folder(config: ModelConfig) -> Any:
    folder = Path(str(config.path))
    if not (folder / "config.json").is_file():
        raise InputError(
            "model.path", folder, "holds no config.json", allowed="a local Hugging Face model folder"
        )
    try:
        # local_files_only: a mistyped folder must not turn into a hub download.
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            attn_implementation=config.attention,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise InputError("model.path", folder, f"cannot be loaded: {str(error).splitlines()[0]}") from error
    model.config.use_cache = False
    return model
