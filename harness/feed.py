"""Rows of tokens for one process' share of every step, on its device."""

from __future__ import annotations

import numpy as np
import torch

from harness.data.batches import Batches

MicroBatch = tuple[torch.Tensor, torch.Tensor]
"""Input ids and labels, ``(micro_batch_size, seq_len)`` int64."""


class Feed:
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

    def step(self, step: int) -> list[MicroBatch]:
        """This process' micro-batches of a step."""
        first = step * self._batch_size + self._rank * self._share
        return [
            to_device(self._batches.rows(first + offset, self._micro), self._device)
            for offset in range(0, self._share, self._micro)
        ]

    def loss_tokens(self, step: int) -> int:
        """Tokens that carry loss in the whole global batch of a step, without communication."""
        return self._batches.loss_tokens(step * self._batch_size, self._batch_size)

    def epoch(self, step: int) -> float:
        """Passes over the training split after a step."""
        return (step + 1) * self._batch_size / self._batches.length


def to_device(rows: tuple[np.ndarray, np.ndarray], device: torch.device) -> MicroBatch:
    """Move a pair of numpy arrays to the device, without waiting for it."""
    ids, labels = (torch.from_numpy(array) for array in rows)
    if device.type == "cuda":
        ids, labels = ids.pin_memory(), labels.pin_memory()
    return ids.to(device, non_blocking=True), labels.to(device, non_blocking=True)
