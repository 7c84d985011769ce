"""Logs in the form of modded-nanogpt's track 3 with known losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def track3_log(
    final: float, *, steps: Sequence[int] = (0, 100, 200, 300), planned: int = 300, seconds: float = 0.5
) -> str:
    """A log whose losses fall from 10.8 to ``final``, with the lines around that real logs have."""
    losses = np.linspace(10.8, final, len(steps))
    rows = [
        f"step:{step}/{planned} val_loss:{loss:.5f} train_time:{seconds * step:.3f}s step_avg:{1000 * seconds:.2f}ms"
        for step, loss in zip(steps, losses, strict=True)
    ]
    return "\n".join(["import torch", "step_size = 3", *rows, ""])


def write_arm(folder: Path, finals: Sequence[float], **options: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, final in enumerate(finals):
        # The seconds of two runs are never equal.
        text = track3_log(final, seconds=0.5 + index / 1000, **options)  # type: ignore[arg-type]
        (folder / f"{index}.txt").write_text(text)
