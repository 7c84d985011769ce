"""What a path or pattern in `data.files` means, whatever characters the names hold."""

from __future__ import annotations

import glob
import os
import shlex
from pathlib import Path

import pytest

from harness.config import compose
from harness.data import local_files
from harness.errors import InputError
from harness.files import paths

NAMES = [
    "a[1].jsonl",
    "[abc].jsonl",
    "[!x]y",
    "what?.jsonl",
    "all*.jsonl",
    "**",
    "with space.jsonl",
    " leading",
    "~tilde",
    "a{b,c}.jsonl",
    "quote'\".jsonl",
    "$HOME",
    "-dash",
    "line\nbreak",
    "émoji 🙂.jsonl",
    "back\\slash",
    "bytes\udcff",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["name", "folder"])
def test_an_existing_file_is_taken_before_a_pattern(tmp_path: Path, name: str, place: str) -> None:
    path = tmp_path / name if place == "name" else tmp_path / name / "x.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    # What the name would match as a pattern must not come instead.
    for decoy in ("a1.jsonl", "b.jsonl", "whats.jsonl", "allx.jsonl", "zy"):
        other = tmp_path / decoy if place == "name" else tmp_path / decoy / "x.jsonl"
        other.parent.mkdir(exist_ok=True)
        other.write_text("")
    assert local_files.find([str(path)], "jsonl") == [path]
    # Escaped as the message says, it is the same file.
    assert local_files.find([glob.escape(str(path))], "jsonl") == [path]
    if place == "folder":
        assert local_files.find([f"{path.parent}/*.jsonl"], "jsonl") == [path]
        assert local_files.find([f"{path.parent}/**/x.*"], "jsonl") == [path]


def test_relative_paths_and_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("d[1]").mkdir()
    Path("d[1]/a.txt").write_text("")
    for pattern in ("d[1]/a.txt", "d[1]/*.txt", "./d[1]/?.txt", "d[[]1]/*.txt"):
        assert [p.name for p in local_files.find([pattern], "text")] == ["a.txt"], pattern
    assert local_files.find(["~/d[1]/*.txt"], "text") == [tmp_path / "d[1]" / "a.txt"]
    for name in ("~nobody_of_this_name/x", "x" * 300, "nul\0byte", ""):
        with pytest.raises(InputError, match="matches no file"):
            local_files.find([name], "text")


def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a[0].txt").write_text("")
    (tmp_path / "link[0]").symlink_to("real")
    (tmp_path / "b.txt").symlink_to("real/a[0].txt")
    assert [p.name for p in local_files.find([f"{tmp_path}/link[0]/*"], "text")] == ["a[0].txt"]
    assert [p.name for p in local_files.find([f"{tmp_path}/*.txt"], "text")] == ["b.txt"]


def test_a_pattern_that_matches_nothing_says_how_to_escape(tmp_path: Path) -> None:
    (tmp_path / "a1.txt").write_text("")
    assert [p.name for p in local_files.find([f"{tmp_path}/a[1].txt"], "text")] == ["a1.txt"]
    with pytest.raises(
        InputError, match=r"matches no file; allowed: .*a \[ that is part of a name is written \[\[\]"
    ):
        local_files.find([f"{tmp_path}/b[1].txt"], "text")
    (tmp_path / "sub").mkdir()
    with pytest.raises(InputError, match=r"matches no file, only folders|is a folder"):
        local_files.find([f"{tmp_path}/su*"], "text")


def test_a_list_in_quotes_is_seen_through(tmp_path: Path) -> None:
    path = tmp_path / "a[1].txt"
    path.write_text("")
    with pytest.raises(InputError) as error:
        local_files.find([f"[{path}]"], "text")
    assert str(error.value).endswith(f"""fix: 'data.files=["{path}"]'""")


@pytest.mark.parametrize("name", [n for n in NAMES if "\udcff" not in n and "\n" not in n])
def test_the_words_that_a_message_suggests_can_be_typed(name: str) -> None:
    (typed,) = shlex.split(paths.listed("data.files", f"/tmp/{name}/*"))
    assert compose.load(["data=text", typed]).data.files == [f"/tmp/{name}/*"]


def test_kinds(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    assert paths.kind(tmp_path / "f") is None
    assert paths.kind(tmp_path) == "is a folder"
    assert paths.kind(tmp_path / "none") == "does not exist"
    assert str(paths.kind("x" * 300)).startswith("cannot be read")
    os.mkfifo(tmp_path / "p")
    assert paths.kind(tmp_path / "p") == "is a named pipe, not a file"
