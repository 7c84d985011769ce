"""Templates against `str.format`, and the errors of those that no row can fill."""

from __future__ import annotations

import pytest

from harness.errors import InputError
from harness.tasks.templates import columns_of, fill

ROW = {"question": "How many {sheep}?", "n": 3, "x": 0.1, "yes": True, "none": None, "two words": "b"}


@pytest.mark.parametrize(
    ("template", "columns"),
    [
        ("Question: {question}\nAnswer:", ["question"]),
        ("{n}{n} {question}", ["n", "question"]),
        ("{{n}} {n} }}{{", ["n"]),
        ("no column", []),
        ("{two words}: {x}", ["two words", "x"]),
        ("", []),
    ],
)
def test_templates_are_filled_as_str_format_fills_them(template: str, columns: list[str]) -> None:
    assert columns_of(template) == columns
    assert fill(template, ROW) == template.format(**ROW)


def test_a_backslash_n_as_a_shell_leaves_it_is_a_line_break() -> None:
    assert fill(r"{n}:\n{x}\\n", {"n": r"a\nb", "x": 1}) == "a\\nb:\n1\\n"


def test_values_become_text_as_in_json() -> None:
    assert fill("{yes}|{none}|{x}|{question}", ROW) == "true||0.1|How many {sheep}?"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{question", "task.answer: {question is no template"),
        ("question}", "fix: {{ and }} for braces that are text"),
        ("{}", "has {} without the name of a column"),
        ("{n:03d}", "has a format after the column n"),
        ("{n!r}", "has a format after the column n"),
    ],
)
def test_a_template_that_cannot_be_read_is_refused(template: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        columns_of(template, "task.answer")
    assert message in str(caught.value)


def test_an_unknown_column_is_refused_with_the_columns_there_are() -> None:
    with pytest.raises(InputError) as caught:
        fill("{quesion}", ROW)
    assert str(caught.value).startswith(
        "task.prompt: quesion is not a column of the data; did you mean question?"
    )
    # Attributes and items are names of columns, not Python's.
    with pytest.raises(InputError, match=r"question\.upper is not a column"):
        fill("{question.upper}", ROW)
