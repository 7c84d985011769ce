"""Rows with named columns from every format, compared with pandas and the json module; each damage names its line."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.config.data_checks import check_splits
from harness.config.schema import DataConfig
from harness.data.rows import read_rows
from harness.errors import InputError

ROWS: list[dict[str, Any]] = [
    {"text": 'He said "no",\tthen left.', "label": 1, "score": 2.5, "sure": True},
    {"text": "two\nlines", "label": 0, "score": -1.0, "sure": False},
    {"text": "Größe, 大きさ", "label": None, "score": None, "sure": None},
]


def write(path: Path, source: str, rows: list[dict[str, Any]]) -> Path:
    """Write ``rows`` by another program's writer: json, pandas or pyarrow."""
    if source == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    elif source == "json":
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    elif source == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        pd.DataFrame(rows).to_csv(path, sep="," if source == "csv" else "\t", index=False)
    return path


def config_of(path: Path | str, source: str, **fields: Any) -> DataConfig:
    return DataConfig(source=source, files=[str(path)], validation_files=[str(path)], **fields)  # pyright: ignore[reportArgumentType]


def error_of(config: DataConfig, wanted: dict[str, str] | None = None) -> str:
    with pytest.raises(InputError) as caught:
        list(read_rows(config, "train", wanted))
    return str(caught.value)


@pytest.mark.parametrize("source", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_typed_formats_keep_their_values(source: str, split: Any, tmp_path: Path) -> None:
    rows = read_rows(config_of(write(tmp_path / "x", source, ROWS), source), split)
    assert list(rows) == ROWS
    assert rows.read == 3
    assert rows.place.startswith(f"{tmp_path / 'x'}, ")
    wanted = {"label": "task.label", "text": "task.text"}
    chosen = list(read_rows(config_of(tmp_path / "x", source), split, wanted))
    assert chosen == [{"label": row["label"], "text": row["text"]} for row in ROWS]


@pytest.mark.parametrize("source", ["csv", "tsv"])
def test_delimited_rows_are_those_that_pandas_reads(source: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x", source, ROWS)
    expected = pd.read_csv(path, sep="," if source == "csv" else "\t", dtype=str, keep_default_na=False)
    rows = read_rows(config_of(path, source), "train")
    assert list(rows) == expected.to_dict("records")
    assert rows.place == f"{path}, line 5"  # the second row takes lines 3 and 4
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + path.read_bytes()))
    assert list(read_rows(config_of(path, source), "train")) == expected.to_dict("records")


_FIELDS = st.lists(st.lists(st.text(alphabet='ab",\t\n ', max_size=6), min_size=3, max_size=3), max_size=6)


@given(fields=_FIELDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_the_csv_module_writes_is_read_back(fields: list[list[str]], tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["a", "b", "c"], *fields])
    rows = list(read_rows(config_of(path, "csv"), "train"))
    assert [list(row.values()) for row in rows] == fields


def test_literal_quotes_and_columns_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text('gj04\t1\t\t"Quotes" open "here.\nbc01\t0\t*\tand close" there.\n')
    config = config_of(path, "tsv", columns=["source", "label", "star", "sentence"], quotes="literal")
    rows = list(read_rows(config, "train"))
    assert [row["sentence"] for row in rows] == ['"Quotes" open "here.', 'and close" there.']
    assert [row["label"] for row in rows] == ["1", "0"]
    # The header is not a row: with its names given as well, it would become one.
    path.write_text("source\tlabel\tstar\tsentence\n" + path.read_text())
    assert "the file has a header; fix: data.columns=null" in error_of(config)


def test_a_quote_that_swallows_rows_is_an_error_and_not_a_shorter_file(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    lines = ["id\tsentence", '1\t"opens', "2\tinside", '3\tcloses"', "4\tend"]
    path.write_text("".join(line + "\n" for line in lines))
    message = error_of(config_of(path, "tsv"))
    assert "line 2 to 4 are one quoted field that holds rows" in message
    assert "fix: data.quotes=literal" in message
    assert len(list(read_rows(config_of(path, "tsv", quotes="literal"), "train"))) == 4
    # Quoted text of several lines that are no rows is a field.
    path.write_text('id\tsentence\n1\t"a\nb\nc"\n')
    assert [row["sentence"] for row in read_rows(config_of(path, "tsv"), "train")] == ["a\nb\nc"]


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("csv", 'a,b\n1,"2\n', r"line 2 opens a quote that never closes.+data\.quotes=literal"),
        ("csv", 'a,b\n1,"2"3\n', r"line 2 has text after a closing quote.+data\.quotes=literal"),
        ("csv", "a,b\n1,2\n1,2,3\n", r"line 3 has 3 fields, and the header has 2; fix: quotes around"),
        ("csv", "a,b\n1\n", r"line 2 has 1 field, and the header has 2"),
        ("csv", "a,a\n1,2\n", r"line 1 names the column 'a' twice"),
        ("csv", "a,b\r1,2\r", r"line 1 holds a carriage return inside a line; fix: tr"),
        ("csv", b"a,b\n1,\xff\n", r"line 2 is not UTF-8 text"),
        ("csv", b"PK\x03\x04", r"is a zip archive, not comma-separated text"),
        ("json", '{"text": 1}\n{"text": 2}\n', r"is not JSON \(Extra data\); fix: data\.source=jsonl"),
        ("json", '{"rows": [{"text": 1}]}', r"is not a JSON list; allowed: .+; fix: jq '.\[\"rows\"\]'"),
        ("json", '[{"text": 1}, 2]', r"item 2 is not a JSON object"),
        ("json", '[{"text": [1]}]', r"data\.source: text holds list, not text or a number, in .+item 1"),
        ("json", "[" * 100_000, r"nests lists or objects too deeply"),
        ("jsonl", '[\n{"text": 1}\n]', r"line 1 is not JSON .+; fix: data\.source=json"),
    ],
)
def test_damage_names_its_line_and_what_to_do(
    source: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        list(read_rows(config_of(path, source), "train"))


@pytest.mark.parametrize("source", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_an_unknown_column_is_refused_with_the_names_there_are(source: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x", source, ROWS)
    message = error_of(config_of(path, source), {"txt": "task.text"})
    assert message.startswith("task.text: txt is not a ")
    assert "did you mean text? allowed: text, label, score, sure" in message


def test_a_key_that_some_rows_lack_is_null_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text('{"a": 1}\n{"b": 2}\n')
    rows = read_rows(config_of(path, "jsonl"), "train", {"a": "task.text", "b": "task.label"})
    assert list(rows) == [{"a": 1, "b": None}, {"a": None, "b": 2}]


def test_lone_surrogates_are_question_marks_as_in_a_corpus(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text('{"a": "\\ud800 and \\ud83d\\ude00"}\n')
    assert list(read_rows(config_of(path, "jsonl"), "train")) == [{"a": "? and \N{GRINNING FACE}"}]


def test_the_wrong_delimiter_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("label\tsentence\n1\ta\n")
    assert "fix: data.source=tsv" in error_of(config_of(path, "csv"), {"label": "task.label"})
    path.write_text("1\ta\n0\tb\n")
    message = error_of(config_of(path, "tsv"), {"label": "task.label"})
    assert "fix: data.columns=[c1,c2] names the columns, if the file has no header" in message


def test_a_folder_of_the_datasets_library_gives_both_splits_and_class_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    for split, labels in (("train", [1, 0, 1]), ("validation", [0, -1])):
        table = datasets.Dataset.from_dict(
            {"text": [f"{split} {i}" for i in range(len(labels))], "label": labels}, features=features
        )
        (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
        table.to_parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet")
    config = DataConfig(source="datasets", dataset=str(tmp_path / "set"), validation_split="validation")
    assert [row["label"] for row in read_rows(config, "train")] == ["yes", "no", "yes"]
    rows = read_rows(config, "validation", {"label": "task.label"})
    assert list(rows) == [{"label": "no"}, {"label": None}]
    assert rows.place.endswith("split validation, row 2")
    assert "is not a column of" in error_of(config, {"labl": "task.label"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "package"}, "data.source: package holds text, not examples"),
        ({"source": "text", "files": ["a"]}, "data.source: text holds text, not examples"),
        ({"source": "csv"}, "data.files: [] names no file to train on; fix: data.files=[FILE.csv]"),
        ({"source": "csv", "files": ["a"]}, "data.validation_files: [] names no file to evaluate on"),
        ({"source": "datasets", "dataset": "glue"}, "fix: data.validation_split=validation"),
    ],
)
def test_a_missing_split_says_what_to_type(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_splits(DataConfig(**fields))
    assert message in str(caught.value)


@pytest.mark.parametrize("source", ["json", "csv", "tsv"])
def test_pretraining_reads_a_column_of_the_new_formats(
    source: str, tmp_path: Path, config_for: Callable[..., DataConfig]
) -> None:
    from harness.data import prepare

    from .conftest import documents

    texts = documents(60)
    path = write(tmp_path / "x", source, [{"id": i, "body": text} for i, text in enumerate(texts)])
    config = config_for(texts)
    other = config.model_copy(update={"source": source, "files": [str(path)], "field": "body"})
    assert prepare(other).sha256 == prepare(config).sha256
