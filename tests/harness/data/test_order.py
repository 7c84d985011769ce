"""The n-th sample is a function of (corpus, seed, n): a fresh bijection per epoch, jumped into at any n."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.data import Order


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 9000), seed=st.integers(0, 2**31), epoch=st.integers(0, 3))
def test_each_epoch_is_a_permutation(length: int, seed: int, epoch: int) -> None:
    epoch_indices = Order("corpus", seed, length).take(epoch * length, length)
    assert np.array_equal(np.sort(epoch_indices), np.arange(length))


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 3000) | st.just(10**9),
    world_size=st.sampled_from([1, 2, 3, 4, 8]),
    share=st.integers(1, 5),
    step=st.integers(0, 10**6),
)
def test_ranks_together_hold_the_global_batch(length: int, world_size: int, share: int, step: int) -> None:
    batch = world_size * share
    whole = Order("corpus", 7, length).take(step * batch, batch)
    parts = [Order("corpus", 7, length).take(step * batch + r * share, share) for r in range(world_size)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_jumping_is_the_same_as_walking() -> None:
    # 3.3 epochs, so that the walk crosses both ends of epochs and ends of internal blocks.
    length, count = 3001, 10_000
    walk = Order("corpus", 1, length).take(0, count)
    order = Order("corpus", 1, length)
    jumps = np.random.default_rng(0).permutation(count)[:500]
    assert [order(int(n)) for n in jumps] == walk[jumps].tolist()
    assert Order("corpus", 1, length).take(9_990, 10).tolist() == walk[-10:].tolist()


def test_far_samples_need_no_memory() -> None:
    order = Order("corpus", 0, 10**12)
    indices = order.take(10**15, 4)
    assert indices.dtype == np.int64
    assert ((indices >= 0) & (indices < 10**12)).all()


@pytest.mark.parametrize("other", [Order("corpus", 1, 997), Order("other", 0, 997)], ids=["seed", "corpus"])
def test_seed_and_corpus_change_the_order(other: Order) -> None:
    ours, theirs = Order("corpus", 0, 997).take(0, 997), other.take(0, 997)
    # Two random permutations agree in one place on average; 10 has a chance of 1e-7.
    assert (ours == theirs).sum() < 10


def test_epochs_differ() -> None:
    order = Order("corpus", 0, 997)
    assert (order.take(0, 997) == order.take(997, 997)).sum() < 10


@pytest.mark.parametrize("length", [5, 24])
def test_positions_are_uniform_over_epochs(length: int) -> None:
    epochs = 600
    table = Order("corpus", 3, length).take(0, epochs * length).reshape(epochs, length)
    counts = np.stack([np.bincount(table[:, p], minlength=length) for p in range(length)])
    # (length − 1)² degrees of freedom: rows and columns of the table of counts have fixed sums.
    statistic = ((counts - epochs / length) ** 2 / (epochs / length)).sum()
    assert 1e-4 < stats.chi2.sf(statistic, (length - 1) ** 2) < 1 - 1e-4


def test_neighbours_do_not_stay_neighbours() -> None:
    indices = Order("corpus", 0, 100_000).take(0, 100_000)
    # Under a random permutation two in a row are neighbours twice in 100,000 pairs on average.
    assert (np.abs(np.diff(indices)) == 1).sum() < 15
    correlation = np.corrcoef(indices[:-1], indices[1:])[0, 1]
    assert abs(correlation) < 5 / np.sqrt(100_000)  # five standard deviations


def test_folding_instead_of_cycle_walking_is_no_permutation() -> None:
    """Negative control: what the cheaper restriction to [0, length) would do."""
    length = 3000
    order = Order("corpus", 0, length)
    folded = order._feistel(np.arange(length, dtype=np.uint64), order._keys(0)) % np.uint64(length)
    assert len(np.unique(folded)) < length


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        Order("corpus", 0, 0)
    with pytest.raises(ValueError, match="numbered from 0"):
        Order("corpus", 0, 5).take(-1, 2)
    assert Order("corpus", 0, 5).take(3, 0).shape == (0,)
