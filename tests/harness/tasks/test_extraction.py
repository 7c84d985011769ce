"""Answers are compared by exact value: of the number that a convention finds, or of an equation."""

from __future__ import annotations

import json
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.tasks.extraction import Extraction, canonical, extract

DATA = Path(__file__).parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} does not exist")
WHOLE = [f"{sign}{digits}" for sign in ("", "-") for digits in ("0", "7", "42", "1234", "1000000")]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He has <<48/2=24>>24 left.\n#### 72", "72"),
        ("#### 1,234,500.50.", "1234500.5"),
        ("#### $18", "18"),
        ("####-$3.0", "-3"),
        ("#### €-3", "-3"),
        ("#### \N{MINUS SIGN}5 apples", "-5"),
        ("#### .5", "0.5"),
        ("#### 007", "7"),
        ("#### -0.0", "0"),
        ("#### 18%", "18"),
        ("#### 1e-05", "0.00001"),
        # The first result counts: what a model invents after it is another question.
        ("#### 5\nQuestion: 6+1? #### 7", "5"),
        # A marker without a number is none.
        ("#### so\n#### 7", "7"),
        ("the answer is 72", ""),
        ("", ""),
    ],
)
def test_hashes(text: str, number: str) -> None:
    assert extract(text, "hashes") == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It costs $5, so 48-24", "24"),
        ("x = -5", "-5"),
        ("(10 - 5)", "5"),
        ("[3]-4", "4"),
        ("It is 3.", "3"),
        ("1,2345", "2345"),
        ("1, 2, 3", "3"),
        ("12,345 of them", "12345"),
        # The note is the calculator's, not the answer's.
        ("a 7 <<48/2=24>>", "7"),
        ("2e5x", "5"),
        ("no digit", ""),
    ],
)
def test_last_number(text: str, number: str) -> None:
    assert extract(text, "last_number") == number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("X=((22.0-14.0)/4.0)", "2"),
        ("\n x = 3 * 6 \nx=9", "18"),
        ("X=(1.0/3.0)", "1/3"),
        ("(2-(-1.5))*1,000", "3500"),
        ("X-6=52", "58"),
        ("(7.0*x)+4.0=(3.0*x)-20.0", "-6"),
        ("X=05+.5", "5.5"),
        # Compared as text: not linear, without a solution, broken, or not arithmetic at all.
        ("x+(1.0/x) = 3.3333", "x+(1.0/x)=3.3333"),
        ("x=x", "x=x"),
        ("x=1/0", "x=1/0"),
        ("X=0.32=0.21", "x=0.32=0.21"),
        ("x=y+1", "x=y+1"),
        ("9**9**9", "9**9**9"),
        ("x=0x10", "x=0x10"),
        ("x=1e5", "x=1e5"),
        ("x=f(2)", "x=f(2)"),
        ("x=\N{SUPERSCRIPT TWO}", "x=\N{SUPERSCRIPT TWO}"),
        ("(" * 400 + "1", "(" * 400 + "1"),
        ("-" * 5000 + "1", "-" * 5000 + "1"),
        ("", ""),
    ],
)
def test_equation(text: str, value: str) -> None:
    assert extract(text, "equation") == value


def test_text_is_compared_without_its_white_space() -> None:
    assert extract(" not\n  entailment <<1>>\t", "text") == "not entailment <<1>>"


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**12), max_value=10**12))
@pytest.mark.parametrize("how", ["hashes", "last_number"])
def test_numbers_are_equal_by_value(how: Extraction, number: Decimal) -> None:
    forms = {f"{number}", f"{number:,}", f"{number:f}000", f"{number:f}.", f"{number:+}"}
    found = {extract(f"so #### {form}", how) for form in forms}
    assert found == {canonical(Fraction(number))}
    assert Decimal(found.pop()) == number


@pytest.mark.parametrize("how", ["hashes", "last_number"])
def test_a_model_may_repeat_a_digit_for_ever(how: Extraction) -> None:
    """Python converts no integer of more than 4,300 digits."""
    digits = "9" * 5000
    assert extract(f"#### {digits}", how) == digits
    assert extract(f"#### {'9' * 900}.0", how) == "9" * 900


@given(st.fractions())
def test_canonical_numbers_keep_their_value(number: Fraction) -> None:
    assert Fraction(canonical(number)) == number


def _arithmetic(children: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(children, st.sampled_from("+-*/"), children).map(lambda parts: f"({''.join(parts)})")


@given(
    st.recursive(
        st.decimals(min_value=0, max_value=999, places=2, allow_nan=False).map(str), _arithmetic, max_leaves=8
    )
)
def test_equations_have_the_value_of_python_with_fractions(expression: str) -> None:
    import re

    exact = re.sub(r"\d+\.\d+", lambda number: f'Fraction("{number[0]}")', expression)
    try:
        expected = canonical(Fraction(eval(exact, {"Fraction": Fraction})))
    except ZeroDivisionError:
        expected = f"x={expression}"
    assert extract(f"X={expression}", "equation") == expected


@given(st.text(alphabet="0123456789.,-+*/()=xXeE# $<>\n_²½٣", max_size=60))
@pytest.mark.parametrize("how", ["hashes", "last_number", "text", "equation"])
def test_no_text_is_too_strange(how: Extraction, text: str) -> None:
    found = extract(text, how)
    # What was extracted is the same answer again, so that tables of results can be scored anew.
    if how in ("text", "last_number") and "/" not in found:
        assert extract(found, how) == found


@needs_data
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_of_gsm8k(split: str) -> None:
    for line in (DATA / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)["answer"]
        expected = answer.rpartition("#### ")[2].replace(",", "")
        assert extract(answer, "hashes") == extract(answer, "last_number") == expected


@needs_data
def test_every_equation_of_mawps() -> None:
    rows = [
        row
        for split in ("trainset", "validset", "testset")
        for row in json.loads((DATA / "mawps" / f"{split}.json").read_text(encoding="utf-8"))
    ]
    as_text, differ = 0, 0
    for row in rows:
        value = extract(row["equation"], "equation")
        assert value
        try:
            # The published numbers are rounded, and some do not belong to their equation.
            differ += abs(Fraction(value) - Fraction(str(row["ans"]))) > Fraction("0.001")
        except ValueError:
            as_text += 1
    assert (len(rows), as_text, differ) == (2373, 14, 44)
