"""Public data as their publishers wrote them: every row is read, with the columns that tasks name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from harness.config.schema import DataConfig
from harness.data.rows import read_rows
from harness.errors import InputError

DATA = Path(__file__).parents[4] / "shared" / "data"
if not DATA.is_dir():
    pytest.skip("needs public data sets in ../shared/data", allow_module_level=True)

COLA = {"columns": ["source", "label", "star", "sentence"], "quotes": "literal"}
SETS: dict[str, tuple[tuple[str, str], dict[str, Any], tuple[int, int], tuple[str, ...]]] = {
    "gsm8k": (("train.jsonl", "test.jsonl"), {"source": "jsonl"}, (7473, 1319), ("question", "answer")),
    "mawps": (("trainset.json", "testset.json"), {"source": "json"}, (1898, 238), ("original_text", "ans")),
    "boolq": (("train.json", "test.json"), {"source": "json"}, (9427, 3270), ("instruction", "answer")),
    # GLUE counts 1,043: the last line of dev.tsv ends without a line break, so that `wc -l` says 1,042.
    "cola": (("train.tsv", "dev.tsv"), {"source": "tsv", **COLA}, (7250, 1043), ("sentence", "label")),
    "rte": (
        ("train.tsv", "dev.tsv"),
        {"source": "tsv", "quotes": "literal"},
        (2127, 277),
        ("sentence1", "sentence2", "label"),
    ),
}


def config_of(name: str, files: tuple[str, str], fields: dict[str, Any]) -> DataConfig:
    train, validation = (str(DATA / name / file) for file in files)
    return DataConfig(files=[train], validation_files=[validation], **fields)


@pytest.mark.parametrize("name", SETS)
def test_every_row_is_read(name: str) -> None:
    files, fields, counts, columns = SETS[name]
    config = config_of(name, files, fields)
    wanted = dict.fromkeys(columns, "task.text")
    for split, count in zip(("train", "validation"), counts):
        rows = list(read_rows(config, split, wanted))
        assert len(rows) == count
        assert all(row[column] not in (None, "") for row in rows for column in columns)


def test_sst2_has_another_header_in_each_of_its_files() -> None:
    config = config_of("sst2", ("train.tsv", "dev.tsv"), {"source": "tsv", "quotes": "literal"})
    labels = Counter(row["label"] for row in read_rows(config, "train", {"label": "task.label"}))
    assert sum(labels.values()) == 67349
    assert set(labels) == {"0", "1"}
    assert len(list(read_rows(config, "validation", {"content": "task.text"}))) == 872
    with pytest.raises(
        InputError, match=r"task\.text: sentence is not a column of .+; allowed: label, content"
    ):
        list(read_rows(config, "validation", {"sentence": "task.text"}))


def test_literal_quotes_are_refused_under_the_standard_and_not_read_as_fewer_rows() -> None:
    files, fields, *_ = SETS["rte"]
    config = config_of("rte", files, {**fields, "quotes": "standard"})
    with pytest.raises(InputError, match=r"fix: data\.quotes=literal"):
        list(read_rows(config, "train"))
