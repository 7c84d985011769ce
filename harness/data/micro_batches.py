"""Micro-batches of one process' share of every step, and validation rows, on its device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from harness.data.batches import Batches, Validation

if TYPE_CHECKING:
    from harness.protocols import MicroBatch


class MicroBatchLoader:
    """Cuts step s of the run, samples s·B … (s+1)·B−1, into this process' micro-batches.

    Which samples a step holds depends on the step alone; process r of W takes the r-th W-th of them.
    """

    def __init__(
        self,
        batches: Batches,
        *,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self._batches, self._batch_size, self._micro = batches, batch_size, micro_batch_size
        self._share = batch_size // world_size
        self._rank, self._device = rank, device

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Return this process' micro-batches of a step, on its device."""
        first = step * self._batch_size + self._rank * self._share
        return [
            _to_device(self._batches.rows(first + offset, self._micro), self._device)
            for offset in range(0, self._share, self._micro)
        ]

    def loss_tokens(self, step: int) -> int:
        """Return how many tokens carry loss in the global batch of a step, without communication."""
        return self._batches.loss_tokens(step * self._batch_size, self._batch_size)

    def epoch(self, step: int) -> float:
        """Return the passes over the training split after a step."""
        return (step + 1) * self._batch_size / self._batches.length


class ValidationLoader:
    """Rows of the validation split, on this process' device.

    Args:
        validation: the split.
        device: of this process.
    """

    def __init__(self, validation: Validation, device: torch.device) -> None:
        self._validation, self._device = validation, device

    def count(self, tokens: int) -> int:
        """Return how many rows hold ``tokens`` tokens."""
        return self._validation.count(tokens)

    def rows(self, start: int, count: int) -> MicroBatch:
        """Return ``count`` rows from row ``start`` on."""
        return _to_device(self._validation.batch(start, count), self._device)


def _to_device(rows: tuple[np.ndarray, np.ndarray], device: torch.device) -> MicroBatch:
    """Move a pair of numpy arrays to the device, without waiting for it."""
    ids, labels = (torch.from_numpy(array) for array in rows)
    if device.type == "cuda":
        ids, labels = ids.pin_memory(), labels.pin_memory()
    return ids.to(device, non_blocking=True), labels.to(device, non_blocking=True)
