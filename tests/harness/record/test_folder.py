"""The run folder: whole files, refusals, attempts."""

from __future__ import annotations

import errno
import json
import multiprocessing
import multiprocessing.synchronize
import os
import stat
from pathlib import Path

import pytest

from harness.config.identity import identity
from harness.config.schema import RunConfig
from harness.errors import InputError
from harness.files import atomic
from harness.protocols import MetricRow
from harness.record import folder, readers


def _config(**changes: object) -> RunConfig:
    return RunConfig.model_validate({"world_size": 1, "micro_batch_size": 4, **changes})


def _finished(path: Path, identity: str = "aaaa") -> None:
    run = folder.RunFolder(path, _config(), identity)
    run.begin(0)
    run.add_row({"step": 1, "train/loss": 2.0})
    run.end("finished", step=1, reason="")


def test_rows_are_complete_lines_and_not_finite_values_are_null(tmp_path: Path) -> None:
    run = folder.RunFolder(tmp_path / "run", _config(), "aaaa")
    run.begin(0)
    run.add_row({"step": 1, "train/loss": float("nan"), "grad_norm": float("inf")})
    run.add_row({"step": 2, "train/loss": 1.5})
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == [
        {"step": 1, "train/loss": None, "grad_norm": None},
        {"step": 2, "train/loss": 1.5},
    ]
    run.close()


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert readers.metrics(path)[0] == [{"step": 1}, {"step": 2}]


def test_keys_that_the_table_does_not_know_cannot_be_written(tmp_path: Path) -> None:
    run = folder.RunFolder(tmp_path / "run", _config(), "aaaa")
    with pytest.raises(AssertionError, match="train/lossy"):
        run.add_row({"train/lossy": 1.0})
    run.close()


def test_a_finished_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    _finished(tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(InputError, match="is a finished run") as caught:
        folder.check(tmp_path / "run", _config(), "aaaa")
    assert "overwrite=true" in str(caught.value)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


def test_a_run_of_another_identity_is_refused_naming_both_and_the_keys(tmp_path: Path) -> None:
    _finished(tmp_path / "run", "aaaa")
    with pytest.raises(InputError) as caught:
        folder.check(tmp_path / "run", _config(seed=3), "bbbb")
    assert "aaaa" in str(caught.value)
    assert "bbbb" in str(caught.value)
    assert "seed" in str(caught.value)


def test_files_that_are_no_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds files, but no run"):
        folder.check(tmp_path / "run", _config(), "aaaa")


def test_overwrite_moves_the_old_run_aside(tmp_path: Path) -> None:
    _finished(tmp_path / "run")
    run = folder.RunFolder(tmp_path / "run", _config(overwrite=True), "bbbb")
    run.close()
    aside = list(tmp_path.glob(".run.replaced-*"))
    assert len(aside) == 1
    assert (aside[0] / "DONE").exists()
    assert not (tmp_path / "run" / "DONE").exists()


@pytest.mark.parametrize(("first_step", "kept"), [(0, []), (1, [1]), (5, [1, 2])])
def test_an_unfinished_run_starts_a_new_attempt_and_keeps_the_old_metrics(
    first_step: int, kept: list[int], tmp_path: Path
) -> None:
    rows: list[MetricRow] = [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.5}]
    first = folder.RunFolder(tmp_path / "run", _config(), "aaaa")
    first.begin(0)
    for row in rows:
        first.add_row(row)
    first.wandb_run_id = "abc"
    first.set_state("interrupted", step=2, reason="signal")
    first.ask_to_be_requeued(2)
    first.close()
    second = folder.RunFolder(tmp_path / "run", _config(), "aaaa")
    assert second.wandb_run_id == "abc"
    assert not (tmp_path / "run" / folder.REQUEUE).exists()
    assert [row["step"] for row in second.begin(first_step)] == kept
    second.add_row({"step": first_step + 1})
    second.close()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert [attempt["state"] for attempt in status["attempts"]] == ["interrupted", "running"]
    assert [attempt["first_step"] for attempt in status["attempts"]] == [0, first_step]
    superseded = tmp_path / "run" / folder.SUPERSEDED
    if kept == [1, 2]:
        assert not superseded.exists()
    else:
        marker, *old = [json.loads(line) for line in superseded.read_text().splitlines()]
        assert marker == {"attempt": 2, "goes_on_after": first_step, "rows": 2 - len(kept)}
        assert old == rows[len(kept) :]
    now, _ = readers.metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in now] == [*kept, first_step + 1]


def _hold(
    path: str, ready: multiprocessing.synchronize.Event, stop: multiprocessing.synchronize.Event
) -> None:
    run = folder.RunFolder(Path(path), _config(), "aaaa")
    ready.set()
    stop.wait(60)
    run.close()


def test_two_processes_cannot_write_to_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path / "run"), ready, stop))
    holder.start()
    try:
        assert ready.wait(60)
        with pytest.raises(InputError, match="is being written to by another run"):
            folder.RunFolder(tmp_path / "run", _config(), "aaaa")
    finally:
        stop.set()
        holder.join(30)
    folder.RunFolder(tmp_path / "run", _config(), "aaaa").close()


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    atomic.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_the_folder_of_batch_scripts_may_be_there_before_the_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    (path / folder.JOBS).mkdir(parents=True)
    (path / folder.JOBS / "submit.sbatch").touch()
    _finished(path)
    assert (path / "DONE").exists()
    assert (path / folder.JOBS / "submit.sbatch").exists()
    # Anything else that is not a run is still refused.
    (tmp_path / "other" / folder.JOBS).mkdir(parents=True)
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds files, but no run"):
        folder.RunFolder(tmp_path / "other", _config(), "aaaa")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ('{"step": 2, "train/loss": 1.5', "1 line of metrics.jsonl"),
        ('{"train/loss": 1.5}', "it has no step"),
        ('{"step": "two"}', "its step is not a whole number"),
        ('{"step": -1}', "its step is not a whole number"),
        ("[" * 9000, "1 line of metrics.jsonl"),
        ("[]", "no object"),
        ('{"step": ' + "9" * 5000 + "}", "1 line of metrics.jsonl"),
        ('{"step": 2, "train/lo\x00ss": {}}', "1 line of metrics.jsonl"),
        ("\ufffd\ud800", "1 line of metrics.jsonl"),
    ],
)
def test_a_broken_line_in_the_middle_is_skipped_counted_and_kept(
    broken: str, said: str, tmp_path: Path
) -> None:
    first = folder.RunFolder(tmp_path / "run", _config(), "aaaa")
    first.begin(0)
    first.end("interrupted", step=9, reason="")
    lines = [b'{"step": 1}', broken.encode("utf-8", "surrogatepass"), b'{"step": 3}', b'{"step": 9}', b""]
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"\n".join(lines))
    second = folder.RunFolder(tmp_path / "run", _config(), "aaaa")
    assert [row["step"] for row in second.begin(5)] == [1, 3]
    second.end("interrupted", step=5, reason="")
    (problem,) = second.problems
    assert said in problem
    assert (tmp_path / "run" / "metrics.damaged.jsonl").read_bytes() == b"\n".join(lines)
    third = folder.RunFolder(tmp_path / "run", _config(), "aaaa")
    assert [row["step"] for row in third.begin(5)] == [1, 3]
    assert third.problems == []
    third.close()


def test_every_flipped_bit_of_metrics_lets_the_run_go_on(tmp_path: Path) -> None:
    first = folder.RunFolder(tmp_path / "run", _config(), "aaaa")
    first.begin(0)
    for step in (1, 2, 3):
        first.add_row({"step": step, "train/loss": 2.0})
    first.end("interrupted", step=3, reason="")
    path = tmp_path / "run" / "metrics.jsonl"
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 23):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        run = folder.RunFolder(tmp_path / "run", _config(), "aaaa")
        rows = run.begin(3)
        run.close()
        assert len(rows) in (1, 2, 3), bit
        assert all(isinstance(row["step"], int) for row in rows)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_metrics_that_are_no_file_do_not_block(kind: str, tmp_path: Path) -> None:
    folder.RunFolder(tmp_path / "run", _config(), "aaaa").end("interrupted", step=0, reason="")
    path = tmp_path / "run" / "metrics.jsonl"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    run = folder.RunFolder(tmp_path / "run", _config(), "aaaa")
    assert run.begin(0) == []
    assert "metrics.jsonl is a" in run.problems[0]
    run.close()
    assert path.is_file()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"[" * 9000, b'{"identity": 5, "attempts": 7}']
)
def test_a_damaged_status_does_not_block_the_run_whose_it_is(content: bytes, tmp_path: Path) -> None:
    """Its identity is in the summary, too, or comes from the configuration and the hashes of the corpus."""
    config = _config(steps=7)
    mine = identity(config, "corpus", "tokenizer")
    run = folder.RunFolder(tmp_path / "run", config, mine)
    run.write_json("environment.json", {"corpus_sha256": "corpus", "tokenizer_sha256": "tokenizer"})
    run.end("interrupted", step=3, reason="")
    (tmp_path / "run" / "status.json").write_bytes(content)
    with pytest.raises(InputError, match=f"belongs to run {mine}, this is run bbbb"):
        folder.RunFolder(tmp_path / "run", config, "bbbb")
    again = folder.RunFolder(tmp_path / "run", config, mine)
    assert "status.json" in again.problems[0]
    again.end("interrupted", step=3, reason="")
    (tmp_path / "run" / "status.json").write_bytes(content)
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(InputError, match="without a readable identity"):
        folder.check(tmp_path / "run", config, mine)
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"identity": mine}))
    folder.check(tmp_path / "run", config, mine)


def test_attempts_do_not_copy_the_rows_before_them(tmp_path: Path) -> None:
    """Twelve attempts that each go on one row behind where the one before ended: bytes grow with the rows done."""
    run, rows = tmp_path / "run", 0
    for attempt in range(12):
        now = folder.RunFolder(run, _config(), "aaaa")
        now.begin(max(0, 9 * attempt))
        for step in range(9 * attempt + 1, 9 * attempt + 11):
            now.add_row({"step": step})
            rows += 1
        now.end("interrupted", step=9 * attempt + 10, reason="")
    names = sorted(path.name for path in run.glob("metrics*"))
    assert names == ["metrics.jsonl", folder.SUPERSEDED]
    lines = sum(len((run / name).read_text().splitlines()) for name in names)
    assert lines == rows + 11  # each row once, and a marker for each attempt that did steps again
    assert [row["step"] for row in readers.metrics(run / "metrics.jsonl")[0]] == list(range(1, 110))


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_who_may_read_a_run_is_the_umasks_choice(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        _finished(tmp_path / "run")
        with atomic.new_folder(tmp_path / "made") as made:
            (made / "own").touch(mode=0o600)
        (tmp_path / "control").touch()
    finally:
        os.umask(before)
    expected = (tmp_path / "control").stat().st_mode
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    assert len(files) > 5
    assert {path.name for path in files if path.stat().st_mode != expected} == set()


def test_names_and_contents_are_flushed_in_the_order_that_a_power_failure_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file before its rename, its folder after; the rows before DONE, DONE before the state."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        events.append(f"name {Path(target).name}")
        replace(source, target)

    run = folder.RunFolder(tmp_path / "run", _config(), "aaaa")
    run.begin(0)
    run.add_row({"step": 1})
    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", renamed)
    run.sync_rows()
    run.end("finished", step=1, reason="")
    kinds = [event.split(".")[0] if event.startswith("sync .") else event for event in events]
    assert kinds == [
        "sync metrics.jsonl",
        "sync ",
        "name DONE",
        "sync run",
        "sync ",
        "name status.json",
        "sync run",
    ]


def test_a_state_that_cannot_be_written_takes_the_mark_of_a_finished_run_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder.RunFolder(tmp_path / "run", _config(), "aaaa")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "write_json", refuse)
    with pytest.raises(OSError, match="No space left"):
        run.end("finished", step=1, reason="")
    assert not (tmp_path / "run" / "DONE").exists()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush_folders_is_no_error(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CIFS and some FUSE file systems; the refusal is a stand-in, since this machine has none of them."""
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    atomic.write_text(tmp_path / "file", "whole")
    assert (tmp_path / "file").read_text() == "whole"


def test_a_place_that_cannot_be_written_is_bad_input(tmp_path: Path) -> None:
    """/proc refuses files, whoever asks; a file cannot hold a run."""
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/optbench/run")):
        with pytest.raises(InputError, match="cannot be written") as caught:
            folder.RunFolder(place, _config(), "aaaa")
        assert caught.value.key == "runs_dir"


def test_a_disk_without_locks_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal is a stand-in: no file system here lacks locks."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(InputError, match=r"runs_dir: .* is on .* \(mounted at .*no file locks") as caught:
        folder.RunFolder(tmp_path / "run", _config(), "aaaa")
    assert caught.value.fix == "runs_dir=FOLDER_ON_ANOTHER_DISK"
