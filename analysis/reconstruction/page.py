"""The tables for people, on a terminal: the columns that matter, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.reconstruction.job import Results
from analysis.reconstruction.tables import Row

COLUMNS: dict[str, tuple[tuple[str, str], ...]] = {
    "certificate": (
        ("optimizer", "optimizer"), ("seed", "seed"), ("step", "step"), ("margin_min", "least margin"),
        ("residual", "residual, fixed gates"), ("residual_clarke", "Clarke gates"), ("alignment_l2", "a ℓ2"),
        ("alignment_spectral", "a spectral"), ("alignment_linf", "a ℓ∞"), ("alignment_hybrid", "a own norm"),
        ("outside", "W₁ outside span"), ("split_radius", "split radius"), ("groups", "groups"),
    ),
    "alternatives": (
        ("optimizer", "optimizer"), ("step", "step"), ("kind", "kind"), ("radius", "radius"), ("points", "points"),
        ("residual", "residual"), ("residual_inherited", "inherited gates"), ("residual_projected", "projected"),
        ("margin_min", "least margin"), ("nn_distance", "nearest"), ("is_control", "control"), ("passed", "passed"),
    ),
    "attack": (
        ("optimizer", "optimizer"), ("seed", "seed"), ("step", "step"), ("kind", "kind"), ("objective", "objective"),
        ("radius", "radius"), ("residual", "K"), ("residual_true", "K of the truth"), ("nn_top5", "NN top 5"),
        ("nn_top5_margin", "on margin"), ("ncc_top5", "NCC top 5"), ("good", "SSIM > 0.4"),
    ),
    "susceptibility": (
        ("optimizer", "optimizer"), ("step", "step"), ("objective", "objective"), ("radius", "radius"),
        ("seeds", "seeds"), ("advantage_nn_top5_margin", "advantage, NN on margin"),
        ("half_width_nn_top5_margin", "± 95 %"), ("advantage_ncc_top5", "advantage, NCC"),
        ("half_width_ncc_top5", "± 95 %"), ("beats_truth", "fits better than truth"),
    ),
}  # fmt: skip
"""Table → (key, words) of the columns for people; files and JSON have all."""


def show(results: Results, console: Console) -> None:
    """Print the tables that have rows, and what they are a claim about."""
    for name, rows in results.tables.items():
        if rows:
            console.print(_table(name, rows))
    if results.tables["susceptibility"]:
        console.print(results.document()["scope"])


def cell(value: Any) -> str:
    """A value for people: four digits, yes and no, a dash for what there is none of."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(name: str, rows: Sequence[Row]) -> Table:
    table = Table(title=name, title_justify="left", box=box.SIMPLE, highlight=False)
    for key, words in COLUMNS[name]:
        is_text = any(isinstance(row.get(key), str) for row in rows)
        table.add_column(words, justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*(Text(cell(row.get(key))) for key, _ in COLUMNS[name]))
    return table
