"""Keys of `optbench margin`: types, bounds, defaults and meaning. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from analysis import job_keys
from analysis.margin.optimizer_specs import REFERENCES
from harness.config.typed_keys import TypedKeys
from optimizers.presets import names

RANDOM_INITS = ("he", "gauss")
LN_TAU_MAX = 300.0 * math.log(10.0)
JOIN_AT = 100_000
"""Steps of gradient descent before its flow, where neither mode nor steps are given."""
Norm = Literal["l2", "linf"]


class MarginWandb(TypedKeys):
    """The mirror in W&B."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """mirror in W&B: auto, online, offline, disabled"""


class MarginConfig(job_keys.JobKeys):
    """Keys of one `optbench margin` job."""

    mode: Literal["toy", "flow", "disks", "mlp", "head"] | None = None
    """toy: optimizer steps on a small ReLU net and two points; flow: gradient flow in log-time; disks: wide nets on two
    balls of points; mlp: a ReLU network on digits; head: predictions of checkpoints; null: flow after 100,000 steps
    for gradient descent alone, else toy"""
    loss: Literal["exp", "logistic"] = "exp"
    """exp or logistic"""
    reduction: Literal["mean", "sum"] = "mean"
    """mean or sum over points"""
    data: Any = (1, 1)
    """a,c for the points -a and c, or a CSV file with a row x1, …, xd, y per point; head: a text file (Hugging Face
    folders need one)"""
    k: int = Field(default=2, ge=1)
    """neurons"""
    dim: int = Field(default=1, ge=1)
    """dimension of the two points"""
    init: Literal["explicit", "he", "gauss", "thesis"] | None = None
    """explicit: w and b; he: w ~ N(0, 2/dim), b = 0; gauss: w, b ~ N(0, 1); thesis: w = (1, -10), b = (1, 10);
    null: explicit for one run of two neurons, else he"""
    w: Any = None
    """first layer: a number per neuron, or a list of dim numbers; null: 2,-0.5"""
    b: Any = None
    """biases, a number per neuron; null: 0"""
    v: Any = "fixed"
    """output weights: fixed (+1 for the first half, -1 for the second), trained (from there), or numbers"""
    train_v: bool = False
    """train v from the numbers given"""
    optimizer: list[str] = Field(default_factory=lambda: ["gd"], min_length=1)
    """names by commas: gd, ngd (steps of equal length), sign, spectral, adam, or any of `optbench list`"""
    lr: float | None = Field(default=None, gt=0)
    """learning rate of all; NAME.lr for one; null: 0.01, in mlp one for each optimizer"""
    steps: int | None = Field(default=None, ge=1)
    """optimizer steps; null: 100,000, in mlp 2,000"""
    join_at: int | None = Field(default=None, ge=10)
    """flow starts at the state that gradient descent reached after so many steps"""
    ln_tau_max: float = LN_TAU_MAX
    """flow: ln of the last time"""
    runs: int = Field(default=1, ge=1)
    """random starts"""
    seed: int = Field(default=0, ge=0)
    """of random starts, networks and attacks"""
    record: int | None = Field(default=None, ge=1)
    """states kept per decade; null: 20, in flow and with many runs 4, in mlp 2"""
    dtype: Literal["float64", "float32"] = "float64"
    """float64 or float32 (toy; flagged where rounding holds weights still)"""
    grad: Literal["auto", "raw", "log"] = "auto"
    """raw; log: gradients of ln loss; auto: raw for gradient descent and Adam, log for rules that ignore scale"""
    hidden: list[Annotated[int, Field(ge=1)]] = Field(default_factory=lambda: [64], min_length=1)
    """mlp: widths of the hidden layers"""
    bias: bool = False
    """mlp: whether it has biases"""
    max_samples: int = Field(default=100, ge=1)
    """mlp: test points that are attacked and certified"""
    norms: list[Norm] = Field(default_factory=lambda: ["l2", "linf"], min_length=1)
    """of perturbations: l2, linf; the first is the one of headline and plots"""
    certify: Literal["none", "ibp", "crown"] = "crown"
    """mlp: lower bounds by crown, ibp, or none"""
    checkpoints: str | None = None
    """head: pattern of checkpoint folders, in quotes: "checkpoints='runs/GROUP/NAME/checkpoints/step_*'\""""
    optimizer_label: str | None = None
    """head: what trained them; null: as their config says"""
    points: int = Field(default=20, ge=1)
    """disks: points in each ball"""
    radius: float = Field(default=0.5, ge=0)
    """disks: of the balls, whose nearest points are -1 and 1 on the first axis"""
    name: str | None = None
    """of the folder; null: from mode and optimizers"""
    group: str = "margin"
    """folder above it"""
    runs_dir: str = "runs"
    """folder above that"""
    wandb: MarginWandb = Field(default_factory=MarginWandb)

    @field_validator("optimizer", "norms")
    @classmethod
    def _each_once(cls, names: list[str]) -> list[str]:
        return list(dict.fromkeys(names))

    def settings(self) -> dict[str, Any]:
        """Return the keys and values as summary.json, W&B and the names of default folders have them."""
        values: dict[str, Any] = {}
        for key, value in self.model_dump(exclude={"options", "wandb"}).items():
            values[key] = value
            if key == "lr":
                values["options"] = self.options
        return {**values, "wandb_mode": self.wandb.mode}


def load(overrides: Sequence[str]) -> MarginConfig:
    """Return the configuration of `key=value` arguments; lists with or without brackets (`w=2,-0.5`).

    `experiment=NAME` takes the keys of configs/experiment/NAME.yaml first; `optimizer.eps=…` sets an option of all
    optimizers, `adam.eps=…` of one.

    Raises:
        InputError: an unknown key or experiment, or a value of the wrong kind.
    """
    prefixes = {"optimizer": "", **{name: name for name in (*REFERENCES, *names())}}
    config = job_keys.read(MarginConfig, overrides, command="margin", optimizers=prefixes)
    if config.mode is not None:
        return config
    follows = config.optimizer == ["gd"] and config.steps is None and config.dtype == "float64"
    if not follows:
        return config.model_copy(update={"mode": "toy"})
    # Many starts take flow from step 0: their dead are counted, and no learning rate is in the way.
    join_at = JOIN_AT if config.join_at is None and config.runs == 1 else config.join_at
    return config.model_copy(update={"mode": "flow", "join_at": join_at})


def help_text() -> str:
    """Return every key with default and meaning, for `optbench margin --help`."""
    return job_keys.text(MarginConfig)
