"""Rows without text: one rule for all sources, counted in the manifest and in the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.config.schema import DataConfig
from harness.data import prepare
from harness.errors import InputError

from .conftest import documents

SOURCES = ("jsonl", "parquet", "datasets")


def stored(source: str, folder: Path, rows: list[dict[str, Any]], **fields: Any) -> DataConfig:
    """The same rows in the form that ``source`` reads."""
    folder.mkdir(parents=True)
    given: dict[str, Any] = {"vocab_size": 300, "validation_tokens": 300, "cache_dir": str(folder / "cache")}
    if source == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=7)
    else:
        (folder / "set").mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "set" / "rows.jsonl").write_text(text)
    if source == "datasets":
        given |= {"dataset": str(folder / "set")}
    else:
        given |= {"files": [str(folder / "**" / f"rows.{source}")]}
    return DataConfig(source=source, **given | fields)  # type: ignore[arg-type]


def test_null_blank_and_missing_text_is_left_out_and_counted_alike(tmp_path: Path) -> None:
    texts = documents(40)
    rows: list[dict[str, Any]] = [{"text": text, "n": i} for i, text in enumerate(texts)]
    odd: list[dict[str, Any]] = [
        {"text": None, "n": 1},
        {"text": "", "n": 2},
        {"text": " \t\n", "n": 3},
        {"n": 4},
        {"text": None, "n": 5},
    ]
    for place, row in zip((20, 15, 10, 5, 1), odd):
        rows.insert(place, row)
    shas = set()
    for source in SOURCES:
        lines: list[str] = []
        corpus = prepare(stored(source, tmp_path / source, rows), say=lines.append)
        facts = corpus.manifest["source"]
        counts = (facts["documents_read"], facts["null_rows"], facts["blank_rows"])
        assert counts == (40, 3, 2), source
        assert lines[-1].endswith("; rows without text left out: 3 null, 2 blank")
        assert corpus.left_out == "; rows without text left out: 3 null, 2 blank"  # also from the cache
        shas.add(corpus.sha256)
    # Leaving them out is all: the corpus is that of the rows with text.
    shas.add(prepare(stored("jsonl", tmp_path / "whole", [{"text": text} for text in texts])).sha256)
    assert len(shas) == 1


def test_rows_that_all_have_text_leave_no_line(tmp_path: Path) -> None:
    lines: list[str] = []
    corpus = prepare(stored("jsonl", tmp_path / "a", [{"text": t} for t in documents(40)]), say=lines.append)
    assert corpus.left_out == ""
    assert "left out" not in "".join(lines)


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_of_nothing_but_nulls_says_so(tmp_path: Path, source: str) -> None:
    rows = [{"text": None, "n": i} for i in range(6)] + [{"text": " ", "n": 6}] * (source != "parquet")
    with pytest.raises(InputError, match=r"holds no text: of \d rows 6 are null and [01] blank"):
        prepare(stored(source, tmp_path / source, rows))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("value", [3, 0.5, True, ["a"], {"a": "b"}])
def test_values_that_are_not_text_are_refused(tmp_path: Path, source: str, value: Any) -> None:
    with pytest.raises(InputError, match=r"data\.field: text holds .+, not text"):
        prepare(stored(source, tmp_path / source, [{"text": value}] * 3))


@pytest.mark.parametrize("source", SOURCES)
def test_a_column_that_no_row_has_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(InputError, match=r"data\.field: text is not a (key|column) of .*allowed: body"):
        prepare(stored(source, tmp_path / source, [{"body": "a", "title": "b"}] * 3))


def test_a_mistyped_key_is_found_without_reading_to_the_end(tmp_path: Path) -> None:
    config = stored("jsonl", tmp_path / "a", [{"body": "a"}] * 1000)
    with Path(tmp_path / "a" / "set" / "rows.jsonl").open("a") as file:
        file.write("not JSON\n")
    with pytest.raises(InputError, match=r"is not a key of .*rows.jsonl, line 1; allowed: body"):
        prepare(config)
