"""The grid of an array: numbers never change, words of rows that run neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import InputError
from harness.jobs import grid
from harness.jobs.grid import GridRow


def _row(name: str, *words: str, row: int = 0) -> GridRow:
    return GridRow(words or ("steps=1",), row, name, f"/runs/g/{name}", "id")


def test_numbers_stay_and_new_rows_go_to_the_end() -> None:
    first = grid.merged([], [_row("a"), _row("b"), _row("c")], [])
    assert [(row.row, row.name) for row in first] == [(0, "a"), (1, "b"), (2, "c")]
    later = grid.merged(first, [_row("d"), _row("c"), _row("a", "steps=1", "world_size=2")], [])
    assert [(row.row, row.name) for row in later] == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]
    assert later[0].words == ("steps=1", "world_size=2")
    assert later[1] == first[1], "a row that is not asked for stays"


def test_a_row_that_waits_or_runs_keeps_its_words() -> None:
    first = grid.merged([], [_row("a"), _row("b")], [])
    assert grid.merged(first, [_row("a")], [0]) == first
    with pytest.raises(InputError, match="waits or runs with other arguments"):
        grid.merged(first, [_row("a", "steps=2")], [0])


def test_written_and_read_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / grid.FILE
    rows = grid.merged([], [_row("a", "x='1 2'"), _row("b", "y=ü\n")], [])
    grid.write(path, rows)
    assert grid.read(path) == rows
    assert grid.main([str(path), "1"]) == 0
    assert capsys.readouterr().out == "/runs/g/b\0y=ü\n\0"
    assert grid.main([str(path), "2"]) == 2
    assert "has no row 2" in capsys.readouterr().err
    path.write_text(path.read_text() + "{\n")
    assert grid.main([str(path), "0"]) == 2
    assert "line 3 is not a row of a grid" in capsys.readouterr().err
