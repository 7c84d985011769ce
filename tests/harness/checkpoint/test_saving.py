"""When a checkpoint is made, what it costs the loop, and what happens where there is no room for one."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from harness import engines
from harness.checkpoint import files, saving
from harness.checkpoint.saving import Checkpoints
from harness.checkpoint.store import Store
from harness.loop import Callbacks, Run, train
from harness.preparation import prepare
from harness.run import assemble, build_probes
from tests.harness.running import small, write_documents


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text"))


def assembled(corpus: Path, folder: Path, *words: str) -> tuple[Run, Callbacks, Checkpoints, list[str]]:
    prepared = prepare(small(corpus, folder, *words), say=lambda text: None, worker=True, writes_folder=False)
    run = assemble(prepared, engines.start(prepared.config))
    run.stop.restore()
    messages: list[str] = []
    probes = build_probes(run, prepared.data)
    checkpoints = Checkpoints(
        run, folder / "run", prepared.hashes(), attempt=1, say=messages.append, probes=probes
    )
    return run, Callbacks(probes, checkpoints=checkpoints), checkpoints, messages


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["checkpoint.every=3"], [8, 6]),
        (["checkpoint.every=3", "checkpoint.keep=9"], [8, 6, 3]),
        (["checkpoint.every=2", "checkpoint.keep=1", "checkpoint.keep_every=4"], [8, 4]),
        (["checkpoint.every=3", "checkpoint.background=false"], [8, 6]),
        (["checkpoint.every=4"], [8, 4]),
        (["checkpoint.every=100"], [8]),
        (["checkpoint.every=auto"], [8]),
        (["checkpoint.every=null"], []),
    ],
)
def test_every_so_many_steps_and_after_the_last(
    words: list[str], steps: list[int], corpus: Path, tmp_path: Path
) -> None:
    run, callbacks, _, messages = assembled(corpus, tmp_path, "steps=8", *words)
    assert train(run, callbacks) == "finished"
    assert Store(tmp_path / "run").steps() == steps
    assert messages == []


def test_the_best_one_stays(corpus: Path, tmp_path: Path) -> None:
    """With a learning rate that lets the loss rise at the end."""
    run, callbacks, _, _ = assembled(
        corpus,
        tmp_path,
        "steps=8",
        "eval.every=2",
        "checkpoint.every=2",
        "checkpoint.keep=1",
        "checkpoint.keep_best=true",
        "checkpoint.background=false",
    )
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 5.0}
    probe: Any = callbacks.probes[0]
    measure = probe.measure

    def measured(step: int, row: Any) -> None:
        measure(step, row)
        probe.last = (step + 1, losses[step + 1])

    probe.measure = measured
    train(run, callbacks)
    assert Store(tmp_path / "run").steps() == [8, 4]


def test_the_clock_asks_for_one_once(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags are read a step late; a checkpoint that was made meanwhile must not be made again."""
    rarely = ["log_every=100", "eval.every=null", "moments.every=null"]
    run, callbacks, checkpoints, _ = assembled(
        corpus, tmp_path, "steps=12", "checkpoint.every=auto", "checkpoint.keep=9", *rarely
    )
    now = [0.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    checkpoints._last_began = 0.0
    before = checkpoints.before_step

    def before_step() -> None:
        before()
        if run.state.step == 4:
            now[0] += saving.EVERY_S

    monkeypatch.setattr(checkpoints, "before_step", before_step)
    train(run, callbacks)
    assert Store(tmp_path / "run").steps() == [12, 6]


def test_the_loop_does_not_wait_for_the_disk(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that takes for ever: the steps go on until the next save has to wait for it."""
    run, callbacks, _, _ = assembled(corpus, tmp_path, "steps=12", "checkpoint.every=4")
    gate, write = threading.Event(), files.write
    reached: list[int] = []

    def slow(*args: Any) -> None:
        gate.wait(30)
        write(*args)

    monkeypatch.setattr(files, "write", slow)
    give = run.loader.micro_batches

    def step(number: int) -> Any:
        reached.append(number)
        if number == 6:
            assert Store(tmp_path / "run").steps() == []
            gate.set()
        return give(number)

    monkeypatch.setattr(run.loader, "micro_batches", step)
    assert train(run, callbacks) == "finished"
    assert reached[:7] == list(range(7))
    assert Store(tmp_path / "run").steps() == [12, 8]


def test_what_is_written_is_the_state_of_its_own_step(corpus: Path, tmp_path: Path) -> None:
    """Training goes on while it is written; the copy must not follow. In the foreground nothing can."""
    numbers = {}
    for name in ("background", "foreground"):
        background = str(name == "background").lower()
        run, callbacks, _, _ = assembled(
            corpus,
            tmp_path / name,
            "steps=9",
            "checkpoint.every=4",
            f"checkpoint.background={background}",
            "optimizer=sumo",
            "optimizer.rank=8",
        )
        (tmp_path / name / "run").mkdir(parents=True)
        train(run, callbacks)
        saved = files.Saved(Store(tmp_path / name / "run").folder(8))
        numbers[name] = {key: saved.whole(*key) for key in saved._places}
    assert numbers["background"].keys() == numbers["foreground"].keys()
    for key, tensor in numbers["foreground"].items():
        assert tensor.equal(numbers["background"][key]), key


def test_a_disk_without_room_is_found_before_anything_is_written(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of the disk is a stand-in: filling a real one needs a mount. `tests/faults` has a real refusal."""
    run, callbacks, _, messages = assembled(
        corpus, tmp_path, "steps=8", "checkpoint.every=2", "checkpoint.background=false"
    )
    real = shutil.disk_usage

    def usage(path: Path) -> Any:
        free = 10**12 if run.state.step < 4 else 1000
        return real(path)._replace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(saving, "RETRY_S", 0.0)
    assert train(run, callbacks) == "failed"
    assert Store(tmp_path / "run").steps() == [2]
    assert [line.split(":")[0] for line in messages] == [
        f"no checkpoint of step {n}" for n in (4, 6, 8, 8, 8)
    ]
    assert messages[0].startswith("no checkpoint of step 4: it needs 0.000")
    assert callbacks.checkpoints.problem.startswith(
        "the checkpoint of step 8 could not be written (it needs 0.000"
    )
    assert callbacks.checkpoints.problem.endswith("the same command continues from step 2")
    assert not list(Store(tmp_path / "run").path.glob(".*"))


@pytest.mark.parametrize("words", [["checkpoint.every=auto"], ["checkpoint.every=4"], ["checkpoint.every=3"]])
def test_a_last_step_that_could_not_be_saved_is_tried_again(
    words: list[str], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, callbacks, _, messages = assembled(corpus, tmp_path, "steps=8", *words)
    write, refused = files.write, []

    def once(folder: Path, *rest: Any) -> None:
        if run.state.step == 8 and not refused:
            refused.append(folder.name)
            raise OSError(28, "No space left on device")
        write(folder, *rest)

    monkeypatch.setattr(files, "write", once)
    monkeypatch.setattr(saving, "RETRY_S", 0.0)
    assert train(run, callbacks) == "finished"
    assert len(refused) == 1
    assert Store(tmp_path / "run").steps()[0] == 8
    assert callbacks.checkpoints.problem == ""
    assert "No space left on device" in messages[0]


@pytest.mark.parametrize("where", ["files.write", "commit"])
def test_a_run_whose_last_step_is_not_on_the_disk_has_failed(
    where: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused where a process writes, and where rank 0 gives the name; the older checkpoint is as it was."""
    # In the foreground: on a busy machine step 8 may come before the thread of step 5 has written.
    run, callbacks, _, _ = assembled(
        corpus, tmp_path, "steps=8", "checkpoint.every=5", "checkpoint.background=false"
    )
    target, name = (files, "write") if where == "files.write" else (Store, "commit")
    real = getattr(target, name)

    def refusing(*args: Any) -> None:
        if run.state.step == 8:
            raise OSError(122, "Disk quota exceeded")
        real(*args)

    monkeypatch.setattr(target, name, refusing)
    monkeypatch.setattr(saving, "RETRY_S", 0.0)
    assert train(run, callbacks) == "failed"
    assert Store(tmp_path / "run").steps() == [5]
    assert (
        "step 8 could not be written (OSError: [Errno 122] Disk quota exceeded)"
        in callbacks.checkpoints.problem
    )


def test_nobody_who_wants_no_checkpoint_fails_for_one(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, callbacks, _, messages = assembled(corpus, tmp_path, "steps=4", "checkpoint.every=null")
    (tmp_path / "run").write_text("no folder can be made here")
    assert train(run, callbacks) == "finished"
    assert messages == []


def test_what_a_checkpoint_replaces_may_stay_but_the_checkpoint_counts(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, callbacks, _, messages = assembled(corpus, tmp_path, "steps=4")

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Store, "prune", refuse)
    assert train(run, callbacks) == "finished"
    assert Store(tmp_path / "run").steps() == [4]
    assert "is written; what it replaces stays" in messages[0]


def test_the_last_save_is_no_training_time(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, callbacks, _, _ = assembled(corpus, tmp_path, "steps=4")
    write, slept = files.write, 0.3

    def slow(*args: Any) -> None:
        saving.time.sleep(slept)
        write(*args)

    monkeypatch.setattr(files, "write", slow)
    rows: list[Any] = []
    sink: Any = type("Rows", (), {"write": staticmethod(rows.append)})()
    callbacks = dataclasses.replace(callbacks, sinks=[sink])
    begin = saving.time.monotonic()
    assert train(run, callbacks) == "finished"
    # The same clock measures both, whatever the machine's speed is.
    assert saving.time.monotonic() - begin >= rows[-1]["wall_s"] + slept
    assert run.state.wall_s == rows[-1]["wall_s"]


def test_a_run_that_diverges_keeps_its_last_state(corpus: Path, tmp_path: Path) -> None:
    run, callbacks, _, _ = assembled(corpus, tmp_path, "steps=8", "max_skipped_steps=1")
    step = run.engine.step

    def never(max_norm: float) -> Any:
        if run.state.step >= 3:
            for p in run.model.parameters():
                if p.grad is not None:
                    p.grad.fill_(float("nan"))
        return step(max_norm)

    run.engine.step = never  # type: ignore[method-assign]
    assert train(run, callbacks) == "diverged"
    (last,) = Store(tmp_path / "run").steps()
    saved = files.Saved(Store(tmp_path / "run").folder(last))
    assert last == run.state.step < 8
    assert all(saved.whole(name, "weight").isfinite().all() for name in saved.names("weight"))
