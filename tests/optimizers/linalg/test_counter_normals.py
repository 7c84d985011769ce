"""Numbers made from a key and an index: the published sequence, a normal distribution, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optimizers.linalg.counter_normals import counter_normals, counter_words
from optimizers.linalg.subspace import test_matrix

test_matrix.__test__ = False  # type: ignore[attr-defined]


def splitmix64(state: int, count: int) -> list[int]:
    """SplitMix64 in Python's integers."""
    words, mask = [], (1 << 64) - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        word = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        words.append(word ^ (word >> 31))
    return words


@pytest.mark.parametrize("key", [0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF])
def test_the_words_are_those_of_splitmix64(key: int) -> None:
    words = [int(word) % (1 << 64) for word in counter_words(key, 50, "cpu")]
    assert words == splitmix64(key, 50)
    if key == 0:  # as published with the algorithm
        assert words[:3] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_they_are_normal_and_uncorrelated() -> None:
    stats = pytest.importorskip("scipy.stats")
    numbers = counter_normals(7, (200_000,), "cpu").double().numpy()
    assert np.isfinite(numbers).all()
    # Four standard errors each: 1/√n of the mean, √2/√n of the variance, √24/√n of the kurtosis, 1/√n of correlations.
    unit = 4 / len(numbers) ** 0.5
    assert abs(numbers.mean()) < unit
    assert abs(numbers.var() - 1) < unit * 2**0.5
    assert abs((numbers**4).mean() - 3) < unit * 96**0.5
    for lag in (1, 2, 3, 64):
        assert abs((numbers[lag:] * numbers[:-lag]).mean()) < unit
    assert stats.kstest(numbers, "norm").pvalue > 1e-3
    other = counter_normals(8, (200_000,), "cpu").double().numpy()
    assert abs((numbers * other).mean()) < unit


def test_an_odd_number_is_the_beginning_of_the_next_even_one() -> None:
    assert torch.equal(counter_normals(3, (7, 3), "cpu").flatten(), counter_normals(3, (22,), "cpu")[:21])
    assert counter_normals(3, (0, 4), "cpu").shape == (0, 4)


def test_sketches_of_devices_depend_on_seed_name_and_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "meta" stands for a GPU: what decides is the kind of device alone."""
    keys: list[int] = []

    def made(key: int, shape: tuple[int, ...], device: object) -> torch.Tensor:
        keys.append(key)
        return torch.empty(shape, device="meta")

    monkeypatch.setattr("optimizers.linalg.subspace.counter_normals", made)
    for seed, name, refresh in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "a", 0)):
        assert test_matrix(seed, name, refresh, (4, 2), "meta").shape == (4, 2)
    assert keys[0] == keys[4]
    assert len(set(keys)) == 4
