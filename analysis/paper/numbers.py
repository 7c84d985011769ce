"""Numbers as papers print them: with their rounding, or as a formula in m, n, r."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Grade = Literal["agrees", "close", "differs"]

_TERM = re.compile(r"(\d*)((?:[a-z]²?)+)")


@dataclass(frozen=True)
class Printed:
    """A printed number.

    Attributes:
        text: as printed.
        value: of the text.
        half: half a unit of the last printed digit.
    """

    text: str
    value: float
    half: float

    @classmethod
    def of(cls, text: str) -> Printed:
        """Read a number with its digits.

        Raises:
            ValueError: the text is no plain decimal number.
        """
        if not re.fullmatch(r"\d+(\.\d+)?", text):
            raise ValueError(f"{text!r} is no decimal number as printed, e.g. '34.06'")
        return cls(text, float(text), 0.5 * 10.0 ** -len(text.partition(".")[2]))

    def grade(self, value: float, tolerance: float) -> Grade:
        """How a value stands to the printed one.

        Args:
            value: in the same unit.
            tolerance: relative.

        Returns:
            ``agrees``: it would be printed so. ``close``: it is within the tolerance of a value that would.
        """
        # A number on the very edge, 0.125 for 0.12 and 0.13, agrees with both whatever its binary form.
        distance = abs(value - self.value) - 1e-9 * max(1.0, self.value)
        if distance <= self.half:
            return "agrees"
        return "close" if distance <= self.half + tolerance * self.value else "differs"

    def like(self, value: float) -> str:
        """A value with one digit more than is printed, so that the rounding can be seen."""
        digits = len(self.text.partition(".")[2])
        return f"{value:,.{digits + 1}f}" if digits else f"{value:,.0f}"


def evaluate(formula: str, values: Mapping[str, int]) -> int:
    """A sum of products of letters, as ``2nr + mr`` or ``m² + n²``.

    Args:
        formula: as printed.
        values: letter → value.

    Raises:
        ValueError: another formula, or a letter without a value.
    """
    total = 0
    for term in formula.split("+"):
        match = _TERM.fullmatch(term.strip())
        if match is None:
            raise ValueError(f"{formula!r} is no sum of products such as 2nr + mr")
        product = int(match[1] or 1)
        for letter, square in re.findall(r"([a-z])(²?)", match[2]):
            if letter not in values:
                raise ValueError(f"{formula!r} needs a value for {letter}")
            product *= values[letter] ** (2 if square else 1)
        total += product
    return total
