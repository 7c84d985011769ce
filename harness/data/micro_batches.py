"""Micro-batches of one process' share of every step, and validation rows, on its device."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from harness.data.batches import Validation

if TYPE_CHECKING:
    from harness.protocols import MicroBatch, Samples


class _Share(NamedTuple):
    """This process' part of a step.

    Attributes:
        batches: on the device.
        loss_tokens: of all processes: what the loss sum is divided by.
        tokens: of all processes, without padding.
        copied: recorded on the copying stream after the last copy; None on a CPU.
    """

    batches: list[MicroBatch]
    loss_tokens: int
    tokens: int
    copied: torch.Event | None


class MicroBatchLoader:
    """Cuts step s of the run, samples s·B … (s+1)·B−1, into this process' micro-batches.

    Which samples a step holds depends on the step alone; process r of W takes the r-th W-th of them. While a step
    computes, a thread reads the next one; on CUDA it also copies it to the device, on a stream of its own. Nothing is
    counted as used before `micro_batches` returns it, so there is no state to resume.

    Args:
        samples: of the run.
        batch_size: samples of all processes in a step.
        micro_batch_size: samples of a micro-batch.
        rank: of this process.
        world_size: processes.
        device: of this process.
        steps: of the run; later ones are not read ahead.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
        steps: int,
    ) -> None:
        self._samples, self._batch_size, self._micro = samples, batch_size, micro_batch_size
        self._share = batch_size // world_size
        self._rank, self._device, self._steps = rank, device, steps
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # One thread, which reads everything: the order of the samples keeps its last block without a lock.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._ahead: tuple[int, Future[_Share]] | None = None
        self._counts: tuple[int, int, int] | None = None
        """Step that was returned last, its loss tokens and its tokens."""

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Return this process' micro-batches of a step, on its device.

        Raises:
            OSError: the corpus cannot be read any more.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != step:
            # The first step, or one after a jump: what was read ahead is not this one.
            ahead = (step, self._thread.submit(self._read, step))
        share = ahead[1].result()
        if step + 1 < self._steps:
            self._ahead = (step + 1, self._thread.submit(self._read, step + 1))
        self._counts = (step, share.loss_tokens, share.tokens)
        if share.copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(share.copied)
            for tensor in (tensor for batch in share.batches for tensor in batch):
                # Else its memory could be given to the next copy while this step still reads it.
                tensor.record_stream(stream)
        return share.batches

    def loss_tokens(self, step: int) -> int:
        """Return how many tokens carry loss in the global batch of a step, without communication."""
        return self._counts_of(step)[1]

    def tokens(self, step: int) -> int:
        """Return the tokens of the global batch of a step, padding not included, without communication."""
        return self._counts_of(step)[2]

    def epoch(self, step: int) -> float:
        """Return the passes over the training split after a step."""
        return (step + 1) * self._batch_size / self._samples.length

    def close(self) -> None:
        """End the reading thread."""
        self._thread.shutdown(cancel_futures=True)

    def _read(self, step: int) -> _Share:
        first = step * self._batch_size + self._rank * self._share
        copied: torch.Event | None = None
        # A thread has a current device of its own, which is the first one.
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            batches = [
                to_device(self._samples.rows(first + offset, self._micro), self._device)
                for offset in range(0, self._share, self._micro)
            ]
            if self._stream is not None:
                copied = self._stream.record_event()
        return _Share(batches, *self._count(step)[1:], copied)

    def _counts_of(self, step: int) -> tuple[int, int, int]:
        if self._counts is None or self._counts[0] != step:
            self._counts = self._thread.submit(self._count, step).result()
        return self._counts

    def _count(self, step: int) -> tuple[int, int, int]:
        first, count = step * self._batch_size, self._batch_size
        return step, self._samples.loss_tokens(first, count), self._samples.tokens(first, count)


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
        return to_device(self._validation.batch(start, count), self._device)


def to_device(rows: tuple[np.ndarray, ...], device: torch.device) -> MicroBatch:
    """Move numpy arrays to the device, without waiting for it."""
    tensors = (torch.from_numpy(array) for array in rows)
    if device.type == "cuda":
        tensors = (tensor.pin_memory() for tensor in tensors)
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)
