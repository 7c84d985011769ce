"""Keys of `optbench reconstruct`: types, bounds, defaults and meaning, and checks across keys. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from analysis import job_keys
from harness.config.typed_keys import TypedKeys
from harness.errors import InputError
from optimizers.presets import names

STAGES = ("victim", "certificate", "alternatives", "attack")
PLACES = {"out", "overwrite", "wandb", "stages"}
"""Keys that change where results go, not what they are."""
FIXTURE_DEFAULTS: Mapping[str, Any] = {
    "classes": [0, 4],
    "per_class": 15,
    "attack.steps": 0,
    "radius": [1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6],
}
"""Defaults of mode=fixture: the pair and radii of the documentation, and no attack unless steps are set."""
Positive = Annotated[float, Field(gt=0)]


class AttackKeys(TypedKeys):
    """The attack's grid: a point per weights and alpha, lambda_min, offset, radius, candidates, lr and seed."""

    steps: int = Field(default=3000, ge=0)
    """steps of the attack; 0: no attack"""
    objective: Literal["l2", "matched", "both"] = "both"
    """l2: the published residual; matched: alignment in the optimizer's own norm"""
    geometry: Literal["auto", "l2", "spectral", "linf", "hybrid"] = "auto"
    """norm of the matched objective; auto: the optimizer's own"""
    weights: list[Literal["margin", "raw"]] = Field(
        default_factory=lambda: ["margin"],  # pyright: ignore[reportArgumentType]
        min_length=1,
    )
    """margin: the network scaled to a least margin of 1; raw: as trained"""
    alpha: list[Positive] = Field(default_factory=lambda: [300.0], min_length=1)
    """sharpness of the smoothed ReLU at a least margin of 1"""
    alpha_raw: list[Positive] = Field(default_factory=lambda: [50.0], min_length=1)
    """the same on raw weights, where a larger margin sharpens every gate"""
    balance: Literal["relative", "public"] = "relative"
    """relative: ‖θ−u‖²/‖θ‖² against the penalty on λ; public: ‖θ−u‖², another balance for each ‖θ‖"""
    lambda_min: list[Annotated[float, Field(ge=0)]] = Field(default_factory=lambda: [0.005], min_length=1)
    """least λ (no factor 1/m: the published 0.5 is 0.5/m here)"""
    lambda_init: float = Field(default=0.2, gt=0)
    """λ starts uniform in [0, lambda_init]"""
    radius: list[Positive] = Field(default_factory=lambda: [0.1, 1.0, 3.0], min_length=1)
    """initial norm of candidates over the public images'"""
    candidates: list[Positive] = Field(default_factory=lambda: [2.0], min_length=1)
    """candidates over training images, m/n"""
    lr: list[Positive] = Field(default_factory=lambda: [0.02], min_length=1)
    """of x and λ, times max(1, radius) for x"""
    seeds: int = Field(default=1, ge=1)
    """initial values per grid point"""
    prior: Literal["none", "box", "offset", "pca"] = "none"
    """box: pixels in offset ± 1; offset: start around it; pca: stay in the span of public images' components"""
    components: int = Field(default=16, ge=1)
    """principal components of the public images (prior=pca)"""
    offset: list[float] = Field(default_factory=lambda: [0.0], min_length=1)
    """pixel offsets that the attacker believes in; the others are compared with the first"""
    level: float = Field(default=1e-2, gt=0)
    """K at which the table of equal fits scores the candidates"""


class ReconstructionWandb(TypedKeys):
    """The mirror in W&B."""

    mode: Literal["auto", "online", "offline", "disabled"] = "offline"
    """where the mirror goes"""
    project: str = "optbench"
    """project in W&B"""
    entity: str | None = None
    """team or user in W&B"""


class ReconstructionConfig(job_keys.JobKeys):
    """Keys of one `optbench reconstruct` job."""

    mode: Literal["fixture", "victim"] = "victim"
    """fixture: a network in closed form; victim: trained"""
    data: Literal["digits", "mnist", "cifar10", "sphere"] = "digits"
    """digits need no file; sphere: random unit vectors, labelled by the sign of the first coordinate"""
    data_path: str | None = None
    """file or folder of mnist or cifar10"""
    dimension: int = Field(default=784, ge=2)
    """of the space of data=sphere"""
    classes: str | list[int] = "odd_even"
    """odd_even, vehicles_animals, hemispheres, or class numbers: [0,4]"""
    per_class: int = Field(default=5, ge=1)
    """training images of each class"""
    data_seed: int = Field(default=0, ge=0)
    """of the permutation from which the sets of images are cut (victim)"""
    data_sets: int = Field(default=1, ge=1)
    """disjoint sets of images, the replicates of every interval"""
    offset: float = 0.0
    """secret offset added to every pixel"""
    width: list[Annotated[int, Field(ge=1)]] = Field(default_factory=lambda: [400], min_length=1)
    """units of the hidden layers"""
    bias: bool = False
    """a bias in the first layer"""
    init_scale: float = Field(default=1e-3, gt=0)
    """standard deviation of the first layer's initial weights"""
    optimizer: list[str] = Field(default_factory=lambda: ["gd", "muon"])
    """gd or presets; options: muon.lr=… gd.lr=…"""
    steps: int = Field(default=3000, ge=1)
    """training steps of victims"""
    checkpoints: list[Annotated[int, Field(ge=1)]] | None = Field(default=None, min_length=1)
    """steps to look at; null: steps/30, steps/5, steps"""
    seed: int = Field(default=0, ge=0)
    """first seed of victims and attacks"""
    seeds: int = Field(default=1, ge=1)
    """victims per optimizer and set of images"""
    radius: list[Positive] = Field(default_factory=lambda: [1.0, 10.0, 1000.0], min_length=1)
    """radii of splits"""
    neurons: int = Field(default=8, ge=2)
    """hidden units of the fixture"""
    checkpoint: str | None = None
    """weights of your own (.safetensors, .pt) in place of a victim"""
    batch: str | None = None
    """its training batch: .npz with x (n, d) and y (n,)"""
    attack: AttackKeys = Field(default_factory=AttackKeys)
    stages: list[Literal["victim", "certificate", "alternatives", "attack"]] = Field(
        default_factory=lambda: list(STAGES)  # pyright: ignore[reportArgumentType]
    )
    """what to do; later stages take up what earlier ones left"""
    out: str | None = None
    """folder of the results; null: runs/reconstruction/MODE-IDENTITY"""
    overwrite: bool = False
    """replace results of another configuration in that folder"""
    wandb: ReconstructionWandb = Field(default_factory=ReconstructionWandb)

    @field_validator("classes", mode="before")
    @classmethod
    def _name_of_a_grouping(cls, value: Any) -> Any:
        # A single value becomes a list of one where a list is accepted, but `odd_even` is the name of two classes.
        return value[0] if isinstance(value, list) and [type(part) for part in value] == [str] else value

    @property
    def steps_to_keep(self) -> list[int]:
        """Steps of checkpoints, ascending."""
        steps = self.checkpoints or [self.steps // 30, self.steps // 5, self.steps]
        return sorted({max(1, step) for step in steps})

    @property
    def folder(self) -> Path:
        """Folder of the results: `out`, else a place of this configuration's own."""
        return Path(self.out or f"runs/reconstruction/{self.mode}-{self.identity[:6]}")

    @property
    def identity(self) -> str:
        """Hash of what changes a result."""
        content = self.model_dump(mode="json", exclude=PLACES)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def load(overrides: Sequence[str]) -> ReconstructionConfig:
    """Return the checked configuration of `key=value` arguments.

    Args:
        overrides: `experiment=NAME` takes configs/experiment/NAME.yaml first. A list is `[a,b]` or `a,b`; one value
            where a list is meant is that value alone. `OPTIMIZER.option=value` sets an optimizer's option.

    Raises:
        InputError: unknown keys, wrong values, values that exclude each other.
    """
    config = job_keys.read(
        ReconstructionConfig,
        overrides,
        command="reconstruct",
        optimizers={name: name for name in ("gd", *names())},
        defaults=lambda values: FIXTURE_DEFAULTS if values.get("mode") == "fixture" else {},
    )
    _check_optimizers(config)
    _check_combinations(config)
    return config


def help_text() -> str:
    """Return every key with default and meaning, for `optbench reconstruct --help`."""
    return job_keys.text(ReconstructionConfig)


def _check_optimizers(config: ReconstructionConfig) -> None:
    for name in config.optimizer:
        if name != "gd" and name not in names():
            raise InputError("optimizer", name, allowed=["gd", *names()], fix="optimizer=gd")
    for name, options in config.options.items():
        if name not in config.optimizer:
            reason = "is for an optimizer that is not trained"
            raise InputError(name, options, reason, allowed=config.optimizer)


def _check_combinations(config: ReconstructionConfig) -> None:
    if config.neurons % 2:
        reason = "must be even: half for each class"
        raise InputError("neurons", config.neurons, reason, fix=f"neurons={config.neurons + 1}")
    if (config.checkpoint is None) != (config.batch is None):
        key, missing = ("checkpoint", "batch") if config.batch is None else ("batch", "checkpoint")
        raise InputError(key, getattr(config, key), f"needs {missing}=FILE, too", fix=f"{missing}=FILE")
    if config.checkpoint is not None and config.mode == "fixture":
        raise InputError("checkpoint", config.checkpoint, "has no place in mode=fixture", fix="mode=victim")
    several = isinstance(config.classes, list) and len(config.classes) > 2
    if config.mode == "fixture" and (several or config.offset):
        raise InputError("mode", "fixture", "takes two classes, no offset", fix="classes=[0,4]")
    if config.data_sets > 1 and (config.checkpoint is not None or config.mode == "fixture"):
        raise InputError("data_sets", config.data_sets, "needs victims to train on each", fix="data_sets=1")
