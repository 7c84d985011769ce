"""Keys of `optbench margin`, and the way from command-line arguments to a checked configuration. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from analysis import job_keys
from analysis.margin.optimizer_specs import REFERENCES
from harness.config.overrides import leaves, parse
from harness.errors import InputError, closest
from optimizers.presets import names

MODES = ("toy", "flow", "mlp", "head")
RANDOM_INITS = ("he", "gauss")


class Key(NamedTuple):
    """A key: what it means, the type of its value, and the choices or the least value if there are such."""

    meaning: str
    kind: str
    choices: tuple[str, ...] = ()
    least: float | None = None


KEYS: Mapping[str, Key] = {
    "mode": Key(
        "toy: optimizer steps on a small ReLU net and two points; flow: gradient flow in log-time; mlp: a ReLU network "
        "on digits; head: the last layer of checkpoints",
        "word",
        MODES,
    ),
    "loss": Key("exp or logistic", "word", ("exp", "logistic")),
    "reduction": Key("mean or sum over points", "word", ("mean", "sum")),
    "data": Key(
        "a,c for the points -a and c, or a CSV file with a row x1, …, xd, y per point; head: a text file "
        "(Hugging Face folders need one)",
        "any",
    ),
    "k": Key("neurons", "int", least=1),
    "dim": Key("dimension of the two points", "int", least=1),
    "init": Key(
        "explicit: w and b; he: w ~ N(0, 2/dim), b = 0; gauss: w, b ~ N(0, 1); thesis: w = (1, -10), b = (1, 10); "
        "null: explicit for one run of two neurons, else he",
        "word",
        ("explicit", *RANDOM_INITS, "thesis"),
    ),
    "w": Key("first layer: a number per neuron, or a list of dim numbers; null: 2,-0.5", "any"),
    "b": Key("biases, a number per neuron; null: 0", "any"),
    "v": Key(
        "output weights: fixed (+1 for the first half, -1 for the second), trained (from there), or numbers",
        "any",
    ),
    "train_v": Key("train v from the numbers given", "bool"),
    "optimizer": Key(
        "names by commas: gd, ngd (steps of equal length), sign, spectral, adam, or any of `optbench list`",
        "words",
    ),
    "lr": Key("learning rate of all; NAME.lr for one; null: 0.01, in mlp one for each optimizer", "positive"),
    "steps": Key("optimizer steps; null: 100,000, in mlp 2,000", "int", least=1),
    "join_at": Key(
        "flow starts at the state that gradient descent reached after so many steps", "int", least=10
    ),
    "ln_tau_max": Key("flow: ln of the last time", "number"),
    "runs": Key("random starts", "int", least=1),
    "seed": Key("of random starts, networks and attacks", "int", least=0),
    "record": Key("states kept per decade; null: 20, in flow and with many runs 4, in mlp 2", "int", least=1),
    "dtype": Key(
        "float64 or float32 (toy; flagged where rounding holds weights still)", "word", ("float64", "float32")
    ),
    "grad": Key(
        "raw; log: gradients of ln loss; auto: raw for gradient descent and Adam, log for rules that ignore scale",
        "word",
        ("auto", "raw", "log"),
    ),
    "hidden": Key("mlp: widths of the hidden layers", "ints", least=1),
    "bias": Key("mlp: whether it has biases", "bool"),
    "max_samples": Key(
        "mlp: test points that are attacked and certified; head: tokens of the ℓ∞ margin", "int", least=1
    ),
    "norms": Key(
        "of perturbations: l2, linf; the first is the one of headline and plots", "words", ("l2", "linf")
    ),
    "certify": Key("mlp: lower bounds by crown, ibp, or none", "word", ("none", "ibp", "crown")),
    "checkpoints": Key(
        "head: pattern of checkpoint folders, in quotes: \"checkpoints='runs/GROUP/NAME/checkpoints/step_*'\"",
        "text",
    ),
    "optimizer_label": Key("head: what trained them; null: as their config says", "text"),
    "name": Key("of the folder; null: from mode and optimizers", "text"),
    "group": Key("folder above it", "text"),
    "runs_dir": Key("folder above that", "text"),
    "wandb.mode": Key(
        "mirror in W&B: auto, online, offline, disabled", "word", ("auto", "online", "offline", "disabled")
    ),
}


def check_value(name: str, value: Any, text: str | None, *, nullable: bool) -> Any:
    """Return a value converted to the type of its key.

    Args:
        name: one of `KEYS`.
        value: as parsed.
        text: as written, if it was.
        nullable: null is a value.

    Raises:
        InputError: wrong type, choice or size.
    """
    key = KEYS[name]
    if value is None:
        if nullable:
            return None
        raise InputError(name, "null", "is no value")
    result, allowed = _KINDS[key.kind](value, text)
    if result is not None and key.choices:
        wrong = [w for w in (result if isinstance(result, tuple) else (result,)) if w not in key.choices]
        if wrong:
            raise InputError(name, wrong[0], allowed=key.choices)
    if result is not None and key.least is not None:
        allowed = f"{allowed} >= {key.least:g}"
        result = (
            result
            if all(n >= key.least for n in (result if isinstance(result, tuple) else (result,)))
            else None
        )
    if result is None:
        raise InputError(name, text if text is not None else value, allowed=allowed)
    return result


def _number(value: Any, text: str | None) -> tuple[float | None, str]:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return (float(value) if is_number else None), "a number"


def _positive(value: Any, text: str | None) -> tuple[float | None, str]:
    number, _ = _number(value, text)
    return (number if number is not None and number > 0.0 else None), "a number > 0"


def _int(value: Any, text: str | None) -> tuple[int | None, str]:
    number, _ = _number(value, text)
    return (int(number) if number is not None and number == int(number) else None), "a whole number"


def _ints(value: Any, text: str | None) -> tuple[tuple[int, ...] | None, str]:
    entries = [_int(entry, None)[0] for entry in (value if isinstance(value, list) else [value])]
    found = tuple(entry for entry in entries if entry is not None)
    return (found if found and len(found) == len(entries) else None), "whole numbers"


def _words(value: Any, text: str | None) -> tuple[tuple[str, ...] | None, str]:
    entries = value if isinstance(value, list) else [value]
    is_words = bool(entries) and all(isinstance(entry, str) for entry in entries)
    return (tuple(dict.fromkeys(entries)) if is_words else None), "names"


def _word(value: Any, text: str | None) -> tuple[str | None, str]:
    return (value if isinstance(value, str) else text), "a word"


def _bool(value: Any, text: str | None) -> tuple[bool | None, str]:
    return (value if isinstance(value, bool) else None), "true or false"


_KINDS: Mapping[str, Any] = {
    "word": _word,
    "text": _word,
    "words": _words,
    "int": _int,
    "ints": _ints,
    "number": _number,
    "positive": _positive,
    "bool": _bool,
    "any": lambda value, text: (value, ""),
}


LN_TAU_MAX = 300.0 * math.log(10.0)


@dataclass(frozen=True)
class MarginConfig:
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


_DEFAULTS = {key: getattr(MarginConfig(), key.replace(".", "_")) for key in KEYS}


def help_text() -> str:
    """Return every key with default and meaning, for `optbench margin --help`."""
    return job_keys.listed((key, _DEFAULTS[key], KEYS[key].meaning) for key in KEYS)


def load(overrides: Sequence[str]) -> MarginConfig:
    """Return the configuration of `key=value` arguments; lists with or without brackets (`w=2,-0.5`).

    `experiment=NAME` takes the keys of configs/experiment/NAME.yaml first.

    Raises:
        InputError: an unknown key or experiment, or a value of the wrong kind.
    """
    assignments = parse([job_keys.bracketed(argument) for argument in overrides], lambda *_: None)
    flat: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for assignment in assignments:
        if assignment.key == "experiment":
            flat = {**leaves("", job_keys.experiment(assignment.text, "margin")), **flat}
        else:
            flat |= leaves(assignment.key, assignment.value)
            texts[assignment.key] = assignment.text.strip("'\"")
    values: dict[str, Any] = {"options": {}}
    for key, value in flat.items():
        if key in KEYS:
            nullable = _DEFAULTS[key] is None
            values[key.replace(".", "_")] = check_value(key, value, texts.get(key), nullable=nullable)
        else:
            _option(key, value, values["options"])
    return MarginConfig(**values)


def _option(key: str, value: Any, options: dict[str, dict[str, Any]]) -> None:
    """Add an option of all optimizers (`optimizer.eps=…`) or of one (`adam.eps=…`)."""
    owner, dot, option = key.partition(".")
    optimizers = ["optimizer", *REFERENCES, *names()]
    if not dot or owner not in optimizers:
        known = [*KEYS, "experiment"]
        word = closest(key, known)
        raise InputError(key, value, "is for an unknown key", allowed=known, suggestion=word)
    options.setdefault("" if owner == "optimizer" else owner, {})[option] = value
