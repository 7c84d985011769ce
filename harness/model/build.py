"""Build a causal language model or a sequence classifier: any `transformers` configuration, no download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from harness.config import model_folder, model_keys
from harness.config.model_folder import ModelFolder
from harness.config.schema import ModelConfig, Precision
from harness.config.typed_keys import format_value
from harness.errors import InputError
from harness.model import adapters, checkpointing, heads, initial_weights
from harness.model.heads import ClassificationHead
from harness.model.initial_weights import NotRecorded
from harness.protocols import WeightSource


def build(
    config: ModelConfig,
    *,
    seed: int,
    precision: Precision = "fp32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    weights: bool = True,
    head: ClassificationHead | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> nn.Module:
    """Return a model in training mode, with parameters that depend on ``config`` and ``seed`` alone.

    Random initialization happens on the CPU in fp32 whatever the device, precision and world size, so that
    every process of every engine starts from the same bits; ``bf16_pure`` rounds those bits once. With
    ``config.path`` weights come from that local folder instead.

    Args:
        config: what to build.
        seed: seeds torch's global CPU generator right before initialization.
        precision: ``bf16_pure`` gives bf16 parameters, all others fp32 (mixed precision is the engine's); buffers
            keep the dtype that the model gives them.
        device: ``"meta"`` builds without memory, to count or plan; else where the model is moved to.
        trust_remote_code: run the Python code that a folder brings along.
        weights: False: the folder may be gone, because all parameters will be overwritten.
        head: of a sequence classifier; None: a causal language model.
        say: takes a line for each kind of weights that a folder lacks or that are not used.

    Raises:
        InputError: unknown model type, a configuration key that this model type does not have, values that
            the model refuses, or a folder without a model.
    """
    model: Any
    is_gone = config.path is not None and not weights and not Path(config.path).expanduser().is_dir()
    if config.path is not None and device != "meta" and not is_gone:
        model = _from_folder(config, trust_remote_code, head, seed, say)
    else:
        hf_config = configuration(config, trust_remote_code=trust_remote_code, read_folder=not is_gone)
        with torch.device("meta" if device == "meta" else "cpu"):
            torch.manual_seed(seed)
            # On the CPU whatever the device: the same bits on every machine.
            model = _construct(hf_config, config, trust_remote_code, head)
        if is_gone:
            _refuse_lost_weights(model, config)
    adapters.add(model, config, head, seed)
    _finish(model, config, precision)
    if precision == "bf16_pure" and device != "meta" and may_mix_dtypes(model):
        _check_bf16(model, config)
    return model if device == "meta" else model.to(device)


def _finish(model: Any, config: ModelConfig, precision: Precision) -> None:
    cast_parameters(model, torch.bfloat16 if precision == "bf16_pure" else torch.float32)
    checkpointing.enable(model, config.activation_checkpointing)
    model.train()


def build_deferred(
    config: ModelConfig,
    *,
    seed: int,
    precision: Precision,
    trust_remote_code: bool = False,
    head: ClassificationHead | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[nn.Module, WeightSource | None]:
    """Return what `build` returns, on the meta device, and the same numbers one tensor at a time.

    Where the numbers can only be made together, the model comes whole from `build`, and None: Python code that a folder
    brings along, weight files with other names than the model's, constructors that fill what they hold, pure bf16 with
    buffers that need a trial on numbers.

    Args:
        config: what to build.
        seed: of the initialization.
        precision: as for `build`.
        trust_remote_code: run the Python code that a folder brings along.
        head: of a sequence classifier; None: a causal language model.
        say: takes a line that says why the model comes whole, and those of `build`.

    Raises:
        InputError: see `build`.
    """

    def whole(in_precision: Precision) -> nn.Module:
        return build(
            config,
            seed=seed,
            precision=in_precision,
            trust_remote_code=trust_remote_code,
            head=head,
            say=say,
        )

    files: list[Path] = []
    try:
        if config.path is not None:
            if trust_remote_code and model_folder.read(config.path).has_own_code:
                raise NotRecorded("the folder brings its own code")
            files = [Path(file) for file in model_folder.weight_files(Path(config.path).expanduser())]
        hf_config = configuration(config, trust_remote_code=trust_remote_code)
        if config.path is not None:
            heads.check_padding(hf_config, head, Path(config.path).expanduser())
        model, weights = initial_weights.record(
            lambda: _construct(hf_config, config, trust_remote_code, head),
            seed=seed,
            files=files,
            build_whole=lambda: whole("fp32"),
        )
        if files:
            difference = initial_weights.compare_files(model, files)
            if difference is None or not _is_only_the_head(model, head, *difference):
                raise NotRecorded("the weight files have other names or shapes")
            _tell_difference(config, head, *difference, say)
        if precision == "bf16_pure" and may_mix_dtypes(model):
            raise NotRecorded("its buffers may not work with pure bf16")
    except (NotRecorded, InputError, OSError, SafetensorError) as error:
        # If the input is wrong, `build` says so.
        model = whole(precision)
        say(f"every process initializes the whole model in host memory: {str(error).splitlines()[0]}")
        return model, None
    with_adapter = adapters.add(model, config, head, seed)
    _finish(model, config, precision)
    return model, with_adapter(weights)


def configuration(
    config: ModelConfig, *, trust_remote_code: bool = False, read_folder: bool = True
) -> PretrainedConfig:
    """Return the `transformers` configuration that ``config`` describes, every key known to the model type.

    Args:
        config: what to build.
        trust_remote_code: run the Python code that a folder brings along.
        read_folder: lay ``config.config`` over the configuration of ``config.path``; False: it holds everything.

    Raises:
        InputError: see `build`.
    """
    kind, stored = config.model_type, {}
    if config.path is not None and read_folder:
        folder = model_folder.read(config.path)
        kind, stored = folder.model_type, folder.config
        if trust_remote_code and folder.has_own_code:
            return _own_configuration(folder, config)
    model_keys.check_model_type(kind)
    for key, value in config.config.items():
        if not model_keys.has_key(kind, key):
            known = sorted(model_keys.config_fields(kind) or ())
            raise InputError(f"model.config.{key}", value, f"is not a key of {kind}", allowed=known)
    values = {**model_keys.canonical(kind, stored), **model_keys.canonical(kind, config.config)}
    try:
        return CONFIG_MAPPING[kind].from_dict({**values, "use_cache": False})
    except Exception as error:
        # The configuration classes raise whatever their validators raise (TypeError, ValueError, a hub's own).
        raise InputError(
            "model.config", format_value(config.config), f"is refused by {kind}: {error}"
        ) from error


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a `transformers` model: those that it names itself and holds in a list.

    Encoders name their embeddings, too (``_no_split_modules``), or nothing: then the longest list of modules is taken.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    named = [module for module in model.modules() if type(module).__name__ in names]
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    listed = {id(module) for modules in lists for module in modules}
    return [module for module in named if id(module) in listed] or named or max(lists, key=len, default=[])


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _construct(
    hf_config: PretrainedConfig, config: ModelConfig, trust_remote_code: bool, head: ClassificationHead | None
) -> nn.Module:
    try:
        model = heads.automatic_class(head).from_config(
            heads.configure(hf_config, head),
            attn_implementation=config.attention,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:
        # Constructors divide by sizes, index with them and allocate: any class of error, all about these values.
        raise _refused("model", config.name, "can't be built", error) from error
    heads.finish(model, head)
    return model


def _from_folder(
    config: ModelConfig,
    trust_remote_code: bool,
    head: ClassificationHead | None,
    seed: int,
    say: Callable[[str], None],
) -> Any:
    place = Path(str(config.path)).expanduser()
    if place.is_dir() and not any(
        (place / name).is_file() for name in ("config.json", "adapter_config.json")
    ):
        raise InputError(
            "model.path", place, "holds no config.json", allowed="a local Hugging Face model folder"
        )
    folder = model_folder.read(place)
    model_folder.weight_files(place)
    hf_config = configuration(config, trust_remote_code=trust_remote_code)
    heads.check_padding(hf_config, head, folder.path)
    transformers_logging.disable_progress_bar()
    try:
        # local_files_only: a mistyped folder must not turn into a hub download.
        loaded: Any = heads.automatic_class(head).from_pretrained(
            folder.path,
            config=heads.configure(hf_config, head),
            attn_implementation=config.attention,
            # bf16 weights, too: bf16_pure casts parameters alone, after buffers were read and computed exactly.
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            # The head of another classifier may have another number of classes.
            ignore_mismatched_sizes=head is not None,
            trust_remote_code=trust_remote_code and folder.has_own_code,
        )
    except Exception as error:
        # Readers of weight files and constructors have a dozen classes of errors of their own.
        raise _refused("model.path", folder.path, "can't be loaded", error) from error
    model, report = loaded
    missing, unused = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    missing = sorted({*missing, *(name for name, *_ in report["mismatched_keys"])})
    if not _is_only_the_head(model, head, missing, []):
        kind = "language model" if head is None else "model"
        reason = f"lacks {len(missing)} weights of a {folder.model_type} {kind} (e.g. {missing[0]})"
        whole = "a causal language model" if head is None else "a whole model"
        raise InputError("model.path", folder.path, reason, fix=f"give the folder of {whole}")
    if missing:
        heads.initialize(model, missing, seed)
    _tell_difference(config, head, missing, unused, say)
    heads.finish(model, head)
    model.config.use_cache = False
    return model


def _is_only_the_head(
    model: Any, head: ClassificationHead | None, missing: list[str], unused: list[str]
) -> bool:
    """Return True if a folder lacks nothing but a classifier's head, and nothing is unused but for another head's."""
    if head is None:
        return not missing and not unused
    return len(heads.head_names(model, missing)) == len(missing)


def _tell_difference(
    config: ModelConfig,
    head: ClassificationHead | None,
    missing: list[str],
    unused: list[str],
    say: Callable[[str], None],
) -> None:
    if head is not None and missing:
        say(f"initialized from the seed, because {config.path} lacks them: {', '.join(missing)}")
    if head is not None and unused:
        more = f" and {len(unused) - 4} more" if len(unused) > 4 else ""
        say(f"not used by a classifier, of {config.path}: {', '.join(unused[:4])}{more}")


def _check_bf16(model: Any, config: ModelConfig) -> None:
    """Refuse pure bf16 where a forward pass would stop at its first step."""
    problem = mixed_dtypes(model)
    if problem is not None:
        reason = (
            f"does not work with {config.model_type}, whose code mixes weights and fp32 buffers ({problem})"
        )
        raise InputError("precision", "bf16_pure", reason, fix="precision=bf16")


def _own_configuration(folder: ModelFolder, config: ModelConfig) -> PretrainedConfig:
    """Return the configuration of a folder that brings its own classes, whose code is run."""
    try:
        hf_config = AutoConfig.from_pretrained(folder.path, trust_remote_code=True, local_files_only=True)
    except Exception as error:
        raise _refused("model.path", folder.path, "can't be loaded", error) from error
    for name, value in model_folder.overrides(folder, config.config).items():
        setattr(hf_config, name, value)
    return hf_config


def _refuse_lost_weights(model: nn.Module, config: ModelConfig) -> None:
    """Refuse a model whose folder is gone and held what no checkpoint holds: frozen weights, or buffers."""
    if config.adapter is not None:
        reason = "is gone, and it held the frozen weights, which no checkpoint of an adapter holds"
        raise InputError("model.path", config.path, reason, fix="put the folder back")
    kept = set(model.state_dict())
    lost = [name for name, buffer in model.named_buffers() if name in kept and buffer.is_floating_point()]
    if lost:
        reason = f"is gone, and it held buffers that no checkpoint holds (e.g. {lost[0]})"
        raise InputError("model.path", config.path, reason, fix="put the folder back")


def _refused(key: str, value: object, what: str, error: Exception) -> InputError:
    lines = str(error).splitlines() or [type(error).__name__]
    hint = next((fix for sign, fix in _HINTS if sign in str(error)), None)
    return InputError(key, value, f"{what}: {lines[0][:300]}", fix=hint)


@torch.no_grad()
def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the floating-point parameters of a model in place; buffers keep their dtype.

    `Module.to(dtype)` would also round rotary frequencies (0.45 rad off at position 1023 in bf16), ALiBi slopes and
    the biases that balance routers.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def may_mix_dtypes(model: nn.Module) -> bool:
    """Return True if the model has fp32 buffers that its code might multiply with weights of another dtype.

    Rotary embeddings compute in fp32 and cast their result, so their frequencies are not among them.
    """
    buffers = [name for name, buffer in model.named_buffers() if buffer.is_floating_point() and buffer.ndim]
    return not all(name.endswith("inv_freq") for name in buffers)


@torch.no_grad()
def mixed_dtypes(model: Any) -> str | None:
    """Return the error of a forward pass that can't multiply weights with the model's fp32 buffers, or None."""
    was_training = model.training
    try:
        model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long))
    except RuntimeError as error:
        if "dtype" not in str(error) and "scalar type" not in str(error):
            raise
        return str(error).splitlines()[0]
    finally:
        model.train(was_training)
    return None


_HINTS = (
    ("scaled_dot_product_attention", "model.attention=eager"),
    ("Padding_idx", "model.config.pad_token_id=null"),
    ("size mismatch", "leave model.config.… keys that change shapes out"),
    ("can't allocate memory", "a smaller model, or a machine with more memory"),
)
"""What an error of transformers or torch says → what to type."""
