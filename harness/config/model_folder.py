"""A local Hugging Face model folder: what `model.path` brings along, read without torch or transformers.

The folder decides the model: type, shape, name and tokenizer. Keys below ``model.config`` override its
configuration where the weights allow it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from harness.config import gguf_files, model_keys
from harness.config.sources import compose_one
from harness.errors import InputError
from harness.files import bounded
from harness.files.bounded import UnreadableFile

KEY = "model.path"
_FIX = "give a folder that save_pretrained wrote, or leave model.path out"
_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
)
_UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
_SHAPE_KEYS = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "n_shared_experts",
    "n_embd",
    "n_layer",
    "n_head",
    "n_positions",
    "n_inner",
    "d_model",
    "n_layers",
    "n_heads",
    "tie_word_embeddings",
}
"""Keys that decide which weights there are, how they are shaped, or what their rows mean."""


class ModelFolder(NamedTuple):
    """A model folder.

    Attributes:
        path: of the folder.
        config: its config.json.
    """

    path: Path
    config: dict[str, Any]

    @property
    def model_type(self) -> str:
        """Return the `transformers` model type."""
        return str(self.config["model_type"])

    @property
    def name(self) -> str:
        """Return a name for runs: the folder's, or the repository's for a folder of the Hugging Face cache."""
        place = self.path.expanduser().absolute()
        cached = next((part for part in place.parts if part.startswith("models--")), None)
        name = cached.rpartition("--")[2] if cached else place.name
        return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.")[:60] or "model"

    @property
    def has_tokenizer(self) -> bool:
        """Return True if the folder holds a tokenizer."""
        return any((self.path / name).is_file() for name in _TOKENIZER_FILES)

    @property
    def has_own_code(self) -> bool:
        """Return True if the configuration points to Python code in the folder or in a repository."""
        return bool(self.config.get("auto_map"))

    def settings(self) -> dict[str, Any]:
        """Return what the folder says about the model, under the declared names of its configuration class.

        Facts about files and generation, and names that the class does not know, are left out.
        """
        fields = model_keys.config_fields(self.model_type)
        kept = {
            name: value
            for name, value in self.config.items()
            if name not in (*model_keys.BASE_FIELDS, "model_type", "torch_dtype", "use_cache", "auto_map")
            and not name.startswith("_")
            and (fields is None or model_keys.has_key(self.model_type, name))
        }
        return model_keys.canonical(self.model_type, kept)

    def parameters(self) -> int:
        """Return how many numbers the weight files hold.

        Raises:
            InputError: a file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        count = 0
        for file in weight_files(self.path):
            try:
                with safe_open(file, framework="numpy") as content:
                    for name in content.keys():  # noqa: SIM118 (it is not a mapping)
                        size = 1
                        for side in content.get_slice(name).get_shape():
                            size *= side
                        count += size
            except (OSError, SafetensorError) as error:
                reason = f"has a damaged {file.name} ({' '.join(str(error).split())})"
                raise InputError(KEY, self.path, reason, fix="copy that file again") from None
        return count


def read(path: str | Path) -> ModelFolder:
    """Return the model folder at ``path``.

    Raises:
        InputError: it is not a folder, or holds no configuration of a model that can be trained.
    """
    folder = Path(path).expanduser()
    config = _config(folder, path)
    if not isinstance(config.get("model_type"), str):
        raise InputError(KEY, path, "has a config.json without model_type", fix=_FIX)
    if config.get("quantization_config"):
        reason = "holds quantized weights, which can't be trained"
        raise InputError(KEY, path, reason, fix="give the folder of the unquantized model")
    return ModelFolder(folder, config)


def weight_files(path: str | Path) -> tuple[Path, ...]:
    """Return the safetensors files that transformers would load: one file, or what an index lists.

    Raises:
        InputError: there are none, or one is missing.
    """
    folder = Path(path).expanduser()
    single, index = folder / "model.safetensors", folder / _INDEX
    if single.is_file():
        return (single,)
    if not index.is_file():
        others = sorted(file.name for pattern in _UNSAFE for file in folder.glob(pattern))
        reason = "holds no weights (model.safetensors)"
        fix = (
            "give a folder with weights; for random weights leave model.path out and set model.config.… keys"
        )
        if others:
            reason = f"holds weights as {others[0]} only, a format that can run code or that can't be trained"
            fix = "load it with transformers and call save_pretrained, which writes model.safetensors"
        raise InputError(KEY, path, reason, allowed="safetensors files", fix=fix)
    try:
        content = bounded.read_json(index, [])
        names = sorted(set(content["weight_map"].values()))
    except (UnreadableFile, OSError, KeyError, TypeError, AttributeError) as error:
        raise InputError(KEY, path, f"has a damaged {_INDEX} ({error})", fix="copy it again") from None
    files = [folder / str(name) for name in names]
    lost = [file.name for file in files if file.parent != folder or not file.is_file()]
    if lost:
        reason = f"lacks {lost[0]}, one of {len(files)} weight files"
        raise InputError(KEY, path, reason, fix="copy the missing files")
    return tuple(files)


def adopt(
    section: Mapping[str, Any],
    preset: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    chosen: str | None,
    cache_dir: str | None = None,
) -> tuple[dict[str, Any], ModelFolder | None]:
    """Return the model section of a run with what its folder brings, if it names one.

    A GGUF file is converted to a folder in the cache first, which then takes its place.

    Args:
        section: the section as the files give it, the preset's values included.
        preset: the preset's values alone.
        given: dotted key below ``model`` → value, of the overrides.
        chosen: the preset's name, if an override chose it.
        cache_dir: ``data.cache_dir``.

    Raises:
        InputError: see `read`, `weight_files` and `gguf_files`; or the preset or ``model.model_type`` disagrees with
            the folder.
    """
    path, brought = given.get("path", section.get("path")), None
    if isinstance(path, (str, Path)) and (file := gguf_files.find(path)) is not None:
        path, brought = gguf_files.converted(file, cache_dir), gguf_files.name_of(file)
    if not isinstance(path, (str, Path)) or not Path(path).expanduser().is_dir():
        return dict(section), None  # the checks say what is wrong with it
    folder = read(path)
    brought = brought or folder.name
    weight_files(path)
    settings, kind = folder.settings(), folder.model_type
    own: dict[str, Any] = section.get("config") or {}
    if preset.get("path") is None:
        # A preset describes a model of its own. What an experiment has changed in it is meant for this one.
        shipped: dict[str, Any] = preset.get("config") or {}
        if chosen is not None:
            _check_same(folder, chosen, str(preset.get("model_type", "llama")), shipped)
        own = {name: value for name, value in own.items() if name not in shipped or shipped[name] != value}
    wanted = given.get("model_type")
    if wanted not in (None, kind):
        reason = f"is not the type of the model in {path}, which is {kind}"
        raise InputError("model.model_type", wanted, reason, fix="leave model.model_type out")
    names = {preset.get("name"), None}
    name = section.get("name") if section.get("name") not in names else brought
    if preset.get("path") is not None:
        name = section.get("name") or brought
    return {
        **section,
        "name": name,
        "model_type": kind,
        "path": str(path),
        "config": {**settings, **model_keys.canonical(kind, own)},
    }, folder


def check_overrides(folder: ModelFolder, config: Mapping[str, Any]) -> None:
    """Refuse values that the folder's weights can't have.

    Args:
        folder: that the weights come from.
        config: the model's configuration under declared names.

    Raises:
        InputError: naming the key, the folder's value and what to do.
    """
    for name, value in overrides(folder, config).items():
        if name in _SHAPE_KEYS:
            settings = folder.settings()
            stored = settings.get(name, _defaults(folder.model_type).get(name))
            key = f"model.config.{name}"
            reason = f"does not fit the weights in {folder.path}, which have {stored}"
            raise InputError(key, value, reason, fix=f"leave {key} out, or model.path")


def overrides(folder: ModelFolder, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of ``config`` (declared names) whose value differs from the folder's."""
    base = {**_defaults(folder.model_type), **folder.settings()}
    missing = object()
    return {name: value for name, value in config.items() if base.get(name, missing) != value}


def _defaults(model_type: str) -> dict[str, Any]:
    return model_keys.config_fields(model_type) or {}


def _check_same(folder: ModelFolder, chosen: str, kind: str, shipped: Mapping[str, Any]) -> None:
    """Refuse a preset that was chosen by name and describes another model than the folder's."""
    if kind == folder.model_type:
        other = overrides(folder, model_keys.canonical(kind, shipped))
        if not other:
            return
        name, value = next(iter(other.items()))
        difference = f"model.config.{name} is {value} there and {folder.settings().get(name)} in the folder"
    else:
        difference = f"a {kind} model, and the folder holds a {folder.model_type} model"
    reason = f"is another model than the one in {folder.path} ({difference})"
    raise InputError("model", chosen, reason, fix=f"leave model={chosen} out: model.path brings its own")


def _config(folder: Path, path: str | Path) -> dict[str, Any]:
    if not folder.is_dir():
        fix = _FIX
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not folder.exists():
            fix = f"hf download {path} --local-dir {Path(path).name}, then model.path={Path(path).name}"
        reason = "is a file, not a folder" if folder.exists() else "is not a folder"
        raise InputError(KEY, path, reason, allowed="a local Hugging Face model folder", fix=fix)
    if (folder / "adapter_config.json").is_file():
        reason = "holds an adapter (adapter_config.json), not a whole model"
        raise InputError(KEY, path, reason, fix="merge it into its model (peft: merge_and_unload), save that")
    file = folder / "config.json"
    if not file.is_file():
        is_run = (folder / "checkpoints").is_dir() or (folder / "manifest.json").is_file()
        fix = f"optbench export {path} model, then model.path=model" if is_run else _FIX
        reason = "is a run folder, not a model folder" if is_run else "has no config.json"
        raise InputError(KEY, path, reason, allowed="a local Hugging Face model folder", fix=fix)
    try:
        config = bounded.read_json(file, [])
    except (UnreadableFile, OSError) as error:
        raise InputError(KEY, path, f"has an unreadable config.json ({error})", fix=_FIX) from None
    if not isinstance(config, dict):
        raise InputError(KEY, path, "has a config.json that is not a JSON object", fix=_FIX)
    return config


def complete_section(
    values: dict[str, Any], given: Mapping[str, Any], *, preset_file: Path | None, chosen: str | None
) -> None:
    """Put what `model.path` brings (type, shape, name, tokenizer) in the place of the preset's values.

    Args:
        values: nested values of the group files; changed.
        given: dotted key → value, of the command line and a run's file.
        preset_file: the file in configs/model/ that the model section comes from.
        chosen: the preset's name, if an override chose it.

    Raises:
        InputError: the folder can't be used, or disagrees with what was given.
    """
    below_model, section = below("model", given), values.get("model")
    if not isinstance(section, dict):
        return
    if "path" not in below_model and not section.get("path"):
        _forget_keys_of_another_type(section, below_model.get("model_type"))
        return
    preset = compose_one("model", preset_file.stem) if preset_file is not None else {}
    data = values.get("data")
    cache_dir = given.get("data.cache_dir", data.get("cache_dir") if isinstance(data, dict) else None)
    section, folder = adopt(section, preset, below_model, chosen=chosen, cache_dir=cache_dir)
    values["model"] = section
    if folder is not None and folder.has_tokenizer and "tokenizer" not in below("data", given):
        # Its weights mean nothing for the ids of another tokenizer, which a data preset would name.
        values.setdefault("data", {})["tokenizer"] = section["path"]


def use_converted(values: Mapping[str, Any]) -> None:
    """Put the folder of a GGUF file in its place, where an override or a file has named it as ``model.path``."""
    section, data = values.get("model"), values.get("data")
    path = section.get("path") if isinstance(section, dict) else None
    if isinstance(section, dict) and isinstance(path, str) and (file := gguf_files.find(path)) is not None:
        cache_dir = data.get("cache_dir") if isinstance(data, dict) else None
        section["path"] = str(gguf_files.converted(file, cache_dir))


def unite_names(values: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Keep one name for each field of the model's configuration: `n_embd` of gpt2 is also `hidden_size`.

    Raises:
        InputError: two names of one field were given two values.
    """
    model = values.get("model")
    if isinstance(model, dict) and isinstance(model.get("config"), dict):
        kind = str(model.get("model_type", "llama"))
        model["config"] = model_keys.canonical(kind, model["config"], below("model.config", given))


def below(group: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was given for keys of a group: key without the group's name → value."""
    return {key.removeprefix(f"{group}."): v for key, v in given.items() if key.startswith(f"{group}.")}


def _forget_keys_of_another_type(section: dict[str, Any], model_type: Any) -> None:
    """Keep of a preset what the type knows that an override asked for."""
    if model_type not in (None, section.get("model_type")):
        config = section.get("config") or {}
        section["config"] = {k: v for k, v in config.items() if model_keys.has_key(str(model_type), k)}
