"""The answer of a page says what its tables carry, and no more."""

from __future__ import annotations

from typing import Any

import pytest
from scipy.stats import t as student

from analysis.reconstruction import answers, config, page_tables

EMPTY: dict[str, list[dict[str, Any]]] = {
    name: [] for name in ("certificate", "alternatives", "attack", "susceptibility", "paired", "duplicates")
}


def _pair(
    contrast: str, pair: str, weights: str, measure: str, difference: float, half: float | None
) -> dict[str, Any]:
    # Eight sets: the p-value that belongs to the interval.
    p = None if half is None else 2 * float(student.sf(abs(difference) / half * student.ppf(0.975, 7), 7))
    return {
        "contrast": contrast, "pair": pair, "objective": "l2", "weights": weights, "prior": "none", "radius": 0.1,
        "offset": 0.0, "measure": measure, "first": 1.0, "second": 1.0 - difference, "difference": difference,
        "half_width": half,
        "p": p, "p_holm": p,
        "data_sets": 8, "leaks_more": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("contrast", "measure", "difference", "half", "expected"),
    [
        ("training", "nn_top5_margin", 0.2, 0.1, "less"),
        ("training", "nn_top5_margin", -0.2, 0.1, "more"),
        ("training", "ncc_top5", -0.2, 0.1, "less"),
        ("optimizers", "nn_top5_margin", 0.2, 0.1, "more"),
        ("optimizers", "ncc_top5", -0.2, 0.1, "less"),
        ("training", "ncc_top5", -0.05, 0.1, "open"),
        ("optimizers", "ncc_top5", 0.5, None, "open"),
    ],
)
def test_a_verdict_needs_significance_after_holm(
    contrast: str, measure: str, difference: float, half: float | None, expected: str
) -> None:
    row = _pair(contrast, "a − b", "margin", measure, difference, half)
    assert answers.verdict(row) == expected
    assert answers.verdict({**row, "p_holm": 0.06}) == "open"


def _training(raw_correlation: float, half_of_difference: float = 0.1) -> dict[str, list[dict[str, Any]]]:
    label = "gd: step 10 − 1"
    rows = [
        _pair("conventions", label, "raw − margin", "nn_top5_margin", 0.04, 0.1),
        _pair("conventions", label, "raw − margin", "ncc_top5", raw_correlation, half_of_difference),
    ]
    rows += [
        _pair("training", label, weights, measure, value, 0.1)
        for weights, measure, value in (
            ("margin", "nn_top5_margin", 0.01),
            ("margin", "ncc_top5", 0.0),
            ("raw", "nn_top5_margin", 0.05),
            ("raw", "ncc_top5", raw_correlation),
        )
    ]
    return {**EMPTY, "paired": rows}


def test_the_answer_says_where_the_convention_decides() -> None:
    keys = config.load(["data_sets=8", "attack.weights=margin,raw"])
    depends = "The outcome depends on the scale of the weights under attack"
    assert depends in answers.answer(keys, _training(-0.3))
    assert "on raw weights distance open (0.050 ± 0.100) and correlation recovered less" in answers.answer(
        keys, _training(-0.3)
    )
    assert depends not in answers.answer(keys, _training(-0.05))
    # Two verdicts differ, but not significantly: correlation −0.036 ± 0.029 on raw, −0.005 ± 0.041 on scaled weights.
    rows = [
        _pair("training", "gd: step 10 − 1", "margin", "ncc_top5", -0.005, 0.041),
        _pair("training", "gd: step 10 − 1", "raw", "ncc_top5", -0.036, 0.029),
        _pair("conventions", "gd: step 10 − 1", "raw − margin", "ncc_top5", -0.031, 0.050),
    ]
    found = answers.answer(keys, {**EMPTY, "paired": rows})
    assert depends not in found
    assert found.endswith(
        "Significant under one convention only; the difference of the conventions is open "
        "(raw − scaled: correlation -0.031 ± 0.050)."
    )
    # One set of images has no interval, and the answer no verdict.
    rows = [{**row, "half_width": None} for row in _training(-0.3)["paired"]]
    assert answers.answer(keys, {**EMPTY, "paired": rows}) == "Certificates only."


def test_an_optimizer_leaks_more_only_if_both_measures_agree() -> None:
    keys = config.load(["data_sets=8", "optimizer=gd,muon,adamw"])
    rows = [
        _pair("optimizers", pair, "margin", measure, value, 0.1)
        for pair, values in (
            ("gd − muon", (0.2, 0.05)),
            ("gd − adamw", (0.5, 0.6)),
            ("muon − adamw", (-0.3, -0.3)),
        )
        for measure, value in zip(("nn_top5_margin", "ncc_top5"), values, strict=True)
    ]
    found = answers.answer(keys, {**EMPTY, "paired": rows})
    assert found == (
        "In distance and correlation, gd leaks more than adamw and adamw leaks more than muon, on weights scaled to a "
        "least margin of 1; other pairs are open."
    )


def test_an_attacker_with_another_offset_is_compared_with_the_first() -> None:
    label = "gd: offset 0 − 1"
    rows = [
        _pair("offsets", label, "margin", "nn_top5_margin", 3.0, 0.5),
        _pair("offsets", label, "margin", "ncc_top5", -0.01, 0.1),
    ]
    assert answers.answer(config.load([]), {**EMPTY, "paired": rows}) == (
        "gd: offset 0 − 1, weights scaled to a least margin of 1: distance recovered less (3.000 ± 0.500) and "
        "correlation open (-0.010 ± 0.100)."
    )
    (table,) = page_tables.page_tables({**EMPTY, "paired": rows})
    assert table.title == "What the attacker believes of the offset"


def test_tables_of_readers_name_pairs_and_intervals() -> None:
    table, conventions = page_tables.page_tables(_training(-0.3))
    assert table.title == "Trained longer"
    assert conventions.title == "Trained longer: raw against scaled weights"
    assert table.rows[3][1:] == [
        "ℓ2, raw",
        "0.1",
        "correlation",
        "1.000, 1.300",
        "-0.300 ± 0.100",
        "0.000195",
        "3 of 8",
    ]
    assert page_tables.with_interval(0.5, None) == "0.500"
