"""Compose a `RunConfig` from overrides and YAML files.

    config = load(["model=llama_60m", "optimizer=sumo", "optimizer.rank=128", "steps=1000"])

Hydra merges the groups; values are then set here, so that an unknown key, a wrong type or an override that would be
dropped is an `InputError` that names the key, the file and what to type. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from harness.config import (
    derived_defaults,
    model_folder,
    model_keys,
    optimizer_checks,
    suggestions,
    value_tables,
    yaml_files,
)
from harness.config.identity import comparison_key, differing_keys, identity
from harness.config.model_facts import facts
from harness.config.model_keys import config_fields
from harness.config.overrides import Assignment, RunFile, leaves, parse, split_run_file
from harness.config.schema import FILLED_IN, RunConfig, all_keys, run_keys
from harness.config.sources import GROUPS, command_of, compose, find, options, options_of_runs, plugin_rules
from harness.config.typed_keys import FREE, meant, unknown, validate
from harness.config.yaml_files import resolve_interpolations
from harness.errors import InputError, closest
from harness.redaction import redact_secrets

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
    """Compose a run from the arguments of a command.

    Args:
        argv: `group=option` and `key=value` overrides in Hydra's grammar, in any order, and at most one FILE.yaml.
            `experiment=NAME` (or `+experiment=NAME`) is merged after the other groups, the file after the experiment,
            and the values of the overrides last.

    Returns:
        The typed configuration; not yet checked against itself and the machine (`checks.check`).

    Raises:
        InputError: anything that is not understood; see the module.
    """
    # What the user gave: a file, choices of groups, and values of keys.
    file, overrides = split_run_file(argv)
    assignments = parse(overrides, partial(_meant_assignment, overrides))
    choices = {a.key: a for a in assignments if a.key in GROUPS and not isinstance(a.value, dict)}
    settings = [a for a in assignments if a.key not in choices]
    overridden = {key: value for a in settings for key, value in leaves(a.key, a.value).items()}
    _refuse_two_names(choices, assignments)
    _refuse_two_lengths(overridden, "on the command line")

    # Group files: a choice on the command line wins over the same choice in the file.
    selections, without_file = _selections({group: _text_of(a) for group, a in choices.items()})
    if file is not None:
        file = _without_derived(file.without(list(choices)), assignments)
        more, more_without_file = _selections(file.choices, file)
        selections, without_file = {**more, **selections}, {**more_without_file, **without_file}
    composed = compose(selections)
    values = composed.values
    _refuse_lost_experiment(values.pop("experiment", None), composed.files)
    values |= without_file
    origin = partial(_origin, set(overridden), composed.files, file)
    explicit = {**(file.values if file is not None else {}), **overridden}
    experiment = next((path for path in reversed(composed.files) if path.parent.name == "experiment"), None)
    value_tables.merge_rows(values, explicit, experiment)

    # The model: a folder or a recorded run describes it completely, so that no preset's shape is below it.
    preset_file = next((path for path in reversed(composed.files) if path.parent.name == "model"), None)
    if file is not None and file.is_whole_model:
        values["model"], preset_file = {}, None
    preset = choices["model"].text if "model" in choices else None
    model_folder.complete_section(values, explicit, preset_file=preset_file, chosen=preset)

    # Values: the file's over those of the groups, and the overrides over both.
    texts = dict(file.texts) if file is not None else {}
    for key, value in (file.values if file is not None else {}).items():
        _set(values, key, value)
    for assignment in settings:
        texts[assignment.key] = assignment.text
        _set(values, assignment.key, assignment.value)

    model_folder.use_converted(values)

    _choose_length(values, overridden, file, composed.files)
    # Only now, because an interpolation may name any key.
    values = resolve_interpolations(values, RunConfig().model_dump(mode="json"), origin)
    _check_known(values, origin, recorded=file is not None)
    model_folder.unite_names(values, explicit)
    _name_plugin(values, assignments)
    return _validate(values, texts, origin)


def load_file(path: str | Path) -> RunConfig:
    """Read a configuration that `to_yaml` wrote (a run's config.yaml).

    Raises:
        InputError: missing or unreadable file, unknown key, wrong value; the file is named.
    """
    path = Path(path)
    values = yaml_files.read("config", path)
    if not isinstance(values, dict):
        raise InputError("config", str(path), "holds no keys", fix="give the config.yaml of a run")
    known = [*all_keys(list(_model_fields(values))), *FILLED_IN]
    for key, value in _all_leaves(values).items():
        if key not in known and not _is_free(key, values):
            known = [name for name in known if name not in FILLED_IN]
            raise unknown(key, value, known, yaml_files.at(path, key))
    texts = {key: place.text for key, place in yaml_files.places(path).items() if place.text is not None}
    return _validate(values, texts, lambda key: yaml_files.at(path, key))


def to_yaml(config: RunConfig) -> str:
    """Return the whole configuration as YAML without secrets, in the schema's order, readable by `load_file`."""
    from omegaconf._utils import get_omega_conf_dumper

    return yaml.dump(
        redact_secrets(config.model_dump(mode="json")),
        # Quotes the text 1e5, which YAML 1.1 takes for text and every reader here for a number.
        Dumper=get_omega_conf_dumper(),
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
        width=110,
    )


def difference(config: RunConfig) -> dict[str, Any]:
    """Return what differs from the defaults, without secrets: dotted key → value, in the schema's order.

    Optimizer options are compared with those of the preset, everything else with a run without overrides.
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
    # What these mean under auto depends on the machine: only what a CPU would not have is shown.
    derived = {**defaults, "precision": "fp32", "engine.optimizer_work": "replicated", **_derived(config)}
    if "optimizer.refresh_stagger" in defaults:
        staggered = optimizer_checks.stagger(defaults["optimizer.refresh_stagger"], facts(config.model))
        derived["optimizer.refresh_stagger"] = staggered
    different = {
        key: value
        for key, value in current.items()
        if key not in FILLED_IN and value not in (defaults.get(key, _MISSING), derived.get(key, _MISSING))
    }
    return redact_secrets(different)


def _derived(config: RunConfig) -> dict[str, Any]:
    """Return the values that `checks.check` derives where nothing was given."""
    derived: dict[str, Any] = {
        "optimizer.seed": config.seed,
        "eval.tokens": derived_defaults.default_evaluation_tokens(config),
    }
    if config.epochs is not None:
        derived["steps"] = config.steps
    if config.optimizer.lr_source not in (None, "given"):
        derived["optimizer.lr"] = config.optimizer.lr
        rows = derived_defaults.LEARNING_RATES.get(config.optimizer.name, ())
        source = str(config.optimizer.lr_source)
        aux_lr = next((row.aux_lr for row in rows if source.endswith(row.source)), None)
        if aux_lr is not None:
            derived["optimizer.aux_lr"] = aux_lr
    if config.world_size is not None:
        derived["engine.name"] = "single" if config.world_size == 1 else "ddp"
        derived["micro_batch_size"] = config.batch_size // config.world_size
    return derived


def _text_of(assignment: Assignment) -> str:
    return "null" if assignment.value is None else assignment.text.strip("'\"")


def _selections(
    choices: Mapping[str, str], file: RunFile | None = None
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Split choices into groups with a file, and optimizers without one: plug-in rules and import paths.

    Args:
        choices: group → option.
        file: that they come from; None: the command line.

    Returns:
        Group → option of its file, and group → section for optimizers without a file.
    """
    selections: dict[str, str] = {}
    without_file: dict[str, dict[str, Any]] = {}
    for group, option in choices.items():
        is_path = "." in option and all(part.isidentifier() for part in option.split("."))
        if group == "experiment" and option == "null":
            continue
        if group == "experiment" and (command := command_of(option)) != "train":
            fix = f"optbench {command} experiment={option}"
            reason = f"is an experiment of optbench {command}, not of a training run"
            raise InputError(group, option, reason, allowed=options_of_runs(group), fix=fix)
        if find(group, option) is not None:
            selections[group] = option
        elif group == "optimizer" and option in options(group):
            without_file[group] = {"name": option}
        elif group == "optimizer" and is_path and not option.endswith(".py"):
            without_file[group] = {"name": option.rpartition(".")[2], "target": option}
        else:
            raise _wrong_option(group, option, file)
    return selections, without_file


def _wrong_option(group: str, option: str, file: RunFile | None) -> InputError:
    choices = options_of_runs(group)
    meant = suggestions.option(group, option)
    reason = "is wrong" if file is None else f"is wrong in {yaml_files.at(file.path, group)}"
    suggestion = (
        meant.partition("=")[2] if meant and " " not in meant and meant.startswith(f"{group}=") else meant
    )
    fix = meant or f"optbench list, or add configs/{group}/{option}.yaml"
    return InputError(group, option, reason, allowed=choices, suggestion=suggestion, fix=fix)


def _without_derived(file: RunFile, assignments: Sequence[Assignment]) -> RunFile:
    """Leave out of a run's config.yaml what the checks derived, where overrides may lead to something else.

    Without this, ``config.yaml world_size=2`` would keep engine.name=single, ``seed=1`` the optimizer's old seed, and
    ``model=llama_60m`` a learning rate of another model size.
    """
    if not assignments or not file.is_recorded:
        return file
    nested: dict[str, Any] = {}
    for key, value in file.values.items():
        _set(nested, key, value)
    derived = _derived(_validate(nested, file.texts, lambda key: yaml_files.at(file.path, key)))
    changed = {a.key.partition(".")[0] for a in assignments}
    is_same_rate = not changed & {"model", "optimizer", "experiment"}
    dropped = [key for key, value in derived.items() if file.values.get(key) == value]
    if is_same_rate:
        dropped = [key for key in dropped if key not in ("optimizer.lr", "optimizer.aux_lr")]
    if "optimizer.lr" in dropped:
        dropped += FILLED_IN
    return file._replace(values={key: value for key, value in file.values.items() if key not in dropped})


def _refuse_lost_experiment(values: Any, files: Sequence[Path]) -> None:
    """Refuse an experiment without its `@package` directive, whose values end where nothing reads them."""
    if values:
        path = next((str(path) for path in reversed(files) if path.parent.name == "experiment"), "experiment")
        reason = f"in {path} reach no key"
        fix = f"make '# @package _global_' the first line of {path}"
        raise InputError("experiment", ", ".join(map(str, values)), reason, fix=fix)


def _refuse_two_names(groups: Mapping[str, Assignment], assignments: Sequence[Assignment]) -> None:
    """Refuse `optimizer=sumo optimizer.name=muon`, where one of the two would be dropped."""
    for assignment in assignments:
        for key, value in leaves(assignment.key, assignment.value).items():
            group, _, leaf = key.partition(".")
            chosen = groups.get(group)
            named = chosen is not None and group in _NAMED_BY_FILE and leaf in ("name", "target")
            if named and chosen is not None and value not in (chosen.text, None):
                both = f"{chosen.text} and {value}"
                raise InputError(group, both, "are two choices for one run", fix=f"{group}={value}")


def _refuse_two_lengths(given: Mapping[str, Any], where: str) -> None:
    """Refuse steps and epochs in one place."""
    if given.get("steps") is not None and given.get("epochs") is not None:
        both = f"{given['steps']} and epochs={given['epochs']}"
        reason = f"are two lengths of one run {where}"
        raise InputError("steps", both, reason, fix=f"epochs={given['epochs']}, or steps={given['steps']}")


def _choose_length(
    values: dict[str, Any], overridden: Mapping[str, Any], file: RunFile | None, files: Sequence[Path]
) -> None:
    """Let the place that is read last decide between steps and epochs; a recorded run holds both.

    Raises:
        InputError: one file gives both.
    """
    places: list[tuple[Mapping[str, Any], str]] = [(overridden, "on the command line")]
    if file is not None:
        places.append((file.values, f"in {file.path}"))
    for path in reversed(files):
        content = yaml_files.read("configs", path) if path.parent.name in ("experiment", "configs") else None
        places.append((content if isinstance(content, dict) else {}, f"in {path}"))
    for given, where in places:
        if file is not None and given is file.values and file.is_recorded:
            if given.get("steps") is not None:
                return
            continue
        _refuse_two_lengths(given, where)
        if given.get("epochs") is not None:
            return
        if given.get("steps") is not None:
            values["epochs"] = None
            return


def _check_known(values: Mapping[str, Any], origin: Callable[[str], str | None], *, recorded: bool) -> None:
    """Refuse a key that does not exist; ``recorded``: the keys that the checks fill in may be there."""
    known = all_keys(list(_model_fields(values)))
    allowed = {*known, *FILLED_IN} if recorded else set(known)
    for key, value in _all_leaves(values).items():
        if key in allowed or _is_free(key, values):
            continue
        if any(name.startswith(f"{key}.") for name in known):
            continue  # a group given as a value: the validation says so
        raise unknown(key, value, known, origin(key))


def _is_free(key: str, values: Mapping[str, Any]) -> bool:
    """Return True for a key that cannot be listed: options of external optimizers, fields of unlisted models."""
    optimizer = values.get("optimizer") or {}
    if key.startswith("optimizer.") and isinstance(optimizer, dict):
        return bool(optimizer.get("target")) or optimizer.get("name") in plugin_rules()
    if key == FREE:
        return True
    if key.startswith(f"{FREE}."):
        return _is_model_key(_model_type(values), key.removeprefix(f"{FREE}."))
    return any(key.startswith(f"{name}.") for name, field in run_keys().items() if field.default == {})


def _is_model_key(kind: str, name: str) -> bool:
    field, *inside = name.split(".")
    if not inside or not model_keys.has_key(kind, field):
        return model_keys.has_key(kind, name)
    known = model_keys.model_keys(kind)
    if known is not None and known.parts.get(field) is not None:
        return model_keys.has_key(kind, f"{field}.{inside[0]}")
    # Below a field with a plain value nothing can be; what is None or unreadable may be a mapping.
    return known is None or (config_fields(kind) or {}).get(field) is None


def _model_type(values: Mapping[str, Any]) -> str:
    model = values.get("model") or {}
    return str(model.get("model_type", "llama") if isinstance(model, dict) else "llama")


def _model_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    return config_fields(_model_type(values)) or {}


def _name_plugin(values: dict[str, Any], assignments: Sequence[Assignment]) -> None:
    """Name an optimizer with an import path after its class, unless a name was given."""
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
    return validate(RunConfig, values, texts, names=all_keys, source=origin)


def _origin(overridden: set[str], files: Sequence[Path], file: RunFile | None, location: str) -> str | None:
    """Return the last file that holds a key, with the line, or None if the command line does."""
    if _holds(overridden, location):
        return None
    if file is not None and _holds(file.values, location):
        return yaml_files.at(file.path, location)
    for path in reversed(files):
        group = path.parent.name
        prefix = "" if group not in GROUPS or group == "experiment" else f"{group}."
        if _holds([f"{prefix}{key}" for key in yaml_files.places(path)], location):
            return yaml_files.at(path, location.removeprefix(prefix))
    return None


def _holds(known: Iterable[str], location: str) -> bool:
    return any(key == location or location.startswith((f"{key}.", f"{key}[")) for key in known)


def _all_leaves(values: Mapping[str, Any]) -> dict[str, Any]:
    return leaves("", dict(values)) if values else {}


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _meant_assignment(arguments: Sequence[str], argument: str, following: str | None) -> str | None:
    """Return the override (or the command) that a stray argument was probably meant to be."""
    known = [*all_keys(), *GROUPS]
    bare = argument.lstrip("-")
    key, separator, value = bare.partition("=")
    if not separator:
        key, separator, value = bare.partition(":")
    if separator:
        special = suggestions.special(key, value, known)
        return special or (suggestions.assign(key, value) if key in known else meant(key, value, known))
    if not bare:
        return None
    if not argument.startswith("-"):
        for group in GROUPS:
            if bare in options_of_runs(group):
                return f"{group}={bare}"
        if command := suggestions.run_of(bare):
            return command
    follows = following is not None and "=" not in following and not following.startswith("-")
    if follows and (special := suggestions.special(bare, following, known)):
        return special
    if bare in known:
        return suggestions.assign(bare, following) if follows else f"{bare}={_switched_on(bare)}"
    is_on = bare in ("help", "h") or argument.startswith("--")
    if (is_on or follows) and (guess := meant(bare, following if follows else None, known)):
        return guess.replace("=…", f"={_switched_on(guess.removesuffix('=…'))}")
    for group in GROUPS:
        if guess := closest(bare, options_of_runs(group)):
            return f"{group}={guess}"
    return meant(bare, None, known)


def _switched_on(key: str) -> str:
    """Return the value that a flag without a value stands for."""
    known = run_keys().get(key)
    return "true" if known is not None and "true" in known.allowed and known.is_number is False else "…"
