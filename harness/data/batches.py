"""From a corpus to rows for a model: packed blocks, or one padded document a row.

Labels are shifted already: ``labels[t]`` is the token after ``input_ids[t]``; −100 carries no loss.
"""

from __future__ import annotations

import os
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from harness.data.corpus import Corpus
from harness.data.order import Order

Ids = NDArray[np.int64]
Mode = Literal["packed", "padded"]
IGNORED = -100


class _Split:
    """Rows of a stretch of a corpus by index, 0 ≤ index < length."""

    def __init__(self, corpus: Corpus, seq_len: int, mode: Mode, train: bool) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, not {seq_len}")
        self.corpus, self.seq_len, self.packed = corpus, seq_len, mode == "packed"
        cut, first = corpus.train_tokens, corpus.train_documents
        # As plain arrays: a slice of numpy's memmap class costs ten times a slice of an array.
        tokens, boundaries = np.asarray(corpus.tokens()), np.asarray(corpus.boundaries())
        self.tokens = tokens[:cut] if train else tokens[cut:]
        self._file = corpus.open_tokens()
        self._bytes = os.fstat(self._file.fileno()).st_size
        self.starts = boundaries[: first + 1] if train else boundaries[first:] - cut
        if self.packed:
            # The last label of a block is the first token of the next: each token but the first is a label.
            self.length = max(0, (len(self.tokens) - 1) // seq_len)
            # Overlapping views of the memory map: a row is one contiguous copy, without an index array.
            self._blocks = np.lib.stride_tricks.as_strided(
                self.tokens,
                shape=(self.length, seq_len + 1),
                strides=(seq_len * self.tokens.itemsize, self.tokens.itemsize),
                writeable=False,
            )
        else:
            self.length = len(self.starts) - 1

    def rows(self, indices: Ids) -> tuple[Ids, Ids]:
        """Return (input_ids, labels) of the rows ``indices``: two (n, seq_len) int64 arrays, C-contiguous.

        Raises:
            OSError: the file of tokens was cut short meanwhile; reading its lost pages would kill the process.
        """
        size = os.fstat(self._file.fileno()).st_size
        if size < self._bytes:
            raise OSError(
                f"{self.corpus.folder.name}/tokens.bin had {self._bytes} bytes when the run began and has {size} now"
            )
        return self._packed(indices) if self.packed else self._padded(indices)

    def loss_tokens(self, indices: Ids) -> Ids:
        """Return the number of labels ≠ −100 of each row: (len(indices),) int64."""
        if self.packed:
            return np.full(len(indices), self.seq_len, dtype=np.int64)
        # A row holds at most seq_len tokens, of which the first is not a label.
        return np.minimum(self.starts[indices + 1] - self.starts[indices], self.seq_len) - 1

    def _packed(self, indices: Ids) -> tuple[Ids, Ids]:
        blocks = self._blocks[indices]
        return blocks[:, :-1].astype(np.int64, order="C"), blocks[:, 1:].astype(np.int64, order="C")

    def _padded(self, indices: Ids) -> tuple[Ids, Ids]:
        rows = np.full((len(indices), self.seq_len + 1), self.corpus.pad_id, dtype=np.int64)
        starts = self.starts[indices]
        whole = self.starts[indices + 1] - starts
        lengths = np.minimum(whole, self.seq_len)
        for row, start, length in zip(rows, starts.tolist(), lengths.tolist()):
            row[:length] = self.tokens[start : start + length]
        if self.corpus.appends_eos:
            # Truncation by such a tokenizer leaves room for its eos (T5 in the papers' protocol).
            rows[whole > self.seq_len, self.seq_len - 1] = self.corpus.eos_id
        labels = rows[:, 1:].copy()
        # By position, not by value: the pad token may also be the eos token, which does carry loss.
        labels[np.arange(self.seq_len) >= lengths[:, None] - 1] = IGNORED
        return np.ascontiguousarray(rows[:, :-1]), labels


class Batches:
    """Training samples of a run, in its order.

    Packed: block i of ``seq_len`` tokens of the training split joined end to end (eos between documents),
    with a label for each token. Padded: one document a row, cut at ``seq_len`` tokens, filled with pads that
    carry no loss (the protocol of GaLore, Zhao et al. 2024, and of the papers compared with it).

    Args:
        corpus: from `prepare`.
        seq_len: tokens per row.
        seed: seed of the order.
        mode: ``packed`` or ``padded``.

    Attributes:
        length: samples per epoch.

    Raises:
        ValueError: the corpus holds not one sample of this length (`check` says so in the user's terms).
    """

    def __init__(self, corpus: Corpus, seq_len: int, seed: int, mode: Mode) -> None:
        self._split = _Split(corpus, seq_len, mode, train=True)
        self.length, self.seq_len, self.mode = self._split.length, seq_len, mode
        self.order = Order(corpus.sha256, seed, self.length)

    def rows(self, first: int, count: int) -> tuple[Ids, Ids]:
        """Return (input_ids, labels) of the samples ``first`` … ``first + count - 1`` of the run.

        Both are (count, seq_len) int64 arrays, across epochs too; labels are shifted, −100 where there is no
        loss.
        """
        return self._split.rows(self.order.take(first, count))

    def loss_tokens(self, first: int, count: int) -> int:
        """Return the number of labels with loss in ``rows(first, count)`` without reading tokens, so that
        each process knows it for all."""
        if self._split.packed:
            return count * self.seq_len
        return int(self._split.loss_tokens(self.order.take(first, count)).sum())

    def tokens(self, first: int, count: int) -> int:
        """Return the tokens that count as trained on, those with a loss."""
        return self.loss_tokens(first, count)

    def epoch(self, n: int) -> int:
        """Return the epoch of the ``n``-th sample, from 0."""
        return n // self.length


class Validation:
    """The validation split in its own order: the same rows for every seed, world size and micro-batch.

    Args:
        corpus, seq_len, mode: as for `Batches`.

    Attributes:
        length: rows.
        loss_tokens_available: labels that carry loss in all of them.
    """

    def __init__(self, corpus: Corpus, seq_len: int, mode: Mode) -> None:
        self._split = _Split(corpus, seq_len, mode, train=False)
        self.length, self.seq_len, self.mode = self._split.length, seq_len, mode
        per_row = self._split.loss_tokens(np.arange(self.length, dtype=np.int64))
        self._cumulative = np.cumsum(per_row)
        self.loss_tokens_available = int(self._cumulative[-1]) if self.length else 0

    def count(self, tokens: int) -> int:
        """Return the number of rows, from the first, that hold at least ``tokens`` labels with loss.

        Raises:
            ValueError: the split holds fewer.
        """
        if tokens > self.loss_tokens_available:
            raise ValueError(f"the validation split holds {self.loss_tokens_available} tokens, not {tokens}")
        return int(np.searchsorted(self._cumulative, tokens)) + 1

    def batch(self, first: int, count: int) -> tuple[Ids, Ids]:
        """Return (input_ids, labels) of the rows ``first`` … ``first + count - 1``, as `Batches.rows`.

        Raises:
            IndexError: beyond ``length``.
        """
        return self._split.rows(self._indices(first, count))

    def loss_tokens(self, first: int, count: int) -> int:
        """Return the number of labels with loss in ``batch(first, count)``."""
        return int(self._split.loss_tokens(self._indices(first, count)).sum())

    def _indices(self, first: int, count: int) -> Ids:
        if first < 0 or first + count > self.length:
            raise IndexError(f"rows {first} to {first + count} of {self.length}")
        return np.arange(first, first + count, dtype=np.int64)
