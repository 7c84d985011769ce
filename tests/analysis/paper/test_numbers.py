"""Printed numbers and formulas, against arithmetic by hand."""

from __future__ import annotations

import pytest

from analysis.paper.cells import OwnValue, judge
from analysis.paper.tables import PrintedNumber, evaluate


@pytest.mark.parametrize(
    ("text", "value", "tolerance", "grade"),
    [
        ("1.16", 1.1551, 0.0, "agrees"),
        ("1.16", 1.1549, 0.0, "differs"),
        ("1.16", 1.1549, 0.01, "close"),
        ("1.16", 1.16 + 0.005 + 0.0116, 0.01, "close"),
        ("1.16", 1.16 + 0.005 + 0.0117, 0.01, "differs"),
        ("1.16", 1.1434, 0.01, "close"),
        ("1.16", 1.1433, 0.01, "differs"),
        ("0.12", 0.125, 0.0, "agrees"),
        ("0.13", 0.125, 0.0, "agrees"),
        ("29.7", 29.74, 0.0, "agrees"),
        ("29.70", 29.74, 0.0, "differs"),
        ("253", 253.4, 0.0, "agrees"),
        ("1662976", 1662977.0, 0.0, "differs"),
    ],
)
def test_grades(text: str, value: float, tolerance: float, grade: str) -> None:
    assert PrintedNumber.of(text).grade(value, tolerance) == grade


@pytest.mark.parametrize("text", ["", "1e3", "-1.0", "1,000", "0.36G", "nan", "1."])
def test_what_is_no_printed_number(text: str) -> None:
    with pytest.raises(ValueError, match="decimal number"):
        PrintedNumber.of(text)


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("nr + mr", 3 * 2 + 5 * 2),
        ("2nr + mr", 2 * 3 * 2 + 5 * 2),
        ("2mn", 2 * 5 * 3),
        ("m² + n²", 25 + 9),
        ("2mn + 2m² + 2n²", 30 + 50 + 18),
    ],
)
def test_formulas(formula: str, expected: int) -> None:
    assert evaluate(formula, {"m": 5, "n": 3, "r": 2}) == expected


@pytest.mark.parametrize(
    ("formula", "match"),
    [
        ("O(mnr)", "sum of products"),
        ("m - n", "sum of products"),
        ("", "sum of products"),
        ("mk", "value for k"),
    ],
)
def test_what_is_no_formula(formula: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        evaluate(formula, {"m": 5, "n": 3, "r": 2})


def test_the_worst_value_decides_and_every_one_that_differs_needs_its_reason() -> None:
    printed = PrintedNumber.of("1.16")
    good, near, excused, bad = (
        OwnValue(1.16, None),
        OwnValue(1.166, None),
        OwnValue(2.0, "because"),
        OwnValue(3.0, None),
    )
    assert judge(printed, [], 0.01) == ("not_run", [])
    assert judge(printed, [good], 0.01) == ("agrees", [])
    assert judge(printed, [good, near], 0.01) == ("close", [])
    assert judge(printed, [near, excused], 0.01) == ("differs_known", ["because"])
    assert judge(printed, [excused, bad], 0.01) == ("differs", ["because"])
    assert judge(printed, [OwnValue(1.16, "not needed")], 0.01) == ("agrees", [])
