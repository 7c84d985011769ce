"""Examples in the order of a run, padded to the longest of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from harness.data import Order
from harness.tasks.samples import ExampleSamples, batches_by_length, pad, padded_length, spread


class _Split:
    """Example i has i % 7 + 1 tokens, all i."""

    def __len__(self) -> int:
        return 50

    def ids(self, index: int) -> np.ndarray:
        return np.full(index % 7 + 1, index, dtype=np.int64)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(self.ids(index)) for index in range(len(self))])


def _samples(seed: int = 0, batch_size: int = 1, micro: int = 1) -> ExampleSamples:
    split = _Split()

    def collate(indices: Sequence[int]) -> tuple[np.ndarray, ...]:
        rows = [split.ids(index) for index in indices]
        return (pad(rows, padded_length(max(map(len, rows)), 64), -1),)

    return ExampleSamples(split, Order("hash", seed, len(split)), batch_size, micro, collate)


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


def test_a_step_is_cut_by_length_whatever_the_processes_and_holds_the_same_samples() -> None:
    in_order = _shown(_samples(), [96])
    # Micro-batches of 4 samples, read by 1, 2 and 4 processes.
    cut = _shown(_samples(batch_size=16, micro=4), [4] * 24)
    for share in (16, 8, 4):
        assert _shown(_samples(batch_size=16, micro=4), [share] * (96 // share)) == cut
    assert cut != in_order
    for begin in range(0, 96, 16):
        step = cut[begin : begin + 16]
        assert sorted(step) == sorted(in_order[begin : begin + 16])
        # The longest, the third, the second and the shortest four: two processes get one of either half.
        parts = [[index % 7 + 1 for index in step[at : at + 4]] for at in range(0, 16, 4)]
        assert min(parts[0]) >= max(parts[2])
        assert min(parts[2]) >= max(parts[1])
        assert min(parts[1]) >= max(parts[3])


def test_numbers_are_spread_over_every_stretch() -> None:
    assert [spread(count) for count in (1, 2, 3, 4)] == [[0], [0, 1], [0, 2, 1], [0, 2, 1, 3]]
    for count in (5, 6, 12, 64):
        places = spread(count)
        assert sorted(places) == list(range(count))
        half = count // 2
        assert abs(sum(places[:half]) / half - (count - 1) / 2) < count / 6


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
