"""Gaussian numbers made on a device from a key and their own index, whatever the device, its model or its generators.

torch's CUDA generator is counter-based too, but how it deals its counters out depends on the number of multiprocessors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """Return a 64-bit word as the int64 that has its bits."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


# G. Steele, D. Lea and C. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014: SplitMix64.
_GAMMA, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def counter_words(key: int, count: int, device: torch.device | str) -> Tensor:
    """Return the first `count` words (count,) int64 that SplitMix64 gives from the state `key`."""
    numbers = torch.arange(count, dtype=torch.int64, device=device)
    return mixed_words(_signed(key), numbers)


def mixed_words(keys: Tensor | int, numbers: Tensor) -> Tensor:
    """Return the words that SplitMix64 gives from the states `keys`, those with these numbers (from 0).

    Args:
        keys: signed 64 bits, one or of a shape that broadcasts with `numbers`.
        numbers: int64.
    """
    # int64 products and sums wrap around, as the algorithm wants; shifts must bring in zeros instead of the sign.
    words = (numbers + 1) * _GAMMA + keys
    words = (words ^ _shifted(words, 30)) * _FIRST
    words = (words ^ _shifted(words, 27)) * _SECOND
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, bits: int) -> Tensor:
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def counter_normals(key: int, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Return independent standard normal numbers of `shape`, fp32, by Box and Muller from one word for each pair.

    Computed in fp64, so that the logarithms and sines of different devices are rounded to nearly always the same fp32.

    Args:
        key: 64 bits.
        shape: of the result.
        device: where all of it is computed.
    """
    count = math.prod(shape)
    words = counter_words(key, (count + 1) // 2, device)
    # The middles of 2^32 intervals: never 0, whose logarithm is infinite.
    radius = (((_shifted(words, 32).double() + 0.5) / 2.0**32).log() * -2.0).sqrt()
    angle = ((words & 0xFFFFFFFF).double() + 0.5) * (2.0 * math.pi / 2.0**32)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten()[:count].float().view(shape)
