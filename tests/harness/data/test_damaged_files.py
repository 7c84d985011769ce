"""Files that are compressed, damaged, hostile or of another kind: their documents, or one line."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import socket
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.data import formats, local_files, row_files
from harness.data.row_files import RowLayout
from harness.errors import InputError

from .conftest import documents, write_jsonl


def arrow_compressed(codec: str) -> Callable[[bytes], bytes]:
    def compress(data: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()

    return compress


CODECS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "zstd": arrow_compressed("zstd"),
    "lz4": arrow_compressed("lz4"),
}


def read(path: Path, source: str = "jsonl", field: str = "text") -> list[str | None]:
    return list(local_files.read(local_files.find([str(path)], source), RowLayout(source), field))


def line_of(path: Path, source: str = "jsonl", field: str = "text") -> str:
    """What the user reads; it must be one line, and nothing but an InputError may come out."""
    with pytest.raises(InputError) as error:
        read(path, source, field)
    line = str(error.value)
    assert "\n" not in line
    assert path.name in line
    assert len(line) < 1000
    return line


@pytest.mark.parametrize("codec", CODECS)
def test_compressed_files_are_read_whatever_their_name(tmp_path: Path, codec: str) -> None:
    texts = documents(30)
    write_jsonl(tmp_path / "plain", texts)
    data = (tmp_path / "plain").read_bytes()
    half = len(data) // 2
    (tmp_path / "one.jsonl").write_bytes(CODECS[codec](data))
    assert read(tmp_path / "one.jsonl") == texts
    (tmp_path / "text.gz").write_bytes(CODECS[codec](texts[0].encode()))
    assert read(tmp_path / "text.gz", "text") == texts[:1]
    if codec != "lzma":  # which knows no second stream
        (tmp_path / "two").write_bytes(CODECS[codec](data[:half]) + CODECS[codec](data[half:]))
        assert read(tmp_path / "two") == texts


def test_a_file_named_gz_that_is_plain_text_is_read(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl.gz", ["one"])
    assert read(tmp_path / "x.jsonl.gz") == ["one"]


def parquet(texts: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=10)
    return sink.getvalue()


@pytest.mark.parametrize("codec", [*CODECS, "plain", "parquet"])
def test_no_damage_ends_in_anything_but_an_input_error(tmp_path: Path, codec: str) -> None:
    texts = documents(30)
    write_jsonl(tmp_path / "plain", texts)
    data = (tmp_path / "plain").read_bytes()
    whole = {"plain": data, "parquet": parquet(texts)}.get(codec) or CODECS[codec](data)
    source = "parquet" if codec == "parquet" else "jsonl"
    rng = random.Random(codec)
    refused = 0
    for trial in range(150):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            del damaged[rng.randrange(1, len(damaged)) :]
        elif trial % 3 == 1:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        else:
            start = rng.randrange(len(damaged))
            damaged[start : start + rng.randrange(1, 40)] = rng.randbytes(rng.randrange(40))
        (tmp_path / "x").write_bytes(damaged)
        try:
            found = read(tmp_path / "x", source)
        except InputError:
            refused += 1
        else:
            # Checksums of these codecs let nothing else through. (The first bytes may turn into another codec.)
            assert codec not in ("gzip", "bzip2", "xz") or found == texts
    assert refused > 40


@pytest.mark.parametrize("codec", ["gzip", "xz"])
def test_damage_names_the_row_that_it_is_in(tmp_path: Path, codec: str) -> None:
    # Random letters: some 0.8 bytes a character, so that the damage is two thirds into the rows.
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=200)) for _ in range(3000)]
    write_jsonl(tmp_path / "plain", texts)
    data = bytearray(CODECS[codec]((tmp_path / "plain").read_bytes()))
    for i in range(2 * len(data) // 3, 2 * len(data) // 3 + 100):
        data[i] ^= 0x55
    (tmp_path / "x").write_bytes(data)
    line = line_of(tmp_path / "x")
    row = int(line.partition("x, line ")[2].split()[0])
    assert (1800 if codec == "gzip" else 1) <= row <= 2100
    (tmp_path / "cut").write_bytes(data[:20])
    assert "cut, line 1 cannot be read" in line_of(tmp_path / "cut")


def test_a_damaged_second_stream_is_not_taken_for_the_end(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "plain", documents(4))
    data = (tmp_path / "plain").read_bytes()
    for name in ("bzip2", "xz"):
        second = bytearray(CODECS[name](data))
        second[0] ^= 1
        (tmp_path / name).write_bytes(CODECS[name](data) + second)
        assert "cannot be read" in line_of(tmp_path / name)
    (tmp_path / "padded.xz").write_bytes(lzma.compress(data) + bytes(8) + lzma.compress(data))
    assert read(tmp_path / "padded.xz") == documents(4) * 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        ("[" * 100_000, "nests lists or objects too deeply"),
        ('{"text":' * 100_000, "nests lists or objects too deeply"),
        ('{"text": ' + "[" * 3000 + "]" * 3000 + "}", "holds list, not text|nests lists"),
        ('{"text": NaN}', "holds float, not text"),
        ('{"text": -Infinity}', "holds float, not text"),
        ('{"text": true}', "holds bool, not text"),
        ('{"text": ["a"]}', "holds list, not text"),
        ('{"text": "a"', "is not JSON"),
        ('{"text": "a"} {"text": "b"}', "is not JSON"),
        ('"text"', "is not a JSON object"),
        ("NaN", "is not a JSON object"),
        ('{"text": "\x01"}', "is not JSON"),
    ],
)
def test_lines_that_are_no_documents_name_file_and_row(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "x").write_text('{"text": "first"}\n\n' + line + "\n")
    message = line_of(tmp_path / "x")
    assert "x, line 3" in message
    assert [part for part in reason.split("|") if part in message]


def test_odd_values_next_to_the_text_do_no_harm(tmp_path: Path) -> None:
    rows = ['{"text": "a", "x": NaN}', '{"x": "\\ud800", "text": "b"}', '{"text": "c", "text": "d"}']
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    assert read(tmp_path / "x") == ["a", "b", "d"]
    (tmp_path / "y").write_bytes(b'{"text": "a"}\n{"text": "\xed\xa0\x80"}\n')  # a surrogate as bytes
    assert "y, line 2 is not UTF-8" in line_of(tmp_path / "y")
    (tmp_path / "z").write_text(json.dumps({"k" * 10**6: 1}) + "\n")
    assert "is not a key of" in line_of(tmp_path / "z")


def test_one_json_value_over_many_lines_names_the_command(tmp_path: Path) -> None:
    (tmp_path / "x").write_text(json.dumps([{"text": "a"}], indent=1))
    assert "fix: data.source=json" in line_of(tmp_path / "x")


def archive_of(kind: str, folder: Path) -> bytes:
    path = folder / "archive"
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            archive.add(__file__, "a.txt")
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "text")
    elif kind == "sqlite":
        with sqlite3.connect(path) as database:
            database.execute("create table t (text text)")
    elif kind == "arrow stream":
        with pa.ipc.new_stream(str(path), pa.schema({"text": pa.string()})):
            pass
    return path.read_bytes()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda f: archive_of("zip", f), "a zip archive"),
        (lambda f: archive_of("tar", f), "a tar archive"),
        (lambda f: gzip.compress(archive_of("tar", f)), "a tar archive"),
        (lambda f: bz2.compress(archive_of("zip", f)), "a zip archive"),
        (lambda f: gzip.compress(gzip.compress(b"text" * 100)), "compressed by gzip"),
        (lambda f: zlib.compress(b"text" * 100), "compressed by zlib"),
        (lambda f: archive_of("sqlite", f), "an SQLite database"),
        (lambda f: archive_of("arrow stream", f), "an Arrow stream"),
        (lambda f: parquet(["a"]), "a Parquet file"),
        (lambda f: b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive"),
        (lambda f: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF document"),
        (lambda f: b"\x89HDF\r\n\x1a\n\0", "an HDF5 file"),
        (lambda f: b"LZIP\x01\x0c" + bytes(range(30)), "compressed by lzip"),
        (lambda f: b"\x1f\x9d\x90text", "compressed by compress"),
        (lambda f: np.lib.format.magic(1, 0) + b"v", "a NumPy array"),
        (lambda f: "Zürich\n".encode("utf-16"), "UTF-16 text"),
        (lambda f: "Zürich\n".encode("utf-32"), "UTF-32 text"),
        (lambda f: b'{"text": "a"}\n'.decode().encode("utf-16-le"), "UTF-16LE text"),
        (lambda f: b'{"text": "a"}\n'.decode().encode("utf-32-be"), "UTF-32BE text"),
        (lambda f: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
        (lambda f: bytes(5000), "a file of zero bytes"),
        (lambda f: random.Random(0).randbytes(5000), "binary data"),
    ],
)
@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_other_formats_are_named(
    tmp_path: Path, make: Callable[[Path], bytes], name: str, source: str
) -> None:
    (tmp_path / "x").write_bytes(make(tmp_path))
    if source == "parquet":
        if "Parquet" not in name:
            assert "is not a Parquet file" in line_of(tmp_path / "x", source)
        return
    line = line_of(tmp_path / "x", source)
    assert name in line
    assert ("iconv" in line) == ("UTF-" in name and "binary" not in name)


def test_text_that_looks_like_a_magic_number_stays_text(tmp_path: Path) -> None:
    for text in (
        "BZh is how bzip2 starts",
        "ORC and human",
        "PAR1 is par",
        "RIFF raff",
        "070701 is a number",
        "x^2",
    ):
        (tmp_path / "x").write_text(text)
        assert read(tmp_path / "x", "text") == [text]


def test_latin1_is_converted_by_iconv_only_where_that_helps(tmp_path: Path) -> None:
    text = "Zürich und Köln\n".encode("latin-1") * 20
    (tmp_path / "x").write_bytes(text)
    assert f"fix: iconv -f ENCODING -t UTF-8 {tmp_path / 'x'} > NEW_FILE" in line_of(tmp_path / "x", "text")
    for codec, compress in CODECS.items():
        (tmp_path / codec).write_bytes(compress(text))
        line = line_of(tmp_path / codec, "text")
        assert "holds text that is not UTF-8" in line
        assert "iconv" not in line


def test_bombs_are_refused_before_they_fill_memory_or_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "BOMB_BYTES", 2**20)
    zeros = b" " * (8 * 2**20)
    for codec in ("gzip", "bzip2", "xz", "zstd"):
        (tmp_path / codec).write_bytes(CODECS[codec](zeros))
        for source in ("text", "jsonl"):
            assert "expands to more than 200 times" in line_of(tmp_path / codec, source)
    # A value that is repeated: in the file once, in the table a thousand times.
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), ["x" * 10_000])
    pq.write_table(pa.table({"text": repeated}), tmp_path / "repeated")
    pq.write_table(pa.table({"text": [zeros.decode()]}), tmp_path / "long", compression="zstd")
    for name in ("repeated", "long"):
        assert "expands to more than 200 times" in line_of(tmp_path / name, "parquet")
    # Prose that shrinks as prose does is not a bomb.
    write_jsonl(tmp_path / "prose", documents(4000))
    (tmp_path / "prose.gz").write_bytes(gzip.compress((tmp_path / "prose").read_bytes()))
    assert len(read(tmp_path / "prose.gz")) == 4000


@pytest.mark.slow
def test_a_large_bomb_takes_bounded_memory(tmp_path: Path) -> None:
    """1 GiB out of 1 MB of gzip, and 20 GB out of a Parquet file of 100 kB, with 1 GiB of address space."""
    with gzip.open(tmp_path / "x.gz", "wb", compresslevel=9) as file:
        for _ in range(1024):
            file.write(b" " * 2**20)
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), ["x" * 10**6])
    pq.write_table(pa.table({"text": repeated}), tmp_path / "x.parquet")
    code = (
        "import pyarrow.parquet, sys, resource\n"
        "from harness.data import local_files; from harness.data.row_files import RowLayout\n"
        "from harness.errors import InputError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "from pathlib import Path\n"
        "try: sum(1 for _ in local_files.read([Path(sys.argv[1])], RowLayout(sys.argv[2]), 'text'))\n"
        "except InputError as error: print(error)\n"
    )
    for name, source in (("x.gz", "text"), ("x.gz", "jsonl"), ("x.parquet", "parquet")):
        words = [sys.executable, "-c", code, str(tmp_path / name), source]
        out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert "expands to more than 200 times" in out or "line 1 is longer than 256 MiB" in out


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "MAX_LINE_BYTES", 2**20)
    (tmp_path / "x").write_text('{"text": "a"}\n{"text": "' + "b" * 2**21)
    assert "x, line 2 is longer than 1 MiB" in line_of(tmp_path / "x")


SPECIAL: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pipe": (os.mkfifo, "is a named pipe"),
    "socket": (lambda path: socket.socket(socket.AF_UNIX).bind(str(path)), "is a socket"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "dangling": (
        lambda path: path.symlink_to("nowhere"),
        "is a symbolic link to nowhere, which does not exist",
    ),
    "loop": (lambda path: path.symlink_to(path.name), "cannot be read"),
    "folder": (Path.mkdir, "is a folder"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_not_a_file_is_refused_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    make, reason = SPECIAL[kind]
    make(Path("x.jsonl"))
    assert reason in line_of(Path("x.jsonl"))
    if kind != "folder":
        with pytest.raises(InputError, match=reason):
            local_files.find(["x*"], "jsonl")


@pytest.mark.parametrize("closed", ["x.jsonl", "."])
def test_a_file_that_may_not_be_read(open_folder: Path, closed: str) -> None:
    path = open_folder / "folder" / "x.jsonl"
    path.parent.mkdir()
    write_jsonl(path, ["a"])
    code = (
        "import os, sys; from harness.data import local_files; from harness.errors import InputError\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "try: local_files.find([sys.argv[1]], 'jsonl')\n"
        "except InputError as error: print(error)\n"
    )
    (path.parent / closed).chmod(0)
    for pattern in (path, path.parent / "*"):
        words = [sys.executable, "-c", code, str(pattern)]
        out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert "cannot be read (Permission denied" in out
    (path.parent / closed).chmod(0o755)
