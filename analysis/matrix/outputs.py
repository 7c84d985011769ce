"""Write a judged matrix: a page, Markdown, JSON, and the tables of the terminal."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from analysis.comparison.statistics import interval
from analysis.formatting import to_jsonable
from analysis.matrix import two_way
from analysis.matrix.results import Matrix
from analysis.matrix.verdict import Verdict, judge
from analysis.pages import job_page
from analysis.pages.figures import Plot, figure, line
from analysis.text_tables import TextTable, markdown_lines, print_table
from harness import visible
from harness.files import atomic
from harness.output import json_document

SCHEMA_VERSION = 1
FILES = ("matrix.json", "matrix.md", "matrix.html")
_CELLS = "mean over seeds ± half width of the 95 % interval (Student's t)"
_SOURCES = {
    "pretraining": "optimizer of pretraining",
    "fine-tuning": "optimizer of fine-tuning",
    "interaction": "interaction",
    "models": "pretrained models of one optimizer",
    "error": "remaining",
}


def finish(matrix: Matrix, out: Path, *, as_json: bool) -> Verdict:
    """Judge a matrix, write its files into ``out``, print tables and the sentence or the JSON document."""
    verdict = judge(matrix)
    tables = _tables(matrix, verdict)
    out.mkdir(parents=True, exist_ok=True)
    content = document(matrix, verdict)
    page = job_page.render(
        command="matrix",
        kicker="pretrain × fine-tune",
        title=out.name,
        headline=verdict.sentence,
        scope=verdict.detail,
        notes=matrix.remarks,
        tables=tables,
        plots=_plots(matrix),
        settings={"metric": matrix.measure.title, "seeds": ", ".join(map(str, matrix.seeds))},
    )
    for name, text in zip(
        FILES, (json_document(**content) + "\n", _markdown(matrix, verdict, tables), page), strict=True
    ):
        atomic.write_text(out / name, text)
    if as_json:
        print(json_document(**content, files=[str(out / name) for name in FILES]))
        return verdict
    for table in tables:
        print(f"\n{visible.visible(table.title)}")
        print_table(table, sys.stdout)
    print(f"\n{visible.visible(verdict.sentence)}\n{visible.visible(verdict.detail)}")
    for remark in matrix.remarks:
        print(f"! {visible.visible(remark)}")
    print(visible.visible(out / FILES[-1]))
    return verdict


def document(matrix: Matrix, verdict: Verdict) -> dict[str, Any]:
    """Return the JSON document; values in the unit of summary.json, missing numbers as null."""
    measure = matrix.measure
    cells = []
    for p, row in enumerate(matrix.rows):
        for f, column in enumerate(matrix.columns):
            of_seeds = matrix.values[p, f]
            pair = None if verdict.pairs is None else float(verdict.pairs[p, f])
            cells.append(
                {"pretrained": row, "finetuned": column, "values": of_seeds.tolist(), "interaction": pair}
                | vars(interval(of_seeds))
            )
    matching = None
    if verdict.matching is not None:
        matching = {
            **vars(verdict.matching),
            "resampled": verdict.resampled,
            "of_examples": matrix.of_examples is not None,
        }
    return to_jsonable(
        {
            "matrix_schema_version": SCHEMA_VERSION,
            "metric": {"name": measure.name, "better": measure.better, "unit": measure.unit},
            "seeds": matrix.seeds,
            "cells": cells,
            "variance": [{**vars(source), "mean_square": source.mean_square} for source in verdict.variance],
            "effects": {
                "pretraining": _effects(matrix, 0),
                "fine-tuning": _effects(matrix, 1),
            },
            "matching": matching,
            "interacts": verdict.interacts,
            "favours": verdict.favours,
            "sentence": verdict.sentence,
            "detail": verdict.detail,
            "remarks": matrix.remarks,
        }
    )


def _effects(matrix: Matrix, axis: int) -> dict[str, Any]:
    if not matrix.is_complete:
        return {}
    labels = (matrix.rows, matrix.columns)[axis]
    return {
        label: vars(found) for label, found in zip(labels, two_way.effects(matrix.values, axis), strict=True)
    }


def _tables(matrix: Matrix, verdict: Verdict) -> list[TextTable]:
    if not matrix.is_complete:
        return []
    measure = matrix.measure

    def cell(values: Any) -> str:
        found = interval(values)
        half = f" ± {measure.gap(found.half_width)}" if math.isfinite(found.half_width) else ""
        return f"{measure.number(found.mean)}{half}"

    def effect(label: str, axis: int) -> str:
        index = (matrix.rows, matrix.columns)[axis].index(label)
        found = two_way.effects(matrix.values, axis)[index]
        half = f" ± {measure.gap(found.half_width)}" if math.isfinite(found.half_width) else ""
        return f"{scaled(found.mean):+.3g}{half}"

    def scaled(value: float) -> float:
        return measure.scale * value

    heads = ["pretrained by", *(f"then {column}" for column in matrix.columns), "main effect"]
    rows = [
        [row, *(cell(matrix.values[p, f]) for f in range(len(matrix.columns))), effect(row, 0)]
        for p, row in enumerate(matrix.rows)
    ]
    rows.append(["main effect", *(effect(column, 1) for column in matrix.columns), ""])
    unit = f" ({measure.shown_unit})" if measure.shown_unit else ""
    best = f"{measure.title}{unit}, {measure.better} is better"
    tables = [
        TextTable(heads, rows, best, f"{_CELLS}; main effects are differences from the mean of all cells")
    ]
    if verdict.pairs is not None:
        of_pairs = [
            [row, *(f"{scaled(verdict.pairs[p, f]):+.3g}" for f in range(len(matrix.columns)))]
            for p, row in enumerate(matrix.rows)
        ]
        heads = heads[:-1]
        tables.append(
            TextTable(heads, of_pairs, "Interaction", "what the two main effects leave of each mean")
        )
    if verdict.variance:
        variance = [
            [_SOURCES[s.name], f"{s.squares:.3g}", str(s.df), _number(s.f, ".2f"), _number(s.p, ".2g")]
            for s in verdict.variance
        ]
        note = "pretraining is tested against models of one optimizer, the rest against what remains"
        tables.append(
            TextTable(["source", "squares", "df", "F", "p"], variance, "Analysis of variance", note)
        )
    return tables


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"


def _plots(matrix: Matrix) -> list[Plot]:
    """Draw the means as lines, one per pretraining optimizer: parallel lines are no interaction."""
    if not matrix.is_complete:
        return []
    scale = matrix.measure.scale
    traces = []
    for p, row in enumerate(matrix.rows):
        found = [interval(matrix.values[p, f]) for f in range(len(matrix.columns))]
        error = {
            "type": "data",
            "array": [scale * f.half_width if math.isfinite(f.half_width) else 0 for f in found],
        }
        traces.append(
            go.Scatter(
                x=matrix.columns,
                y=[scale * f.mean for f in found],
                error_y=error,
                mode="lines+markers",
                name=f"pretrained by {row}",
                line=line(p),
                meta={"arm": p},
            )
        )
    unit = f" ({matrix.measure.shown_unit})" if matrix.measure.shown_unit else ""
    layout = {
        "xaxis": {"title": "fine-tuned by", "type": "category"},
        "yaxis": {"title": f"{matrix.measure.title}{unit}"},
    }
    caption = (
        "Parallel lines: no interaction. Bars: 95 % intervals over seeds; paired seeds let them overlap."
    )
    return [Plot("interaction", "Means by pretraining optimizer", caption, figure(traces, **layout))]


def _markdown(matrix: Matrix, verdict: Verdict, tables: list[TextTable]) -> str:
    lines = [visible.markdown(verdict.sentence), "", visible.markdown(verdict.detail), ""]
    for table in tables:
        numeric = [index > 0 for index in range(len(table.heads))]
        lines += [
            f"**{visible.markdown(table.title)}**",
            "",
            *markdown_lines(table.heads, table.rows, numeric),
            "",
        ]
        lines += [visible.markdown(table.caption), ""] if table.caption else []
    lines += [f"- {visible.markdown(remark)}" for remark in matrix.remarks]
    return "\n".join(lines).rstrip() + "\n"
