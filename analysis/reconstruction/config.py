"""From command-line words and experiment files to a checked `Config`. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from analysis import job_keys
from analysis.reconstruction.keys import STAGES, Config, describe
from harness.config.errors import InputError, closest
from harness.config.overrides import leaves, parse

__all__ = ["Config", "describe", "load"]

_FIXTURE: Mapping[str, Any] = {"classes": [0, 4], "per_class": 15, "attack": {"steps": 0}}
"""Defaults of mode=fixture: the pair of the documentation, and no attack unless steps are given."""
_LISTS = {
    "optimizer", "checkpoints", "margins", "radius", "width", "stages",
    "attack.alpha", "attack.lambda_min", "attack.radius", "attack.candidates", "attack.lr",
}  # fmt: skip


def load(words: Sequence[str]) -> Config:
    """Words of the command line to a checked configuration.

    Args:
        words: `key=value` words; `experiment=NAME` takes configs/experiment/NAME.yaml first. A list is `[a,b]`
            or `a,b`; one value where a list is meant is that value alone. `OPTIMIZER.option=value` sets an
            optimizer's option.

    Raises:
        InputError: unknown keys, wrong values, values that exclude each other.
    """
    given = {a.key: a.value for a in parse([job_keys.bracketed(word) for word in words], lambda *_: None)}
    values: dict[str, Any] = {}
    if experiment := given.pop("experiment", None):
        values = job_keys.experiment(str(experiment), "reconstruct")
    flat = {k: v for name, value in given.items() for k, v in leaves(name, value).items()}
    mode = flat.get("mode", values.get("mode", "victim"))
    merged = _nested({**_flattened(_FIXTURE if mode == "fixture" else {}), **_flattened(values), **flat})
    _separate_options(merged)
    _check_keys(merged)
    try:
        config = Config.model_validate(_with_lists(merged))
    except ValidationError as error:
        raise _translated(error) from None
    _check(config)
    return config


def _flattened(values: Mapping[str, Any]) -> dict[str, Any]:
    return leaves("", dict(values)) if values else {}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        place = nested
        for parent in parents:
            inside = place.setdefault(parent, {})
            if not isinstance(inside, dict):
                raise InputError(name, value, f"stands below {parent}, which is given as {inside}")
            place = inside
        place[last] = value
    return nested


def _separate_options(values: dict[str, Any]) -> None:
    from optimizers.presets import names

    found = {key: values.pop(key) for key in ("gd", *names()) if isinstance(values.get(key), dict)}
    if found:
        values["options"] = {**values.get("options", {}), **found}


def _check_keys(values: Mapping[str, Any]) -> None:
    known = {key for key, _, _ in describe()} | {"experiment"}
    given = _flattened({k: v for k, v in values.items() if k != "options"})
    for key, value in given.items():
        if key not in known:
            guess = closest(key, known)
            fix = f"{guess}={value}" if guess else f"remove {key}"
            raise InputError(
                key, value, "is for an unknown key", allowed=sorted(known), suggestion=guess, fix=fix
            )


def _with_lists(values: dict[str, Any]) -> dict[str, Any]:
    flat = _flattened({k: v for k, v in values.items() if k != "options"})
    listed = {
        k: [v] if k in _LISTS and v is not None and not isinstance(v, list) else v for k, v in flat.items()
    }
    return {**_nested(listed), "options": values.get("options", {})}


def _translated(error: ValidationError) -> InputError:
    problem = error.errors()[0]
    key = ".".join(
        str(part) for part in problem["loc"] if isinstance(part, str) and part not in ("str", "list[int]")
    )
    meaning = next((doc for name, _, doc in describe() if name == key), "")
    message = problem["msg"].removeprefix("Value error, ")
    return InputError(key, problem["input"], f"is wrong: {message[:1].lower()}{message[1:]}", allowed=meaning)


def _check(config: Config) -> None:
    from optimizers.presets import names

    for name in config.optimizer:
        if name != "gd" and name not in names():
            raise InputError("optimizer", name, allowed=["gd", *names()], fix="optimizer=gd")
    for stage in config.stages:
        if stage not in STAGES:
            raise InputError("stages", stage, allowed=STAGES, fix=f"stages={','.join(STAGES)}")
    for name in config.options:
        if name not in config.optimizer:
            raise InputError(
                name,
                config.options[name],
                "is for an optimizer that is not trained",
                allowed=config.optimizer,
            )
    _check_numbers(config)
    if (config.checkpoint is None) != (config.batch is None):
        key, missing = ("checkpoint", "batch") if config.batch is None else ("batch", "checkpoint")
        raise InputError(key, getattr(config, key), f"needs {missing}=FILE beside it", fix=f"{missing}=FILE")
    if config.checkpoint is not None and config.mode == "fixture":
        raise InputError("checkpoint", config.checkpoint, "has no place in mode=fixture", fix="mode=victim")
    several = isinstance(config.classes, list) and len(config.classes) > 2
    if several and config.task in ("binary", "regression"):
        raise InputError("task", config.task, "takes two classes", fix="task=multiclass")
    if not several and config.task == "multiclass":
        raise InputError("task", "multiclass", "takes three or more classes", fix="classes=[0,1,2]")
    if config.mode == "fixture" and (several or config.task not in ("auto", "binary") or config.offset):
        raise InputError("mode", "fixture", "takes two classes, no offset", fix="classes=[0,4]")


def _check_numbers(config: Config) -> None:
    positive = {"radius": config.radius, "width": config.width, "margins": config.margins}
    for key, values in positive.items():
        if any(v <= 0 for v in values) or (not values and key != "margins"):
            raise InputError(
                key, values, "must be numbers above 0", fix=f"{key}={Config().model_dump()[key]}"
            )
    if config.neurons % 2:
        raise InputError(
            "neurons",
            config.neurons,
            "must be even: half for each class",
            fix=f"neurons={config.neurons + 1}",
        )
    if config.checkpoints is not None and (not config.checkpoints or min(config.checkpoints) < 1):
        raise InputError(
            "checkpoints", config.checkpoints, "must be steps from 1", fix="checkpoints=[100,3000]"
        )
