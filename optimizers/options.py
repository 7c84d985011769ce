"""What an option is, how its value is checked, and how a dataclass declares it. Nothing here imports torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from optimizers.module_patterns import NAMED


class OptionError(ValueError):
    """An optimizer option that cannot be used.

    Attributes:
        key: the option (``"rank"``), or ``"name"`` for an unknown preset.
        value: the value that cannot be used.
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
        type: ``float``, ``int``, ``bool``, ``str``, ``betas`` (two floats in [0, 1)) or ``patterns`` (texts, or the
            name of a known list of them).
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
        """Return the accepted values, as text for an error message."""
        if self.choices:
            words = tuple(option_word(choice) for choice in self.choices)
        elif self.type == "bool":
            words = ("true", "false")
        elif self.type == "betas":
            words = ("two numbers in [0, 1)",)
        elif self.type == "patterns":
            words = ("a list of parts of module names, e.g. [query, key]", *NAMED)
        else:
            noun = "a whole number" if self.type == "int" else "a number"
            low = f" >= {self.minimum:g}" if self.minimum is not None else ""
            join = " and" if low else ""
            high = f"{join} <= {self.maximum:g}" if self.maximum is not None else ""
            words = (noun + low + high,)
        return (*words, "null") if self.optional else words

    def check(self, value: Any) -> Any:
        """Return `value` in its canonical type.

        Raises:
            OptionError: the value is not allowed.
        """
        if value is None and self.optional:
            return None
        try:
            return _CHECKS[self.type](self, value)
        except (TypeError, ValueError) as error:
            if isinstance(error, OptionError):
                raise
            raise self.error(value) from None

    def error(self, value: Any, names: Iterable[str] | None = None) -> OptionError:
        """Return the OptionError for this option and a bad value, with the closest of its choices, or of ``names``."""
        words = [str(choice) for choice in self.choices] if names is None else list(names)
        return OptionError(
            self.name,
            value,
            "is not allowed",
            self.allowed,
            closest(value, words) if isinstance(value, str) else None,
        )


def option_word(value: Any) -> str:
    """Return a value as people write it in a configuration."""
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return f"({', '.join(map(option_word, value))})"
    return (
        f"{value:.6g}"
        if isinstance(value, float)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )


def closest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that `word` is most likely a misspelling of, or None."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return matches[0] if matches else None


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


def _patterns(option: Option, value: Any) -> tuple[str, ...] | None:
    if isinstance(value, str) and value in NAMED:
        return NAMED[value]
    items = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else []
    # A name of a list is one word; anything with a dot or a wildcard can only be a pattern.
    is_word = isinstance(value, str) and value.isidentifier()
    if is_word or not items or not all(isinstance(item, str) and item.strip() for item in items):
        raise option.error(value, NAMED)
    return tuple(dict.fromkeys(items))


_CHECKS: dict[str, Callable[[Option, Any], Any]] = {
    "float": _number,
    "int": _number,
    "bool": _bool,
    "str": _choice,
    "betas": _betas,
    "patterns": _patterns,
}


def option(default: Any, doc: str, *, minimum: float | None = None, maximum: float | None = None) -> Any:
    """Declare a field of an options dataclass.

    Args:
        default: its value where no preset gives another.
        doc: meaning, one line.
        minimum, maximum: inclusive bounds of a number.
    """
    return field(default=default, metadata={"doc": doc, "minimum": minimum, "maximum": maximum})


def declared(cls: type) -> dict[str, Option]:
    """Return the options that a dataclass declares, by name: types from annotations, the rest from `option`.

    A ``Literal`` becomes choices, ``| None`` makes an option optional, a pair of floats is of type ``betas`` and any
    number of texts of type ``patterns``.
    """
    hints = get_type_hints(cls)
    return {f.name: _of_annotation(f.name, hints[f.name], f.metadata) for f in fields(cls)}


def _of_annotation(name: str, annotation: Any, metadata: Mapping[str, Any]) -> Option:
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    is_optional = isinstance(annotation, UnionType)
    choices: tuple[Any, ...] = ()
    if get_origin(annotation) is Literal:
        type_name, choices = "str", get_args(annotation)
    elif get_origin(annotation) is tuple:
        type_name = "betas"
    elif is_optional and get_origin(kinds[0]) is tuple:
        type_name = "patterns"
    else:
        type_name = (kinds[0] if is_optional else annotation).__name__
    return Option(name, type_name, choices=choices, optional=is_optional, **metadata)
