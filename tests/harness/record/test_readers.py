"""Readers of a run folder: what is right is read, what is wrong is one line, and nothing hangs or raises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.files import bounded
from harness.record import readers
from harness.record.schema import SUMMARY_KEYS

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


def put(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_right_file_is_read_whole_and_without_a_problem(tmp_path: Path) -> None:
    attempt = {"started": "2026-01-01", "state": "failed", "reason": "", "first_step": 0, "last_step": 3}
    put(
        tmp_path,
        "status.json",
        {"state": "failed", "step": 3, "identity": None, "attempts": [attempt], "x": 1},
    )
    status, problems = readers.status(tmp_path)
    assert problems == []
    assert status is not None
    assert (status.state, status.step, status.attempts[0].last_step) == ("failed", 3, 3)
    assert status.facts()["x"] == 1
    rows = [{"step": 1, "train/loss": 2.5}, {"step": 2, "train/loss": None}]
    path = put(tmp_path, "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert readers.metrics(path) == (rows, [])
    assert readers.last_rows(path) == rows


def test_absent_files_are_no_problem(tmp_path: Path) -> None:
    assert readers.status(tmp_path) == (None, [])
    assert readers.parameters(tmp_path) == ([], [])
    assert readers.metrics(tmp_path / "metrics.jsonl") == ([], [])
    assert readers.config(tmp_path / "config.yaml") == (None, [])
    assert readers.heartbeats(tmp_path) == ({}, [])


@pytest.mark.parametrize(
    ("content", "kept", "named"),
    [
        ({"state": "failed", "attempts": 7}, {"state": "failed"}, "attempts"),
        (
            {"attempts": [1, {"first_step": "x", "state": "failed"}]},
            {"attempts": [{"state": "failed"}]},
            "attempts.0",
        ),
        ({"step": True, "steps": 9}, {"steps": 9}, "step"),
        ({"step": -1, "steps": 9.0}, {"steps": 9}, "step"),
        ({"step": 1e300, "identity": ["x"]}, {}, "identity"),
        ({"state": {"a": 1}, "attempts": [{"reason": 5}, {"reason": None}]}, {"attempts": [{}, {}]}, "state"),
    ],
)
def test_a_value_of_the_wrong_type_costs_itself_and_one_line(
    tmp_path: Path, content: object, kept: dict[str, object], named: str
) -> None:
    put(tmp_path, "status.json", content)
    status, problems = readers.status(tmp_path)
    assert status is not None
    assert status.facts() == kept
    assert len(problems) == 1
    assert named in problems[0]
    assert "\n" not in problems[0]


def test_a_summary_s_nested_values_are_checked_one_by_one(tmp_path: Path) -> None:
    content = {
        "time_s": {"data": "x", "optimizer": 1.0},
        "resumed_from": [1, "x", 2],
        "lr_tuned": "yes",
        "seed": 3,
    }
    put(tmp_path, "summary.json", {**content, "val/loss": float("nan"), "train/loss": "3"})
    summary, problems = readers.summary(tmp_path)
    assert summary is not None
    assert summary.facts() == {
        "seed": 3,
        "val/loss": None,
        "time_s": {"optimizer": 1.0},
        "resumed_from": [1, 2],
    }
    assert len(problems) == 1


def test_the_fields_of_a_summary_are_documented() -> None:
    assert {
        field.alias or name for name, field in readers.Summary.model_fields.items()
    } <= SUMMARY_KEYS.keys()


def test_rows_that_cannot_be_read_are_skipped_and_counted(tmp_path: Path) -> None:
    good = [{"step": step, "train/loss": 1.5} for step in (0, 1, 2, 3)]
    broken = [
        '{"step": 2, "tra',
        '{"train/loss": 1}',
        '{"step": "two"}',
        '{"step": 1.5}',
        "[1]",
        "3",
        "\x00" * 50,
    ]
    broken += [
        "[" * 100_000,
        '{"step": ' + "9" * 5000 + "}",
        '{"step": 1, "a": ' + '{"a":' * 50 + "1" + "}" * 51,
    ]
    lines = [json.dumps(good[0]), *broken, *(json.dumps(row) for row in good[1:])]
    path = put(tmp_path, "metrics.jsonl", "\n".join(lines) + "\n")
    with path.open("ab") as file:
        file.write(b'{"step": 9, "caf\xff": 1}\n')
    rows, problems = readers.metrics(path)
    assert rows == good
    assert len(problems) == 1
    assert problems[0].startswith(f"{len(broken) + 1} lines of metrics.jsonl")
    assert "line 2" in problems[0]


def test_a_torn_last_line_is_called_torn(tmp_path: Path) -> None:
    path = put(tmp_path, "metrics.jsonl", '{"step": 1}\n{"step": 2, "tr')
    rows, problems = readers.metrics(path)
    assert rows == [{"step": 1}]
    assert problems == ["the last line of metrics.jsonl is torn (the run was killed while writing it)"]


def test_values_of_a_row_that_are_no_numbers_are_left_out_and_counted(tmp_path: Path) -> None:
    text = (
        '{"step": 1, "a": "x", "b": NaN, "c": -Infinity, "d": true, "e": '
        + "9" * 5000
        + ', "f": 2, "f": 3}\n'
    )
    rows, problems = readers.metrics(put(tmp_path, "metrics.jsonl", text))
    assert rows == [{"step": 1, "b": None, "c": None, "e": None, "f": 3}]
    json.dumps(rows, allow_nan=False)
    assert any("'f' twice" in problem for problem in problems)
    assert any("'a' in 1, 'd' in 1" in problem for problem in problems)


def test_a_new_key_in_every_row_does_not_make_a_huge_table(tmp_path: Path) -> None:
    lines = (json.dumps({"step": step, f"k{step}": 1}) for step in range(3000))
    rows, _ = readers.metrics(put(tmp_path, "metrics.jsonl", "\n".join(lines)))
    assert len(rows) == 3000
    assert len({key for row in rows for key in row}) == readers.MAX_KEYS


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "aliases expanded"),
        ("a: &a {b: *a}", "inside of what it names"),
        ("a: &a [[*a]]", "inside of what it names"),
        ("[" * 5000, "nest"),
        ('a: !!int ""', "can't be read"),
        ("a: !!timestamp soon", "can't be read"),
        ("a: !!bool perhaps", "can't be read"),
        ("a: !!python/object/apply:os.system [ls]", "can't be read"),
        ("- a\n- b", "holds no object"),
        ("a: 1\n---\nb: 2", "can't be read"),
    ],
)
def test_yaml_that_is_hostile_is_one_line(tmp_path: Path, text: str, reason: str) -> None:
    content, problems = readers.config(put(tmp_path, "config.yaml", text))
    assert content is None
    assert len(problems) == 1
    assert reason in problems[0]
    assert "\n" not in problems[0]


def test_aliases_that_stay_small_are_read(tmp_path: Path) -> None:
    text = "a: &id001 [1, 2]\nb: *id001\n2: {when: 2026-01-01, n: .inf}\n"
    content, problems = readers.config(put(tmp_path, "config.yaml", text))
    assert content == {"a": [1, 2], "b": [1, 2], "2": {"when": "2026-01-01", "n": float("inf")}}
    assert problems == []


def test_repeated_keys_surrogates_and_other_encodings_are_said(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_bytes(b'{"state": "x", "state": "failed\\ud800", "identity": "caf\xe9"}')
    status, problems = readers.status(tmp_path)
    assert status is not None
    assert (status.state, status.identity) == ("failed?", "caf�")
    assert len(problems) == 2
    content, problems = readers.config(put(tmp_path, "config.yaml", "a: 1\na: 2"))
    assert content == {"a": 2}
    assert problems == ["config.yaml gives 'a' twice: the last one is used"]


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "dangling", "socket"])
@pytest.mark.parametrize("name", ["status.json", "metrics.jsonl", "config.yaml", "parameters.json"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / name
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling":
        path.symlink_to("nowhere")
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as made:
            here = Path.cwd()
            os.chdir(tmp_path)  # the path of a socket has 100 characters at most
            made.bind(name)
            os.chdir(here)
    read = {"status.json": readers.status, "parameters.json": readers.parameters}
    content, problems = (
        read[name](tmp_path)
        if name in read
        else (readers.metrics if name == "metrics.jsonl" else readers.config)(path)
    )
    assert not content
    assert len(problems) == 1
    assert problems[0].startswith(name)


def test_size_is_limited(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    with path.open("wb") as file:
        file.truncate(bounded.JSON_LIMIT + 1)
    assert readers.status(tmp_path) == (None, ["status.json is larger than 64 MiB"])


def test_heartbeats_without_their_keys_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "heartbeat"
    folder.mkdir()
    put(folder, "rank_00000.json", {"step": 4, "where": "a.py:3 f"})
    put(folder, "rank_00001.json", {"step": 5})
    put(folder, "rank_00002.json", {"where": "x"})
    put(folder, "rank_00003.json", {"step": "x", "where": 3})
    put(folder, "rank_x.json", {"step": 1, "where": ""})
    os.mkfifo(folder / "rank_00004.json")
    beats, problems = readers.heartbeats(tmp_path)
    assert {rank: (beat.step, beat.where) for rank, beat in beats.items()} == {0: (4, "a.py:3 f"), 1: (5, "")}
    assert len(problems) == 2


def test_parameters_keep_their_good_entries(tmp_path: Path) -> None:
    entry = {"name": "w", "shape": [2, 3], "numel": 6, "rule": "sumo", "reason": "hidden"}
    put(tmp_path, "parameters.json", [entry, 3, {**entry, "shape": "2x3"}, {**entry, "numel": []}])
    found, problems = readers.parameters(tmp_path)
    assert [parameter.facts() for parameter in found] == [
        entry,
        {key: value for key, value in entry.items() if key != "shape"},
        {key: value for key, value in entry.items() if key != "numel"},
    ]
    assert len(problems) == 2


def test_the_readers_need_no_torch() -> None:
    code = "import sys, harness.record.readers; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
