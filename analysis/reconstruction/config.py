"""Keys of `optbench reconstruct`, and the way from command-line words to a checked configuration. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from analysis import job_keys
from harness.config.overrides import leaves, parse
from harness.errors import InputError, closest

STAGES = ("victim", "certificate", "alternatives", "attack")
_PLACES = ("out", "overwrite", "wandb", "stages")
"""Keys that change where results go, not what they are."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AttackConfig(_Model):
    """The attack's grid: every combination of alpha, lambda_min, radius, candidates, lr and seeds is one point."""

    steps: int = Field(default=3000, ge=0, description="steps of the attack; 0: no attack")
    method: Literal["adam", "sgd"] = Field(
        default="adam", description="adam: cosine schedule; sgd: momentum 0.9, as published"
    )
    objective: Literal["l2", "matched", "both"] = Field(
        default="both",
        description="l2: the published residual; matched: alignment in the optimizer's own norm",
    )
    geometry: Literal["auto", "l2", "spectral", "linf", "hybrid"] = Field(
        default="auto", description="norm of the matched objective; auto: the optimizer's own"
    )
    alpha: list[float] = Field(default=[50.0], description="sharpness of the smoothed ReLU")
    lambda_min: list[float] = Field(
        default=[0.005], description="least λ (no factor 1/m: the published 0.5 is 0.5/m here)"
    )
    lambda_init: float = Field(default=0.2, gt=0, description="λ starts uniform in [0, lambda_init]")
    radius: list[float] = Field(
        default=[0.1, 1.0, 3.0], description="initial norm of candidates over the public images'"
    )
    candidates: list[float] = Field(default=[2.0], description="candidates over training images, m/n")
    lr: list[float] = Field(default=[0.02], description="of x and λ, times max(1, radius) for x")
    seeds: int = Field(default=1, ge=1, description="initial values per grid point")
    prior: Literal["none", "box", "radius", "offset"] = Field(
        default="none",
        description="box: pixels in [−1, 1]; radius: ‖x‖ held at the initial radius; offset: start around it",
    )
    offset: float = Field(
        default=0.0, description="the pixel offset that the attacker believes in (prior=offset, box)"
    )
    level: float = Field(
        default=1e-2, gt=0, description="candidates are also scored when K first falls to this"
    )

    @field_validator("alpha", "radius", "candidates", "lr")
    @classmethod
    def _positive(cls, values: list[float]) -> list[float]:
        if not values or min(values) <= 0:
            raise ValueError("must be numbers above 0")
        return values

    @field_validator("lambda_min")
    @classmethod
    def _not_negative(cls, values: list[float]) -> list[float]:
        if not values or min(values) < 0:
            raise ValueError("must be numbers, 0 or more")
        return values


class WandbConfig(_Model):
    """The mirror in W&B."""

    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        default="offline", description="where the mirror goes"
    )
    project: str = Field(default="optbench", description="project in W&B")
    entity: str | None = Field(default=None, description="team or user in W&B")


class ReconstructionConfig(_Model):
    """Everything that `optbench reconstruct` takes."""

    mode: Literal["fixture", "victim"] = Field(
        default="victim", description="fixture: a network in closed form; victim: trained"
    )
    data: Literal["digits", "mnist", "cifar10"] = Field(default="digits", description="digits need no file")
    data_path: str | None = Field(default=None, description="file or folder of mnist or cifar10")
    classes: str | list[int] = Field(
        default="odd_even", description="odd_even, vehicles_animals, or class numbers: [0,4]"
    )
    per_class: int = Field(default=5, ge=1, description="training images of each class")
    data_seed: int = Field(default=0, ge=0, description="of the permutation that chooses the images (victim)")
    offset: float = Field(default=0.0, description="secret offset added to every pixel")
    task: Literal["auto", "binary", "multiclass", "regression"] = Field(
        default="auto", description="auto: by the classes"
    )
    width: list[int] = Field(default=[400], description="units of the hidden layers")
    bias: bool = Field(default=False, description="a bias in the first layer")
    init_scale: float = Field(
        default=1e-3, gt=0, description="standard deviation of the first layer's initial weights"
    )
    optimizer: list[str] = Field(
        default=["gd", "muon"], description="gd or presets; options: muon.lr=… gd.lr=…"
    )
    steps: int = Field(default=3000, ge=1, description="training steps of victims")
    checkpoints: list[int] | None = Field(
        default=None, description="steps to look at; null: steps/30, steps/5, steps"
    )
    margins: list[float] = Field(
        default=[], description="further checkpoints: when the least margin first reaches these"
    )
    seed: int = Field(default=0, ge=0, description="first seed of victims and attacks")
    seeds: int = Field(default=1, ge=1, description="victims per optimizer")
    radius: list[float] = Field(default=[1.0, 10.0, 1000.0], description="radii of splits")
    neurons: int = Field(default=8, ge=2, description="hidden units of the fixture")
    checkpoint: str | None = Field(
        default=None, description="weights of your own (.safetensors, .pt) in place of a victim"
    )
    batch: str | None = Field(default=None, description="its training batch: .npz with x (n, d) and y (n,)")
    attack: AttackConfig = Field(default_factory=AttackConfig)
    options: dict[str, dict[str, Any]] = Field(
        default={}, description="optimizer → its options (muon.lr=0.01)"
    )
    stages: list[str] = Field(
        default=list(STAGES), description="what to do; later stages take up what earlier ones left"
    )
    out: str | None = Field(
        default=None, description="folder of the results; null: runs/reconstruction/MODE-IDENTITY"
    )
    overwrite: bool = Field(
        default=False, description="replace results of another configuration in that folder"
    )
    wandb: WandbConfig = Field(default_factory=WandbConfig)

    @property
    def steps_to_keep(self) -> list[int]:
        """Steps of checkpoints, ascending."""
        chosen = self.checkpoints or [self.steps // 30, self.steps // 5, self.steps]
        return sorted({max(1, step) for step in chosen})

    @property
    def folder(self) -> Path:
        """Where results go: `out`, else a place of this configuration's own."""
        return Path(self.out or f"runs/reconstruction/{self.mode}-{self.identity[:6]}")

    @property
    def identity(self) -> str:
        """Hash of what changes a result."""
        content = self.model_dump(mode="json", exclude=set(_PLACES))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def describe() -> list[tuple[str, Any, str]]:
    """Return (key, default, meaning) of every key."""
    rows: list[tuple[str, Any, str]] = []
    for name, field in ReconstructionConfig.model_fields.items():
        if name == "options":
            continue
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            inner = type(default).model_fields.items()
            rows += [
                (f"{name}.{key}", f.get_default(call_default_factory=True), f.description or "")
                for key, f in inner
            ]
        else:
            rows.append((name, default, field.description or ""))
    return rows


def help_text() -> str:
    """Return every key with default and meaning, for `optbench reconstruct --help`."""
    return job_keys.listed(describe())


_FIXTURE: Mapping[str, Any] = {"classes": [0, 4], "per_class": 15, "attack": {"steps": 0}}
"""Defaults of mode=fixture: the pair of the documentation, and no attack unless steps are given."""
_LISTS = {
    "optimizer", "checkpoints", "margins", "radius", "width", "stages",
    "attack.alpha", "attack.lambda_min", "attack.radius", "attack.candidates", "attack.lr",
}  # fmt: skip


def load(words: Sequence[str]) -> ReconstructionConfig:
    """Return the checked configuration of `key=value` arguments.

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
        config = ReconstructionConfig.model_validate(_with_lists(merged))
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


def _check(config: ReconstructionConfig) -> None:
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


def _check_numbers(config: ReconstructionConfig) -> None:
    positive = {"radius": config.radius, "width": config.width, "margins": config.margins}
    for key, values in positive.items():
        if any(v <= 0 for v in values) or (not values and key != "margins"):
            raise InputError(
                key,
                values,
                "must be numbers above 0",
                fix=f"{key}={ReconstructionConfig().model_dump()[key]}",
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
