"""The options of all rules: one name, one meaning, one check each. Nothing here imports torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


class OptionError(ValueError):
    """An optimizer option that cannot be used.

    Attributes:
        key: the option (``"rank"``), or ``"name"`` for an unknown preset.
        value: what was given.
        reason: what is wrong with it, a clause that follows key and value (``"is larger than …"``).
        allowed: what would be accepted: a tuple of choices, or a tuple with one sentence.
        suggestion: the closest accepted spelling, or None.
    """

    def __init__(
        self,
        key: str,
        value: object,
        reason: str = "is wrong",
        allowed: Iterable[str] = (),
        suggestion: str | None = None,
    ) -> None:
        self.key, self.value, self.reason = key, value, reason
        self.allowed = tuple(allowed)
        self.suggestion = suggestion
        message = f"{key}: {value} {reason}"
        if suggestion:
            message += f"; did you mean {suggestion}?"
        if self.allowed:
            message += f"{'' if suggestion else ';'} allowed: {', '.join(self.allowed)}"
        super().__init__(message)

    def __reduce__(self) -> tuple[type[OptionError], tuple[object, ...]]:
        return type(self), (self.key, self.value, self.reason, self.allowed, self.suggestion)


@dataclass(frozen=True)
class Option:
    """One option, with one meaning in every rule that has it.

    Attributes:
        name: key in configurations and keyword of the optimizer classes.
        type: ``float``, ``int``, ``bool``, ``str`` or ``betas`` (two floats in [0, 1)).
        doc: meaning, one line.
        choices: accepted values of a ``str`` option (or of one that also takes a word, as ``nesterov``).
        minimum, maximum: inclusive bounds of a number.
        optional: None is allowed (what it means is in `doc`).
    """

    name: str
    type: str
    doc: str
    choices: tuple[Any, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    optional: bool = False

    @property
    def allowed(self) -> tuple[str, ...]:
        """What is accepted, as words for an error message."""
        if self.choices:
            words = tuple(_word(choice) for choice in self.choices)
        elif self.type == "bool":
            words = ("true", "false")
        elif self.type == "betas":
            words = ("two numbers in [0, 1)",)
        else:
            noun = "a whole number" if self.type == "int" else "a number"
            low = f" >= {self.minimum:g}" if self.minimum is not None else ""
            join = " and" if low else ""
            high = f"{join} <= {self.maximum:g}" if self.maximum is not None else ""
            words = (noun + low + high,)
        return (*words, "null") if self.optional else words

    def check(self, value: Any) -> Any:
        """`value` in its canonical type; OptionError if it is not allowed."""
        if value is None and self.optional:
            return None
        try:
            return _CHECKS[self.type](self, value)
        except (TypeError, ValueError) as error:
            if isinstance(error, OptionError):
                raise
            raise self.error(value) from None

    def error(self, value: Any) -> OptionError:
        """The OptionError for this option and a bad value, with the closest choice."""
        words = [str(choice) for choice in self.choices]
        return OptionError(
            self.name,
            value,
            "is not allowed",
            self.allowed,
            closest(value, words) if isinstance(value, str) else None,
        )


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def closest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` is most likely a misspelling of, or None."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return found[0] if found else None


def _number(option: Option, value: Any) -> float | int:
    # Tensors are let through untouched: torch accepts a 0-dim tensor as a learning rate.
    if hasattr(value, "ndim") and getattr(value, "ndim", 1) == 0 and option.name in ("lr", "aux_lr"):
        return value
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
        raise option.error(value)
    if option.type == "int" and float(value) != int(value):
        raise option.error(value)
    number = int(value) if option.type == "int" else float(value)
    below = option.minimum is not None and number < option.minimum
    above = option.maximum is not None and number > option.maximum
    if not math.isfinite(number) or below or above:
        raise option.error(value)
    return number


def _bool(option: Option, value: Any) -> bool:
    if not isinstance(value, bool):
        raise option.error(value)
    return value


def _choice(option: Option, value: Any) -> Any:
    for choice in option.choices:
        # `1 == True` in Python; only a real bool may mean true.
        if type(choice) is type(value) and choice == value:
            return choice
    raise option.error(value)


def _betas(option: Option, value: Any) -> tuple[float, float]:
    pair = tuple(float(item) for item in value if not isinstance(item, (bool, str)))
    if len(pair) != 2 or len(tuple(value)) != 2 or not all(0 <= item < 1 for item in pair):
        raise option.error(value)
    return pair[0], pair[1]


_CHECKS: dict[str, Callable[[Option, Any], Any]] = {
    "float": _number,
    "int": _number,
    "bool": _bool,
    "str": _choice,
    "betas": _betas,
}

_POLAR_METHODS = ("auto", "svd", "qr_svd", "gram", "dwh", "newton_schulz", "cubic", "polar_express")

OPTIONS: dict[str, Option] = {
    option.name: option
    for option in (
        Option("lr", "float", "peak learning rate of the matrix rule", minimum=0),
        Option("weight_decay", "float", "decoupled decay: the weight times 1 − lr·weight_decay", minimum=0),
        Option(
            "decay_order",
            "str",
            "weight decay acts on the weight before or after the step",
            choices=("before", "after"),
        ),
        Option("momentum", "float", "μ, decay of the moment", minimum=0, maximum=0.9999999),
        Option(
            "momentum_form",
            "str",
            "sum: M ← μM + G; ema: M ← μM + (1 − μ)G (the same direction, another length)",
            choices=("sum", "ema"),
        ),
        Option(
            "nesterov",
            "str",
            "look ahead once more along the moment; stored: the look-ahead replaces the moment in the state",
            choices=(False, True, "stored"),
        ),
        Option(
            "rank",
            "int",
            "r, dimension of the subspace; null: a quarter of each matrix's short side",
            minimum=1,
            optional=True,
        ),
        Option("refresh_interval", "int", "K, steps between new subspaces", minimum=1),
        Option(
            "refresh_offset",
            "int",
            "refresh when (t + offset) mod K = 0, t = 0, 1, …, and at t = 0",
            minimum=0,
        ),
        Option(
            "refresh_stagger",
            "bool",
            "spread the refreshes of the matrices evenly over the interval (the first one stays at t = 0)",
        ),
        Option(
            "refresh_threshold",
            "float",
            "ς: a step with ‖Ĝ‖_F ≤ ς takes a new subspace too (decided on the device); null: off",
            minimum=0,
            optional=True,
        ),
        Option(
            "side",
            "str",
            "side of the matrix that the moment keeps: short (Algorithm 1 of SUMO), long (GaLore std)",
            choices=("short", "long"),
        ),
        Option(
            "basis",
            "str",
            "how the subspace is found: exact truncated SVD, or a randomized range finder",
            choices=("svd", "randomized"),
        ),
        Option("transport", "bool", "carry the moment into a new subspace by R = Q_newᵀ Q_old"),
        Option(
            "orthogonalizer",
            "str",
            "method of the polar factor; auto is exact",
            choices=_POLAR_METHODS,
        ),
        Option(
            "orthogonalizer_steps",
            "int",
            "iterations of newton_schulz, cubic and polar_express",
            minimum=1,
            maximum=100,
        ),
        Option(
            "orthogonalizer_dtype",
            "str",
            "arithmetic of newton_schulz, cubic and polar_express; auto: bfloat16 where the hardware multiplies it, "
            "else float32 (written into the group at construction)",
            choices=("auto", "float32", "bfloat16"),
        ),
        Option(
            "update_scale",
            "str",
            "factor on the orthogonal part: none; rms_max 0.2·√max(m, n); rows_cols √max(1, m/n); "
            "rms_rank 0.2·√(mn/r)",
            choices=("none", "rms_max", "rows_cols", "rms_rank"),
        ),
        Option(
            "residual_scale",
            "float",
            "factor on the gradient outside the subspace, G − QQᵀG (0: dropped)",
            minimum=0,
        ),
        Option("alpha", "float", "factor on the whole matrix update (not on the weight decay)", minimum=0),
        Option(
            "norm_growth_limit",
            "float",
            "γ: the target's norm grows at most by this factor a step; null: off",
            minimum=1,
            optional=True,
        ),
        Option(
            "norm_growth_target",
            "str",
            "what γ limits: the orthogonal factor O, the residual G − QQᵀG, or the whole update",
            choices=("factor", "residual", "total"),
        ),
        Option("betas", "betas", "decay rates of the first and second moment"),
        Option("eps", "float", "added to the root of the second moment", minimum=0),
        Option(
            "eps_form",
            "str",
            "corrected: √v̂ + eps (torch); raw: √v + eps before bias correction (Hugging Face, galore-torch)",
            choices=("corrected", "raw"),
        ),
        Option(
            "aux_lr",
            "float",
            "learning rate of AdamW on what takes no matrix rule; null: the same as lr",
            minimum=0,
            optional=True,
        ),
        Option("aux_scheduled", "bool", "a scheduler moves aux_lr too"),
        Option("aux_betas", "betas", "betas of that AdamW"),
        Option("aux_eps", "float", "eps of that AdamW", minimum=0),
        Option(
            "aux_eps_form",
            "str",
            "as eps_form, of that AdamW",
            choices=("corrected", "raw"),
        ),
        Option(
            "aux_weight_decay",
            "float",
            "weight decay of that AdamW",
            minimum=0,
        ),
        Option(
            "rounding",
            "str",
            "how an fp32 update lands in bf16 or fp16 weights: nearest; stochastic; kahan "
            "(with a compensation of the weight's size in the state)",
            choices=("nearest", "stochastic", "kahan"),
        ),
        Option("seed", "int", "seed of the randomized basis and of stochastic rounding", minimum=0),
    )
}
