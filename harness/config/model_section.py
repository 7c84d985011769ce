"""The model section of a run: what `model.path` or another model type makes of the preset's values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.config import model_folder, model_keys
from harness.config.sources import compose_one


def complete(
    values: dict[str, Any], given: Mapping[str, Any], *, preset_file: Path | None, chosen: str | None
) -> None:
    """Put what `model.path` brings (type, shape, name, tokenizer) in the place of the preset's values.

    Args:
        values: nested values of the group files; changed.
        given: dotted key → value, of the command line and a run's file.
        preset_file: the file in configs/model/ that the model section comes from.
        chosen: the preset's name, if a word of the command line chose it.

    Raises:
        InputError: the folder can't be used, or disagrees with what was given.
    """
    words, section = below("model", given), values.get("model")
    if not isinstance(section, dict):
        return
    if "path" not in words and not section.get("path"):
        _forget_keys_of_another_type(section, words.get("model_type"))
        return
    preset = compose_one("model", preset_file.stem) if preset_file is not None else {}
    section, folder = model_folder.adopt(section, preset, words, chosen=chosen)
    values["model"] = section
    if folder is not None and folder.has_tokenizer and "tokenizer" not in below("data", given):
        # Its weights mean nothing for the ids of another tokenizer, which a data preset would name.
        values.setdefault("data", {})["tokenizer"] = section["path"]


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
    """Keep of a preset what the type knows that was asked for by a word."""
    if model_type not in (None, section.get("model_type")):
        config = section.get("config") or {}
        section["config"] = {k: v for k, v in config.items() if model_keys.has_key(str(model_type), k)}
