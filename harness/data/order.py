"""Which sample comes n-th: a function of (corpus, seed, n), and of nothing else.

World size, accumulation, workers and restarts cannot change it, because none of them is an argument. Each
epoch is a fresh permutation, computed in place by a Feistel network instead of being stored: no memory at
any corpus size, and a run that resumes at sample 10⁹ starts as fast as one that starts at 0.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

# Luby and Rackoff prove 4 half-rounds enough for ideal round functions; these are not ideal.
ROUNDS = 6
# Positions permuted at a time: large enough that numpy's cost per call vanishes (a training step asks for
# 16 samples or so), small enough to stay in the cache of the processor.
BLOCK = 4096


class Order:
    """The order of the samples of a run.

    A balanced Feistel network on the smallest power of two ≥ ``length`` (Luby and Rackoff 1988), restricted
    to [0, length) by cycle walking (Black and Rogaway, CT-RSA 2002): a bijection for every key, in expected
    constant time.

    Args:
        corpus_sha256: identity of the corpus.
        seed: seed of the run.
        length: samples per epoch, ≥ 1.

    Raises:
        ValueError: ``length`` < 1.
    """

    def __init__(self, corpus_sha256: str, seed: int, length: int) -> None:
        if length < 1:
            raise ValueError(f"an order needs at least one sample, not {length}")
        self.corpus_sha256, self.seed, self.length = corpus_sha256, seed, length
        bits = max(2, (length - 1).bit_length())
        self._low_bits = bits // 2
        self._low_mask = np.uint64((1 << self._low_bits) - 1)
        self._high_mask = np.uint64((1 << (bits - self._low_bits)) - 1)
        self._held = (-1, -1)
        self._block: Indices = np.empty(0, dtype=np.int64)

    def __call__(self, n: int) -> int:
        """Index in [0, length) of the ``n``-th sample of the run, n ≥ 0; the epoch is ``n // length``."""
        return int(self.take(n, 1)[0])

    def take(self, first: int, count: int) -> Indices:
        """Return the indices of the samples ``first`` … ``first + count - 1``: (count,) int64, each in [0, length)."""
        if first < 0 or count < 0:
            raise ValueError(f"samples are numbered from 0: first={first}, count={count}")
        parts = []
        n, end = first, first + count
        while n < end:
            epoch, position = divmod(n, self.length)
            number, offset = divmod(position, BLOCK)
            if (epoch, number) != self._held:
                start = number * BLOCK
                positions = np.arange(start, min(start + BLOCK, self.length), dtype=np.uint64)
                self._block = self._permute(positions, epoch).astype(np.int64)
                self._held = (epoch, number)
            parts.append(self._block[offset : offset + end - n])
            n += len(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _permute(self, positions: NDArray[np.uint64], epoch: int) -> NDArray[np.uint64]:
        keys = self._keys(epoch)
        result = self._feistel(positions, keys)
        outside = np.flatnonzero(result >= self.length)
        # Walking along the cycle of the larger permutation until it comes back below `length` is what makes
        # the restriction a bijection; folding with a remainder would repeat some samples and lose others.
        while outside.size:
            result[outside] = self._feistel(result[outside], keys)
            outside = outside[result[outside] >= self.length]
        return result

    def _feistel(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        low, high = values & self._low_mask, values >> np.uint64(self._low_bits)
        for even, odd in keys.reshape(-1, 2):
            low = low ^ (_mix(high + even) & self._low_mask)
            high = high ^ (_mix(low + odd) & self._high_mask)
        return (high << np.uint64(self._low_bits)) | low

    def _keys(self, epoch: int) -> NDArray[np.uint64]:
        text = f"{self.corpus_sha256}|{self.seed}|{epoch}".encode()
        digest = hashlib.shake_256(text).digest(8 * 2 * ROUNDS)
        return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), elementwise."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
