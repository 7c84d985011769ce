"""Keys of `optbench reconstruct` with their defaults and meaning. Torch-free."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from analysis import job_keys

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


class Config(_Model):
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
    """(key, default, meaning) of every key."""
    rows: list[tuple[str, Any, str]] = []
    for name, field in Config.model_fields.items():
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


def text() -> str:
    """Every key, one a line: name, default, meaning (for `optbench reconstruct --help`)."""
    return job_keys.listed(describe())
