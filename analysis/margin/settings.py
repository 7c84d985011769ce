"""The keys of `optbench margin`, from words to checked settings. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import yaml

from analysis.margin.chosen import REFERENCES
from harness.config import sources
from harness.config.errors import InputError, closest
from harness.config.overrides import leaves, parse
from optimizers.presets import names

MODES = ("toy", "flow", "mlp", "head")
LN_TAU_MAX = 300.0 * math.log(10.0)
RANDOM = ("he", "gauss")


@dataclass(frozen=True)
class Settings:
    """One `optbench margin`.

    Attributes:
        mode: "toy" (optimizer steps on two neurons, or more), "flow" (gradient flow in log-time), "mlp" (a ReLU
            network on digits), "head" (the last layer of a checkpoint).
        loss, reduction: "exp" or "logistic"; "mean" or "sum" over points.
        data: toy: two numbers a,c for the points -a and c, or a CSV file of points. head: a text file.
        k, dim: neurons and dimension of the points.
        init: "explicit" (w, b), "he" (w ~ N(0, 2/dim), b = 0), "gauss" (w, b ~ N(0, 1)), "thesis" (w = (1, -10),
            b = (1, 10)).
        w, b, v: weights of the first layer, biases, output weights. v: "fixed" (+1 for the first half, -1 for the
            second), "trained" (from there), or k numbers.
        train_v: train v from the numbers given.
        optimizer: names, references or presets.
        lr: learning rate; NAME.lr for one optimizer.
        options: optimizer name or "" (all) → options.
        steps: optimizer steps.
        join_at: flow starts at the state that gradient descent reached after so many steps.
        ln_tau_max: ln of the last flow time.
        runs, seed: random starts, and the seed they are drawn with.
        record: states kept per decade; None: 20, or 4 in flow and with many runs.
        dtype: "float64" or "float32".
        grad: "raw", "log" (of ln L, scale-free) or "auto".
        hidden, bias: widths of the hidden layers of the MLP, and whether it has biases.
        max_samples: test points per checkpoint that are attacked and certified.
        norms: of input perturbations: "l2", "linf".
        certify: "none", "ibp" or "crown".
        checkpoints: pattern of checkpoint folders or files; the step is in the name.
        optimizer_label: what the checkpoints were trained with.
        name, group, runs_dir: where the files go: runs_dir/group/name.
        wandb_mode: "auto", "online", "offline" or "disabled".
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


class _Rule(NamedTuple):
    """Type of a key's value, with choices or a least value."""

    kind: str
    choices: tuple[str, ...] = ()
    least: float | None = None


_RULES: dict[str, _Rule] = {
    "mode": _Rule("word", MODES),
    "loss": _Rule("word", ("exp", "logistic")),
    "reduction": _Rule("word", ("mean", "sum")),
    "init": _Rule("word", ("explicit", *RANDOM, "thesis")),
    "dtype": _Rule("word", ("float64", "float32")),
    "grad": _Rule("word", ("auto", "raw", "log")),
    "certify": _Rule("word", ("none", "ibp", "crown")),
    "wandb.mode": _Rule("word", ("auto", "online", "offline", "disabled")),
    "k": _Rule("int", least=1),
    "dim": _Rule("int", least=1),
    "steps": _Rule("int", least=1),
    "join_at": _Rule("int", least=10),
    "runs": _Rule("int", least=1),
    "seed": _Rule("int", least=0),
    "record": _Rule("int", least=1),
    "max_samples": _Rule("int", least=1),
    "lr": _Rule("positive"),
    "ln_tau_max": _Rule("number"),
    "train_v": _Rule("bool"),
    "bias": _Rule("bool"),
    "optimizer": _Rule("words"),
    "norms": _Rule("words", ("l2", "linf")),
    "hidden": _Rule("ints", least=1),
    "data": _Rule("any"),
    "w": _Rule("any"),
    "b": _Rule("any"),
    "v": _Rule("any"),
    "checkpoints": _Rule("text"),
    "optimizer_label": _Rule("text"),
    "name": _Rule("text"),
    "group": _Rule("text"),
    "runs_dir": _Rule("text"),
}
NULLABLE = ("steps", "join_at", "record", "lr", "init", "w", "b", "checkpoints", "optimizer_label", "name")


def read(words: Sequence[str]) -> Settings:
    """Settings from `key=value` words; lists with or without brackets (`w=2,-0.5`).

    `experiment=NAME` takes the keys of configs/experiment/NAME.yaml first.

    Raises:
        InputError: an unknown key or experiment, or a value of the wrong kind.
    """
    assignments = parse([_bracketed(word) for word in words], lambda word, following: None)
    given: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for assignment in assignments:
        if assignment.key == "experiment":
            given = {**_experiment(assignment.text), **given}
        else:
            given |= leaves(assignment.key, assignment.value)
            texts[assignment.key] = assignment.text.strip("'\"")
    values: dict[str, Any] = {"options": {}}
    for key, value in given.items():
        if key in _RULES:
            values[key.replace(".", "_")] = _checked(key, value, texts.get(key))
        else:
            _option(key, value, values["options"])
    known = {f.name for f in fields(Settings)}
    assert set(values) <= known, set(values) - known
    return Settings(**values)


def _bracketed(word: str) -> str:
    """`w=2,-0.5` as `w=[2,-0.5]`, which is what Hydra's grammar calls a list."""
    key, equals, text = word.partition("=")
    is_list = equals and "," in text and text[0] not in "[{'\"("
    return f"{key}=[{text}]" if is_list else word


def _experiment(name: str) -> dict[str, Any]:
    path = sources.find("experiment", name)
    ours = [option for option in sources.options("experiment") if option.startswith("margin")]
    if path is None:
        raise InputError("experiment", name, allowed=ours)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError("experiment", path, f"is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict) or "mode" not in values:
        raise InputError("experiment", name, "is not one of margin: it has no mode", allowed=ours)
    return leaves("", values)


def _option(key: str, value: Any, options: dict[str, dict[str, Any]]) -> None:
    """`optimizer.eps=…` for all, `adam.eps=…` for one."""
    owner, dot, option = key.partition(".")
    optimizers = ["optimizer", *REFERENCES, *names()]
    if not dot or owner not in optimizers:
        known = [*_RULES, "experiment"]
        word = closest(key, known)
        raise InputError(key, value, "is for an unknown key", allowed=known, suggestion=word)
    options.setdefault("" if owner == "optimizer" else owner, {})[option] = value


def _checked(key: str, value: Any, text: str | None) -> Any:
    rule = _RULES[key]
    if value is None:
        if key in NULLABLE:
            return None
        raise InputError(key, "null", "is no value")
    result, allowed = _KINDS[rule.kind](value, text)
    if result is not None and rule.choices:
        wrong = [w for w in (result if isinstance(result, tuple) else (result,)) if w not in rule.choices]
        if wrong:
            raise InputError(key, wrong[0], allowed=rule.choices)
    if result is not None and rule.least is not None:
        allowed = f"{allowed} >= {rule.least:g}"
        result = (
            result
            if all(n >= rule.least for n in (result if isinstance(result, tuple) else (result,)))
            else None
        )
    if result is None:
        raise InputError(key, text if text is not None else value, allowed=allowed)
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
