"""What tests of faults ask of the checkpoints that a run left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness.checkpoint import store
from harness.checkpoint.files import Saved
from harness.checkpoint.store import Store


def tensors(run: Path, step: int) -> dict[tuple[str, str], torch.Tensor]:
    """(name, kind) → whole tensor of weights and optimizer state."""
    saved = Saved(Store(run).folder(step))
    found = {key: saved.whole(*key).clone() for key in saved._places}
    saved.close()
    return found


def assert_same(one: Path, other: Path, step: int) -> None:
    """Bit by bit."""
    expected, found = tensors(one, step), tensors(other, step)
    assert expected.keys() == found.keys()
    assert len(expected) > 10
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key


def assert_whole(run: Path) -> list[int]:
    """Every checkpoint that has a name is whole; returns their steps."""
    steps = Store(run).steps()
    for step in steps:
        store.verify(Store(run).folder(step))
    return steps


def wait_for_step(run: Path, step: int, said: Path | None = None) -> None:
    """Until the run has got that far.

    Args:
        run: its folder.
        step: steps done.
        said: file of its output, for the message where it does not.
    """
    _wait(lambda: status(run)["step"] >= step, f"get to step {step}", said)


def wait_for_checkpoint(run: Path, step: int, said: Path | None = None) -> None:
    """Until a checkpoint of that step or a later one has its name.

    A step that is done says nothing of this: a checkpoint is written while training goes on, and what is in the middle
    of it when a run fails or is killed is discarded.

    Args:
        run: its folder.
        step: of the checkpoint.
        said: file of its output, for the message where it does not.
    """
    _wait(lambda: max(Store(run).steps(), default=0) >= step, f"have a checkpoint of step {step}", said)


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def _wait(reached: Callable[[], bool], what: str, said: Path | None) -> None:
    until = time.monotonic() + 90
    while time.monotonic() < until:
        try:
            if reached():
                return
        except (OSError, ValueError):
            pass  # its files are not there yet
        time.sleep(0.01)
    text = said.read_text()[-2000:] if said is not None and said.exists() else ""
    raise AssertionError(f"the run did not {what}: {text}")
