"""What tests of faults ask of the checkpoints that a run left."""

from __future__ import annotations

import json
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


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())
