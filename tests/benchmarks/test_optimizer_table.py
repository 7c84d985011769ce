"""The table of presets in docs/optimizers.md is what the presets are."""

from __future__ import annotations

from pathlib import Path

import pytest

import optimizers
from benchmarks import optimizer_table
from optimizers.composition import composition

REMEDY = "run: python -m benchmarks.optimizer_table --write"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_every_preset_has_a_line_with_its_composition_state_and_source() -> None:
    written = {name: cells(line) for name, line in optimizer_table.written().items()}
    assert list(written) == list(optimizers.PRESETS), REMEDY
    for name, line in written.items():
        expected = [composition(name), optimizer_table.state(name), optimizers.PRESETS[name].source]
        assert [line[1], line[2], line[-1]] == expected, REMEDY


def test_the_figures_of_one_preset() -> None:
    assert cells(optimizer_table.written()["apollo"]) == optimizer_table.row("apollo"), REMEDY


@pytest.mark.slow
@pytest.mark.parametrize("name", list(optimizers.PRESETS))
def test_the_figures_of_all(name: str) -> None:
    assert cells(optimizer_table.written()[name]) == optimizer_table.row(name), REMEDY


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("sumo", "r·long + r·short"),
        ("galore", "r·short + 2·r·long"),
        ("fira", "r·short + 2·r·long + 1"),
        ("ldadam", "r·short + 2·r·long + long·short"),
        ("dct_subspace", "r + 2·r·long"),
        ("apollo_mini", "short + 2·long + 1"),
        ("muon", "long·short"),
        ("adamw", "2·long·short"),
    ],
)
def test_state_formulas(name: str, formula: str) -> None:
    assert optimizer_table.state(name) == formula


def test_a_sumo_step_is_its_products() -> None:
    """Two with the gradient, the Gram and the factor; the eigenproblem of rank r is inside of an operator."""
    counted = optimizer_table.work("sumo").step
    products = sum(
        4.0 * m * n * optimizer_table.RANK + 4.0 * optimizer_table.RANK**2 * min(m, n)
        for m, n in optimizer_table.SHAPES
    )
    assert counted == pytest.approx(products, rel=1e-6)


def test_the_table_is_replaced_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{optimizer_table.BEGIN}\n| old |\n{optimizer_table.END}\nafter\n")
    monkeypatch.setattr(optimizer_table, "table", lambda: iter(["| head |", "|---|", "| `a` | b |"]))
    optimizer_table.write(page)
    lines = page.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert optimizer_table.written(page) == {"a": "| `a` | b |"}
