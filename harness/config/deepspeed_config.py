"""DeepSpeed's configuration: what our keys decide, and what a user's own file may add. No torch, no deepspeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.config.schema import RunConfig
from harness.config.typed_keys import format_value
from harness.errors import InputError

KEY = "engine.config_file"

_OURS = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size and micro_batch_size",
    "gradient_clipping": "max_grad_norm",
    "bf16": "precision",
    "bfloat16": "precision",
    "fp16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "activation_checkpointing": "model.activation_checkpointing",
    "compile": "model.compile",
    "wandb": "wandb",
}
"""Section of a DeepSpeed file → our key that decides it."""

_TOP = (
    "comms_logger",
    "communication_data_type",
    "disable_allgather",
    "dump_state",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)
_ZERO = (
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "ignore_unused_parameters",
    "memory_efficient_linear",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "stage",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
)
"""Settings that change speed and memory but not what is computed; the rest of DeepSpeed's is refused by name."""


def effective(config: RunConfig) -> dict[str, Any]:
    """Return the configuration that DeepSpeed is initialized with: our keys, then the user's file.

    Everything that changes the result is written down, because DeepSpeed's defaults do: it clips at 1.0.

    Args:
        config: checked, with a ZeRO engine.

    Raises:
        InputError: see `user_settings`.
    """
    stage = int(config.engine.name[-1])
    assert config.world_size is not None
    assert config.micro_batch_size is not None
    own = user_settings(config.engine.config_file, stage) if config.engine.config_file else {}
    # Stage 0 holds whole gradients: precision, clipping and skipped steps are done there as for ddp.
    is_partitioned = stage > 0
    half = config.precision if is_partitioned and config.precision in ("bf16", "fp16") else None
    accumulate = {}
    if half == "bf16" and stage > 1:
        # Micro-batches add up in fp32, as under fsdp2. For stage 1 this setting means another optimizer of
        # DeepSpeed's (BF16_Optimizer), with a layout of its own.
        accumulate = {"data_types": {"grad_accum_dtype": "fp32"}}
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.batch_size // (config.world_size * config.micro_batch_size),
        "gradient_clipping": (config.max_grad_norm or 0.0) if is_partitioned else 0.0,
        "bf16": {"enabled": half == "bf16"},
        # As torch's GradScaler: from 2^16, doubled after 2,000 good steps, halved by each overflow.
        "fp16": {
            "enabled": half == "fp16",
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 2000,
            "hysteresis": 1,
            "min_loss_scale": 1,
        },
        # Sums of gradients over processes, as under fsdp2.
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": config.steps + 1,
        **accumulate,
        **{key: value for key, value in own.items() if key != "zero_optimization"},
        "zero_optimization": {**own.get("zero_optimization", {}), "stage": stage},
    }


def user_settings(path: str, stage: int) -> dict[str, Any]:
    """Read and check a user's DeepSpeed file; entries with "auto" are left out.

    Raises:
        InputError: no JSON object, a setting that our keys decide, another stage, or one that is not
            supported here.
    """
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise InputError(KEY, path, reason, allowed="a DeepSpeed JSON file", fix=f"{KEY}=null") from None
    if not isinstance(content, dict) or not isinstance(content.get("zero_optimization", {}), dict):
        raise InputError(
            KEY, path, "is not a DeepSpeed configuration", allowed="a JSON object", fix=f"{KEY}=null"
        )
    settings = _without_auto(content)
    zero = settings.get("zero_optimization", {})
    for name in settings:
        if name in _OURS:
            raise InputError(
                KEY,
                path,
                f"decides {name}, which is optbench's key {_OURS[name]}",
                fix=f"remove {name} from it",
            )
        if name not in _TOP:
            reason = f"asks for {name}, which is not supported"
            raise InputError(KEY, path, reason, allowed=", ".join(_TOP), fix=f"remove {name} from it")
    if zero.get("stage", stage) != stage:
        reason = f"asks for ZeRO stage {format_value(zero['stage'])}, and the engine is zero{stage}"
        raise InputError(KEY, path, reason, fix=f"engine=zero{format_value(zero['stage'])}")
    for name, value in zero.items():
        # Offload to nowhere is what many files say.
        if name not in _ZERO and not (isinstance(value, dict) and value.get("device") == "none"):
            reason = f"asks for zero_optimization.{name}, which is not supported"
            raise InputError(KEY, path, reason, allowed=", ".join(_ZERO), fix=f"remove {name} from it")
    if zero:
        settings["zero_optimization"] = {name: value for name, value in zero.items() if name in _ZERO}
    return settings


def _without_auto(content: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in content.items():
        if isinstance(value, dict):
            inner = _without_auto(value)
            if inner or not value:
                kept[name] = inner
        elif value != "auto":
            kept[name] = value
    return kept
