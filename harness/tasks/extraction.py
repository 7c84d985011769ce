"""From the text of an answer to what is compared: a number, the value of an equation, or the text.

Two answers are equal if their extracted strings are. Numbers are compared by value: a number is extracted as the
shortest decimal string of its exact value, without floating-point numbers in between, so that ``22.0`` equals ``22``.
"""

from __future__ import annotations

import ast
import re
from decimal import Decimal
from fractions import Fraction
from typing import Literal, get_args

Extraction = Literal["hashes", "last_number", "text", "equation"]
EXTRACTIONS: tuple[str, ...] = get_args(Extraction)

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_SIGN, _CURRENCY = "[-+\N{MINUS SIGN}]", "[$€£¥]"
# A sign right after a word or a closing bracket is an operator: "48-24" ends in 24.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)\]]){_SIGN})?{_CURRENCY}?(?P<inner>(?<={_CURRENCY}){_SIGN})?"
    rf"(?P<digits>{_DIGITS})(?P<exponent>[eE][-+]?\d{{1,2}}(?![\w.]))?"
)
_HASHES = re.compile(rf"####[ \t]*{_NUMBER.pattern}")
_NOTE = re.compile(r"<<[^<>]*>>")
_EQUATION = re.compile(r"[\w.+\-*/()= ]+")
_PLAIN = re.compile(r"\d+(?:\.\d*)?|\.\d+")
_MOST_CHARACTERS = 1000
"""Of an equation or a number that is evaluated: bounds the digits of exact results and the depth of brackets."""


def extract(text: str, how: Extraction) -> str:
    """Return what an answer is compared by; "" where the text holds none.

    Args:
        text: of the answer.
        how: ``hashes``: the number after the first ``####``, GSM8K's convention. ``last_number``: the last number.
            ``text``: the text, each run of white space as one space. ``equation``: the value of the first line, an
            arithmetic expression or an equation that is linear in one unknown (``X=((22.0-14.0)/4.0)`` is 2);
            what is neither is compared as text without white space.

    Numbers may have a sign, a currency, thousands separators and an exponent of up to two digits. Calculator notes
    of GSM8K (``<<48/2=24>>``) are removed, except from ``text``.
    """
    if how == "text":
        return " ".join(text.split())
    text = _NOTE.sub("", text)
    if how == "equation":
        return _equation(text)
    found = [_HASHES.search(text)] if how == "hashes" else [None, *_NUMBER.finditer(text)]
    match = found[-1]
    if match is None:
        return ""
    # Python turns no integer of more than 4,300 digits into text, and a model may repeat a digit for ever.
    is_long = len(match["digits"]) > _MOST_CHARACTERS
    return match["digits"] if is_long else canonical(_value(match))


def canonical(value: Fraction) -> str:
    """Return the shortest decimal string of a value, or ``numerator/denominator`` where it has no finite one."""
    rest, places = value.denominator, 0
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest, count = rest // prime, count + 1
        places = max(places, count)
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    cut = len(digits) - places
    return ("-" if value < 0 else "") + digits[:cut] + ("." + digits[cut:] if places else "")


def _value(found: re.Match[str]) -> Fraction:
    is_negative = (found["sign"] or found["inner"] or "+") not in "+"
    value = Fraction(Decimal(found["digits"].replace(",", "") + (found["exponent"] or "")))
    return -value if is_negative else value


def _equation(text: str) -> str:
    line = "".join(next((line for line in text.splitlines() if line.strip()), "").split())
    value = _solve(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", line).replace("\N{MINUS SIGN}", "-"))
    return line.lower() if value is None else canonical(value)


def _solve(equation: str) -> Fraction | None:
    """Return the value of an expression, or of the one unknown of a linear equation; None for anything else."""
    if (
        len(equation) > _MOST_CHARACTERS
        or not _EQUATION.fullmatch(equation)
        or re.search(r"\d[^\W\d]", equation)
    ):
        return None
    # Python refuses integers with leading zeros.
    sides = re.sub(r"(?<![\d.])0+(?=\d)", "", equation).lower().split("=")
    try:
        forms = [_linear(side, ast.parse(side, mode="eval").body) for side in sides]
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    unknowns = {name for _, slopes in forms for name in slopes}
    if len(forms) == 1 and not unknowns:
        return forms[0][0]
    if len(forms) != 2 or len(unknowns) != 1:
        return None
    (unknown,) = unknowns
    (left, left_slopes), (right, right_slopes) = forms
    slope = left_slopes.get(unknown, Fraction()) - right_slopes.get(unknown, Fraction())
    return (right - left) / slope if slope else None


_Form = tuple[Fraction, dict[str, Fraction]]
"""A constant, and the slope of each unknown."""


def _linear(source: str, node: ast.expr) -> _Form:
    """Evaluate an expression to a form that is linear in its unknowns.

    Raises:
        ValueError: it is not linear, or holds anything but numbers, names, brackets and ``+ - * /``.
        ZeroDivisionError: it divides by 0.
    """
    match node:
        case ast.Name(id=name):
            return Fraction(), {name: Fraction(1)}
        case ast.Constant():
            # From the source: Python has rounded its decimal numbers to floating point.
            number = source[node.col_offset : node.end_col_offset]
            if not source.isascii() or not _PLAIN.fullmatch(number):
                raise ValueError(number)
            return Fraction(number.rstrip(".")), {}
        case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign, operand=operand):
            return _scaled(_linear(source, operand), Fraction(-1 if isinstance(sign, ast.USub) else 1))
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _linear(source, left), _linear(source, right)
            match op:
                case ast.Add():
                    return _added(a, b)
                case ast.Sub():
                    return _added(a, _scaled(b, Fraction(-1)))
                case ast.Mult() if not a[1] or not b[1]:
                    return _scaled(b, a[0]) if not a[1] else _scaled(a, b[0])
                case ast.Div() if not b[1]:
                    return _scaled(a, 1 / b[0])
    raise ValueError(ast.dump(node))


def _scaled(form: _Form, factor: Fraction) -> _Form:
    return form[0] * factor, {name: slope * factor for name, slope in form[1].items()}


def _added(a: _Form, b: _Form) -> _Form:
    return a[0] + b[0], {
        name: a[1].get(name, Fraction()) + b[1].get(name, Fraction()) for name in {*a[1], *b[1]}
    }
