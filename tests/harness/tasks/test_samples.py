"""Examples in the order of a run, padded to the longest of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from harness.data import Order
from harness.tasks.samples import ExampleSamples, batches_by_length, pad, padded_length


class _Split:
    """Example i has i % 7 + 1 tokens, all i."""

    def __len__(self) -> int:
        return 50

    def ids(self, index: int) -> np.ndarray:
        return np.full(index % 7 + 1, index, dtype=np.int64)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(self.ids(index)) for index in range(len(self))])


def _samples(seed: int = 0, share: int = 1) -> ExampleSamples:
    split = _Split()

    def collate(indices: Sequence[int]) -> tuple[np.ndarray, ...]:
        rows = [split.ids(index) for index in indices]
        return (pad(rows, padded_length(max(map(len, rows)), 64), -1),)

    return ExampleSamples(split, Order("hash", seed, len(split)), share, collate)


def _shown(samples: ExampleSamples, cuts: Sequence[int]) -> list[int]:
    first, shown = 0, []
    for count in cuts:
        (rows,) = samples.rows(first, count)
        shown += rows[:, 0].tolist()
        first += count
    return shown


def test_the_cut_into_micro_batches_changes_neither_samples_nor_counts() -> None:
    whole = _shown(_samples(), [100])
    assert _shown(_samples(), [1] * 100) == _shown(_samples(), [7] * 14 + [2]) == whole
    assert sorted(whole[:50]) == sorted(whole[50:]) == list(range(50))
    assert whole[:50] != whole[50:]
    assert _shown(_samples(seed=1), [100]) != whole
    samples = _samples()
    assert samples.loss_tokens(37, 26) == 26
    assert samples.tokens(37, 26) == sum(index % 7 + 1 for index in whole[37:63])
    assert samples.tokens(0, 100) == 2 * sum(index % 7 + 1 for index in range(50))


def test_a_process_takes_its_part_of_a_step_longest_first_and_the_samples_of_the_step_stay() -> None:
    in_order = _shown(_samples(), [96])
    by_length = _shown(_samples(share=8), [4] * 24)
    assert by_length == _shown(_samples(share=8), [8] * 12) == _shown(_samples(share=8), [96])
    assert by_length != in_order
    for begin in range(0, 96, 8):
        share = by_length[begin : begin + 8]
        assert sorted(share) == sorted(in_order[begin : begin + 8])
        lengths = [index % 7 + 1 for index in share]
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    ("longest", "seq_len", "length"), [(1, 64, 8), (8, 64, 8), (9, 64, 16), (61, 62, 62), (62, 62, 62)]
)
def test_rows_are_multiples_of_eight_unless_that_is_too_long(longest: int, seq_len: int, length: int) -> None:
    assert padded_length(longest, seq_len) == length


def test_every_example_is_evaluated_once_with_others_of_its_length() -> None:
    lengths = np.array([3, 9, 9, 1, 5, 7, 2])
    batches = batches_by_length(lengths, 3)
    assert batches == [[1, 2, 5], [4, 0, 6], [3]]
    assert pad([np.array([5]), np.array([6, 7])], 3, 0).tolist() == [[5, 0, 0], [6, 7, 0]]
