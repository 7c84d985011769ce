"""The keys of `optbench margin`, from words to checked settings. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from analysis import job_keys
from analysis.margin.chosen import REFERENCES
from analysis.margin.keys import KEYS, checked
from harness.config.errors import InputError, closest
from harness.config.overrides import leaves, parse
from optimizers.presets import names

LN_TAU_MAX = 300.0 * math.log(10.0)


@dataclass(frozen=True)
class Settings:
    """One `optbench margin`; `KEYS` says what each key means.

    Attributes:
        options: optimizer name or "" (all) → options (`adam.eps=…`, `optimizer.eps=…`).
        wandb_mode: the key `wandb.mode`.
    """

    mode: str = "toy"
    loss: str = "exp"
    reduction: str = "mean"
    data: Any = (1, 1)
    k: int = 2
    dim: int = 1
    init: str | None = None
    w: Any = None
    b: Any = None
    v: Any = "fixed"
    train_v: bool = False
    optimizer: tuple[str, ...] = ("gd",)
    lr: float | None = None
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: int | None = None
    join_at: int | None = None
    ln_tau_max: float = LN_TAU_MAX
    runs: int = 1
    seed: int = 0
    record: int | None = None
    dtype: str = "float64"
    grad: str = "auto"
    hidden: tuple[int, ...] = (64,)
    bias: bool = False
    max_samples: int = 100
    norms: tuple[str, ...] = ("l2", "linf")
    certify: str = "crown"
    checkpoints: str | None = None
    optimizer_label: str | None = None
    name: str | None = None
    group: str = "margin"
    runs_dir: str = "runs"
    wandb_mode: str = "auto"


_DEFAULTS = {key: getattr(Settings(), key.replace(".", "_")) for key in KEYS}


def text() -> str:
    """Every key with default and meaning (for `optbench margin --help`)."""
    return job_keys.listed((key, _DEFAULTS[key], KEYS[key].meaning) for key in KEYS)


def read(words: Sequence[str]) -> Settings:
    """Settings from `key=value` words; lists with or without brackets (`w=2,-0.5`).

    `experiment=NAME` takes the keys of configs/experiment/NAME.yaml first.

    Raises:
        InputError: an unknown key or experiment, or a value of the wrong kind.
    """
    assignments = parse([job_keys.bracketed(word) for word in words], lambda *_: None)
    given: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for assignment in assignments:
        if assignment.key == "experiment":
            given = {**leaves("", job_keys.experiment(assignment.text, "margin")), **given}
        else:
            given |= leaves(assignment.key, assignment.value)
            texts[assignment.key] = assignment.text.strip("'\"")
    values: dict[str, Any] = {"options": {}}
    for key, value in given.items():
        if key in KEYS:
            nullable = _DEFAULTS[key] is None
            values[key.replace(".", "_")] = checked(key, value, texts.get(key), nullable=nullable)
        else:
            _option(key, value, values["options"])
    return Settings(**values)


def _option(key: str, value: Any, options: dict[str, dict[str, Any]]) -> None:
    """`optimizer.eps=…` for all, `adam.eps=…` for one."""
    owner, dot, option = key.partition(".")
    optimizers = ["optimizer", *REFERENCES, *names()]
    if not dot or owner not in optimizers:
        known = [*KEYS, "experiment"]
        word = closest(key, known)
        raise InputError(key, value, "is for an unknown key", allowed=known, suggestion=word)
    options.setdefault("" if owner == "optimizer" else owner, {})[option] = value
