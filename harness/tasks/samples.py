"""Examples as arrays of a micro-batch: in the order of the run, alike in length, padded to the longest. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from harness.data import Order

Ids = NDArray[np.int64]
MULTIPLE = 8
"""Lengths of rows are multiples of it (tensor cores take whole tiles, and fewer shapes are compiled)."""


class Split(Protocol):
    """What is read of a split of examples (`harness.tasks.examples.ExampleSplit`)."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of each example, ``(examples,)``."""
        ...

    def __len__(self) -> int: ...


class MakeBatch(Protocol):
    """Make the arrays of a micro-batch from examples of a split."""

    def __call__(self, indices: Sequence[int]) -> tuple[np.ndarray, ...]:
        """Return the arrays whose meaning the task's objective knows, one row an example."""
        ...


class ExampleSamples:
    """The `Samples` of a run over examples, in a fresh permutation each epoch.

    The samples of a step are cut into micro-batches by length, so that few rows are padded. The cut depends on the step
    and on ``micro_batch_size``, not on the number of processes; each process gets long and short micro-batches.

    Args:
        split: of the training data.
        order: of the run, over as many examples.
        batch_size: samples of a step.
        micro_batch_size: samples of a micro-batch, a divisor of ``batch_size``.
        collate: makes a micro-batch.
        loss_tokens: tokens with a loss of each example, ``(examples,)``; None: the loss is divided by examples.

    Attributes:
        length: examples.
    """

    def __init__(
        self,
        split: Split,
        order: Order,
        batch_size: int,
        micro_batch_size: int,
        collate: MakeBatch,
        loss_tokens: NDArray[np.integer] | None = None,
    ) -> None:
        self.length = len(split)
        self._order, self._collate = order, collate
        self._batch_size, self._micro = batch_size, micro_batch_size
        self._places = spread(batch_size // micro_batch_size)
        self._lengths, self._loss_tokens = split.lengths, loss_tokens

    def rows(self, first: int, count: int) -> tuple[np.ndarray, ...]:
        """Return the samples ``first`` … ``first + count - 1`` of the run, padded to the longest of them."""
        begin = first // self._batch_size * self._batch_size
        end = -(-(first + count) // self._batch_size) * self._batch_size
        indices = self._order.take(begin, end - begin).reshape(-1, self._batch_size)
        longest_first = np.argsort(-self._lengths[indices], axis=1, kind="stable")
        by_length = np.take_along_axis(indices, longest_first, axis=1)
        cut = by_length.reshape(len(indices), -1, self._micro)[:, self._places].reshape(-1)
        return self._collate(cut[first - begin : first - begin + count].tolist())

    def loss_tokens(self, first: int, count: int) -> int:
        """Return the tokens with a loss of these samples, or their number."""
        if self._loss_tokens is None:
            return count
        return int(self._loss_tokens[self._order.take(first, count)].sum())

    def tokens(self, first: int, count: int) -> int:
        """Return the tokens of these samples, padding not included."""
        return int(self._lengths[self._order.take(first, count)].sum())


def spread(count: int) -> list[int]:
    """Return 0 … ``count - 1`` in the order of their reversed bits: each stretch holds small and large numbers.

    Processes take stretches of it. With as many as a power of two, they also hold neighbours at the same time.
    """
    bits = max(count - 1, 0).bit_length()
    return sorted(range(count), key=lambda number: int(f"{number:0{bits}b}"[::-1], 2) if bits else 0)


def padded_length(longest: int, seq_len: int) -> int:
    """Return the length of the rows of a micro-batch: the next multiple of `MULTIPLE`, at most ``seq_len``."""
    return max(longest, min(-(-longest // MULTIPLE) * MULTIPLE, seq_len))


def pad(rows: Sequence[NDArray[np.integer]], length: int, value: int) -> Ids:
    """Return rows of different lengths filled up on the right: (rows, length) int64."""
    padded = np.full((len(rows), length), value, dtype=np.int64)
    for target, row in zip(padded, rows):
        target[: len(row)] = row
    return padded


def batches_by_length(lengths: NDArray[np.integer], size: int) -> list[list[int]]:
    """Return all examples in batches of ``size``, longest first, so that few rows are padded.

    The order depends on the lengths alone; the last batch may be smaller.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    return [order[start : start + size] for start in range(0, len(order), size)]
