"""The run folder: whole files, refusals, attempts."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.synchronize
from pathlib import Path

import pytest

from harness.config.errors import InputError
from harness.config.schema import RunConfig
from harness.record import atomic, folder


def _config(**changes: object) -> RunConfig:
    return RunConfig.model_validate({"world_size": 1, "micro_batch_size": 4, **changes})


def _finished(path: Path, identity: str = "aaaa") -> None:
    run = folder.RunFolder(path, _config(), identity)
    run.begin(0)
    run.add_row({"step": 1, "train/loss": 2.0})
    run.set_state("finished", step=1)
    run.close(done=True)


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
    run.close(done=False)


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert folder.read_rows(path) == [{"step": 1}, {"step": 2}]


def test_keys_that_the_table_does_not_know_cannot_be_written(tmp_path: Path) -> None:
    run = folder.RunFolder(tmp_path / "run", _config(), "aaaa")
    with pytest.raises(AssertionError, match="train/lossy"):
        run.add_row({"train/lossy": 1.0})
    run.close(done=False)


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
    with pytest.raises(InputError, match="holds files that are not a run"):
        folder.check(tmp_path / "run", _config(), "aaaa")


def test_overwrite_moves_the_old_run_aside(tmp_path: Path) -> None:
    _finished(tmp_path / "run")
    run = folder.RunFolder(tmp_path / "run", _config(overwrite=True), "bbbb")
    run.close(done=False)
    aside = list(tmp_path.glob(".run.replaced-*"))
    assert len(aside) == 1
    assert (aside[0] / "DONE").exists()
    assert not (tmp_path / "run" / "DONE").exists()


@pytest.mark.parametrize(("first_step", "kept"), [(0, []), (1, [1]), (5, [1, 2])])
def test_an_unfinished_run_starts_a_new_attempt_and_keeps_the_old_metrics(
    first_step: int, kept: list[int], tmp_path: Path
) -> None:
    rows: list[folder.Row] = [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.5}]
    first = folder.RunFolder(tmp_path / "run", _config(), "aaaa")
    first.begin(0)
    for row in rows:
        first.add_row(row)
    first.wandb_run_id = "abc"
    first.set_state("interrupted", step=2, reason="signal")
    first.ask_to_be_requeued(2)
    first.close(done=False)
    second = folder.RunFolder(tmp_path / "run", _config(), "aaaa")
    assert second.wandb_run_id == "abc"
    assert not (tmp_path / "run" / folder.REQUEUE).exists()
    assert [row["step"] for row in second.begin(first_step)] == kept
    second.add_row({"step": first_step + 1})
    second.close(done=False)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert [attempt["state"] for attempt in status["attempts"]] == ["interrupted", "running"]
    assert [attempt["first_step"] for attempt in status["attempts"]] == [0, first_step]
    assert folder.read_rows(tmp_path / "run" / "metrics.attempt1.jsonl") == rows
    now = folder.read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in now] == [*kept, first_step + 1]


def _hold(
    path: str, ready: multiprocessing.synchronize.Event, stop: multiprocessing.synchronize.Event
) -> None:
    run = folder.RunFolder(Path(path), _config(), "aaaa")
    ready.set()
    stop.wait(60)
    run.close(done=False)


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
    folder.RunFolder(tmp_path / "run", _config(), "aaaa").close(done=False)


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
    # Anything else that is no run is still refused.
    (tmp_path / "other" / folder.JOBS).mkdir(parents=True)
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds files that are not a run"):
        folder.RunFolder(tmp_path / "other", _config(), "aaaa")
