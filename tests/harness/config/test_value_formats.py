"""Lengths of time, as people and SLURM write them."""

from __future__ import annotations

import pytest

from harness.config.value_formats import duration_seconds
from harness.errors import InputError


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (90, 90),
        (0.5, 0.5),
        ("90", 90),
        ("90s", 90),
        ("90m", 5400),
        ("2h30m", 9000),
        ("1d", 86400),
        ("1d 2h".replace(" ", ""), 93600),
        ("1.5h", 5400),
        ("30:00", 1800),
        ("01:30:00", 5400),
        ("1-12:00:00", 129600),
        ("1-12:30", 131400),
        (" 2H ", 7200),
    ],
)
def test_what_is_a_length_of_time(value: str | float | None, expected: float | None) -> None:
    assert duration_seconds("time_limit", value) == expected


@pytest.mark.parametrize(
    "value", ["", "soon", "0", 0, -3, "-1h", "m", "1h2d", "nan", "inf", "1:2:3:4", "3 hours"]
)
def test_what_is_none_is_refused_with_what_is_allowed(value: str | float) -> None:
    with pytest.raises(InputError, match="time_limit") as caught:
        duration_seconds("time_limit", value)
    assert "2h30m" in str(caught.value)
