"""From command-line words and YAML files to a `RunConfig`.

    config = load(["model=llama_60m", "optimizer=sumo", "optimizer.rank=128", "steps=1000"])

Groups are merged by Hydra; values are then set by us, so that an unknown key, a wrong type or a word that
would be dropped is an `InputError` that names the key, the file and the remedy. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from harness import bounded_files
from harness.bounded_files import UnreadableFile
from harness.config import evaluation_budget, keys, learning_rates
from harness.config.errors import InputError, closest
from harness.config.identity import comparison_key, differing_keys, identity
from harness.config.model_facts import config_fields
from harness.config.overrides import Assignment, leaves, parse
from harness.config.schema import FILLED_IN, RunConfig
from harness.config.sources import GROUPS, compose, find, options, plugin_rules
from harness.record.redaction import redact_secrets

__all__ = [
    "comparison_key",
    "difference",
    "differing_keys",
    "identity",
    "load",
    "load_file",
    "to_yaml",
]

_MISSING = object()
_NAMED_BY_FILE = ("optimizer", "engine", "schedule")


def load(argv: Sequence[str]) -> RunConfig:
    """Compose a run from command-line words.

    Args:
        argv: `group=option` and `key=value` words in Hydra's grammar, in any order. `experiment=NAME` (or
            `+experiment=NAME`) is merged after the other groups and before values.

    Returns:
        The typed configuration; not yet checked against itself and the machine (`checks.check`).

    Raises:
        InputError: anything that is not understood; see the module.
    """
    assignments = parse(argv, partial(_meant_assignment, list(argv)))
    groups = {a.key: a for a in assignments if a.key in GROUPS and not isinstance(a.value, dict)}
    selections, direct = _selections(groups)
    _refuse_two_names(groups, assignments)
    composed = compose(selections)
    values = composed.values
    _refuse_lost_experiment(values.pop("experiment", None), composed.files)
    for group, replacement in direct.items():
        values[group] = replacement
    texts: dict[str, str] = {}
    given = [a for a in assignments if a.key not in groups]
    for assignment in given:
        texts[assignment.key] = assignment.text
    _check_known(values, given, composed.files)
    for assignment in given:
        _set(values, assignment.key, assignment.value)
    _name_plugin(values, assignments)
    return _validate(values, texts, partial(_origin, set(texts), composed.files))


def load_file(path: str | Path) -> RunConfig:
    """Read a configuration that `to_yaml` wrote (a run's config.yaml).

    Raises:
        InputError: missing or unreadable file, unknown key, wrong value; the file is named.
    """
    path = Path(path)
    try:
        values = bounded_files.read_yaml(path, [])
    except FileNotFoundError:
        raise InputError("config", str(path), "does not exist", fix="give the config.yaml of a run") from None
    except UnreadableFile as error:
        raise InputError("config", str(path), f"cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise InputError("config", str(path), "holds no keys", fix="give the config.yaml of a run")
    known = [*keys.all_keys(list(_model_fields(values))), *FILLED_IN]
    for key, value in _all_leaves(values).items():
        if key not in known and not _is_free(key, values):
            raise keys.unknown(key, value, [name for name in known if name not in FILLED_IN], str(path))
    return _validate(values, {}, lambda key: str(path))


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML without secrets, keys in the schema's order, readable by `load_file`."""
    return yaml.safe_dump(
        redact_secrets(config.model_dump(mode="json")),
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
        width=110,
    )


def difference(config: RunConfig) -> dict[str, Any]:
    """What differs from the defaults, without secrets: dotted key → value, in the schema's order.

    Optimizer options are compared with those of the preset, everything else with a run without any words.
    What the checks derive from other keys (learning rate, engine, micro-batch) counts only where it differs
    from what they would have derived.
    """
    from optimizers.presets import PRESETS

    defaults = _all_leaves(load([]).model_dump(mode="json"))
    preset = PRESETS.get(config.optimizer.name)
    if preset is not None:
        options_now = {name: _jsonable(value) for name, value in preset.options.items() if name != "lr"}
        defaults |= {f"optimizer.{name}": value for name, value in options_now.items()}
    current = _all_leaves(config.model_dump(mode="json"))
    derived = {**defaults, **_derived(config)}
    different = {
        key: value
        for key, value in current.items()
        if key not in FILLED_IN and value not in (defaults.get(key, _MISSING), derived.get(key, _MISSING))
    }
    return redact_secrets(different)


def _derived(config: RunConfig) -> dict[str, Any]:
    """What `checks.check` puts where nothing was given, as far as this configuration is checked."""
    derived: dict[str, Any] = {
        "optimizer.seed": config.seed,
        "eval.tokens": evaluation_budget.default_tokens(config),
    }
    if config.optimizer.lr_source not in (None, "given"):
        derived["optimizer.lr"] = config.optimizer.lr
        rows = learning_rates.TABLE.get(config.optimizer.name, ())
        beside = next((row.aux_lr for row in rows if row.source == config.optimizer.lr_source), None)
        if beside is not None:
            derived["optimizer.aux_lr"] = beside
    if config.world_size is not None:
        derived["engine.name"] = "single" if config.world_size == 1 else "ddp"
        derived["micro_batch_size"] = config.batch_size // config.world_size
    return derived


def _selections(groups: Mapping[str, Assignment]) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Groups that have a file, and optimizers that have none: plug-in rules and import paths."""
    selections: dict[str, str] = {}
    direct: dict[str, dict[str, Any]] = {}
    for group, assignment in groups.items():
        option = "null" if assignment.value is None else assignment.text.strip("'\"")
        if group == "experiment" and assignment.value is None:
            continue
        if find(group, option) is not None:
            selections[group] = option
        elif group == "optimizer" and option in options(group):
            direct[group] = {"name": option}
        elif (
            group == "optimizer" and all(part.isidentifier() for part in option.split(".")) and "." in option
        ):
            direct[group] = {"name": option.rpartition(".")[2], "target": option}
        else:
            choices = options(group)
            guess = closest(option, choices) or (choices[0] if choices else None)
            fix = f"{group}={guess}" if guess else f"add configs/{group}/{option}.yaml"
            raise InputError(group, option, allowed=choices, fix=fix)
    return selections, direct


def _refuse_lost_experiment(values: Any, files: Sequence[Path]) -> None:
    """Without its directive, an experiment's values end below `experiment`, where nothing reads them."""
    if values:
        path = next((str(path) for path in reversed(files) if path.parent.name == "experiment"), "experiment")
        reason = f"in {path} reach no key"
        fix = f"make '# @package _global_' the first line of {path}"
        raise InputError("experiment", ", ".join(map(str, values)), reason, fix=fix)


def _refuse_two_names(groups: Mapping[str, Assignment], assignments: Sequence[Assignment]) -> None:
    """`optimizer=sumo optimizer.name=muon` would drop one of the two."""
    for assignment in assignments:
        for key, value in leaves(assignment.key, assignment.value).items():
            group, _, leaf = key.partition(".")
            chosen = groups.get(group)
            named = chosen is not None and group in _NAMED_BY_FILE and leaf in ("name", "target")
            if named and chosen is not None and value not in (chosen.text, None):
                both = f"{chosen.text} and {value}"
                raise InputError(group, both, "are two choices for one run", fix=f"{group}={value}")


def _check_known(values: Mapping[str, Any], given: Sequence[Assignment], files: Sequence[Path]) -> None:
    """Every key must exist: those of the files first, then the words."""
    overridden: dict[str, Any] = {}
    for assignment in given:
        overridden |= leaves(assignment.key, assignment.value)
    merged = {**_all_leaves(values), **overridden}
    nested = {
        "optimizer": {
            "name": merged.get("optimizer.name"),
            "target": merged.get("optimizer.target"),
        },
        "model": {"model_type": merged.get("model.model_type", "llama")},
    }
    known = keys.all_keys(list(_model_fields(nested)))
    for key, value in merged.items():
        if key in known or _is_free(key, nested):
            continue
        if any(name.startswith(f"{key}.") for name in known):
            continue  # a group given as a value: the validation says so in words
        source = None if key in overridden else _origin(set(), files, key)
        raise keys.unknown(key, value, known, source)


def _is_free(key: str, values: Mapping[str, Any]) -> bool:
    """Keys that cannot be listed: options of foreign optimizers, fields of unlisted models, nested fields."""
    optimizer = values.get("optimizer") or {}
    if key.startswith("optimizer.") and isinstance(optimizer, dict):
        return bool(optimizer.get("target")) or optimizer.get("name") in plugin_rules()
    if key == keys.FREE:
        return True
    if key.startswith(f"{keys.FREE}."):
        fields = _model_fields(values)
        field, *inside = key.split(".")[2:]
        # Below a field with a plain value nothing can stand; what is None or unreadable may be a mapping.
        return not fields or (field in fields and not (inside and fields[field] is not None))
    return any(
        key.startswith(f"{name}.") for name, field in keys.schema_keys().items() if field.default == {}
    )


def _model_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    model = values.get("model") or {}
    kind = model.get("model_type", "llama") if isinstance(model, dict) else "llama"
    return config_fields(str(kind)) or {}


def _name_plugin(values: dict[str, Any], assignments: Sequence[Assignment]) -> None:
    """A run by import path is called after its class, unless a name was given."""
    optimizer = values.get("optimizer")
    named = any(a.key in ("optimizer", "optimizer.name") for a in assignments)
    if isinstance(optimizer, dict) and isinstance(optimizer.get("target"), str) and not named:
        optimizer["name"] = optimizer["target"].rpartition(".")[2]


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; a mapping is merged into what is there, as Hydra does."""
    for name, leaf in leaves(key, value).items():
        *parents, last = name.split(".")
        place = values
        for parent in parents:
            inside = place.get(parent)
            if not isinstance(inside, dict):
                inside = place[parent] = {}
            place = inside
        place[last] = leaf


def _validate(
    values: dict[str, Any], texts: Mapping[str, str], origin: Callable[[str], str | None]
) -> RunConfig:
    normal = keys.normalize(values, texts)
    try:
        return RunConfig.model_validate(normal)
    except ValidationError as error:
        location = ".".join(str(part) for part in error.errors()[0]["loc"] if isinstance(part, str))
        raise keys.translate(error, normal, origin(location)) from None


def _origin(overridden: set[str], files: Sequence[Path], location: str) -> str | None:
    """The last file that holds a key, or None if the command line does."""
    if any(location == key or location.startswith(f"{key}.") for key in overridden):
        return None
    for path in reversed(files):
        group = path.parent.name
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        is_global = group not in GROUPS or group == "experiment"
        inside = _all_leaves(content or {} if is_global else {group: content or {}})
        if any(key == location or location.startswith(f"{key}.") for key in inside):
            return str(path)
    return None


def _all_leaves(values: Mapping[str, Any]) -> dict[str, Any]:
    return leaves("", dict(values)) if values else {}


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _meant_assignment(words: list[str], word: str, following: str | None) -> str | None:
    """The assignment that a stray word was probably meant to be."""
    known = keys.all_keys()
    bare = word.lstrip("-")
    key, equals, value = bare.partition("=")
    if not equals:
        key, colon, value = bare.partition(":")
        equals = colon
    if equals:
        meant = key if key in known or key in GROUPS else keys.meant_key(key, known)
        return f"{meant}={value}" if meant else None
    for group in GROUPS:
        if bare in options(group):
            return f"{group}={bare}"
    meant = bare if bare in known or bare in GROUPS else keys.meant_key(bare, known)
    takes_next = meant and following is not None and "=" not in following and not following.startswith("-")
    if takes_next:
        return f"{meant}={following}"
    for group in GROUPS:
        if guess := closest(bare, options(group)):
            return f"{group}={guess}"
    return f"{meant}=…" if meant else None
