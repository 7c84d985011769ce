"""Moments that are stored in bfloat16 (`state_dtype`): fp32 while a step computes, rounded stochastically when written.

A moment with decay β near 1 changes by less in a step than bfloat16's spacing (2⁻⁸ of a number), and rounding to
nearest would keep it where it is. Stochastic rounding is right on average. Its random bits are a function of (seed,
matrix, step, kind, place in the whole tensor), so that every distribution over processes rounds alike, a step that is
repeated repeats exactly, and a number that bfloat16 holds stays as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimizers.linalg.counter_normals import mixed_words
from optimizers.rounding import stochastic_bf16
from optimizers.rule_options import stores_in_half

_PER_WORD = 4
"""16-bit numbers in a 64-bit word."""


def stored_dtype(kind: str, options: Mapping[str, Any], wide: torch.dtype) -> torch.dtype:
    """Return how a state is stored: kinds whose names end in "moment" as `state_dtype` says, all others in `wide`.

    Args:
        kind: of the state, e.g. "second_moment".
        options: of its group.
        wide: dtype of the arithmetic.
    """
    return torch.bfloat16 if stores_in_half(kind, options) else wide


class TensorPart(NamedTuple):
    """Which elements of a whole tensor a process holds.

    Attributes:
        whole: shape of the whole tensor.
        dim: of which it holds an interval; -1: an interval of the flattened elements; None: it holds all.
        start: where the interval begins.
        local: shape here.
    """

    whole: tuple[int, ...]
    dim: int | None
    start: int
    local: tuple[int, ...]

    def numbers(self, first: int, end: int, device: torch.device) -> int | Tensor:
        """Return the flat indices in the whole tensor of the elements [first, end) here; of an interval, the first."""
        if self.dim is None:
            return first
        if self.dim == -1:
            return self.start + first
        inner = 1
        for side in self.whole[self.dim + 1 :]:
            inner *= side
        if self.dim == 0:
            return self.start * inner + first
        here = torch.arange(first, end, device=device)
        width = self.local[self.dim] * inner
        return here // width * (self.whole[self.dim] * inner) + here % width + self.start * inner


class WideState(dict[str, Tensor]):
    """State of a batch: kinds that are stored in another dtype are copied to the dtype of the arithmetic when read.

    Args:
        stored: kind → state.
        narrow: kinds to copy.
        dtype: of the arithmetic.
    """

    def __init__(self, stored: Mapping[str, Tensor], narrow: frozenset[str], dtype: torch.dtype) -> None:
        super().__init__({kind: tensor for kind, tensor in stored.items() if kind not in narrow})
        self._stored, self._dtype = stored, dtype

    def __missing__(self, kind: str) -> Tensor:
        wide = self[kind] = self._stored[kind].to(self._dtype)
        return wide


def rounding_key(seed: int, name: str, step: int, kind: str) -> int:
    """Return the 64-bit key of the random bits of one state tensor in one step."""
    digest = hashlib.sha256(f"{seed}/{name}/{step}/{kind}/state".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def random_bits(keys: Sequence[int], numbers: int | Tensor, count: int, device: torch.device) -> Tensor:
    """Return (k, count) int32 in [0, 65536): for each key those of the elements with these numbers.

    Args:
        keys: 64 bits each.
        numbers: flat indices (count,), or the first of consecutive ones.
        count: of elements.
        device: of the result.
    """
    states = torch.tensor(list(keys), dtype=torch.int64).to(device, non_blocking=True)[:, None]
    if isinstance(numbers, int):
        skipped = numbers % _PER_WORD
        words = -(-(skipped + count) // _PER_WORD)
        start = numbers // _PER_WORD
        drawn = mixed_words(states, torch.arange(start, start + words, device=device))
        halves = drawn.view(torch.int16)[:, skipped : skipped + count].to(torch.int32)
        return halves & 0xFFFF
    drawn = mixed_words(states, numbers // _PER_WORD)
    return (drawn >> (16 * (numbers % _PER_WORD)) & 0xFFFF).to(torch.int32)


def round_into(
    target: Tensor | list[Tensor],
    value: Tensor,
    part: TensorPart,
    names: Sequence[str],
    steps: Sequence[int],
    kind: str,
    seed: int,
) -> None:
    """Write the state (b, …) of b matrices to where it is stored in bfloat16.

    Args:
        target: (b, …), or one tensor for each matrix.
        value: in the dtype of the arithmetic.
        part: which elements of each matrix' state these are.
        names: of the matrices.
        steps: t of each.
        kind: of the state.
        seed: of the optimizer.
    """
    keys = [rounding_key(seed, name, step, kind) for name, step in zip(names, steps)]
    count = value[0].numel()
    bits = random_bits(keys, part.numbers(0, count, value.device), count, value.device)
    result = stochastic_bf16(value.float(), bits.view(value.shape))
    if isinstance(target, list):
        torch._foreach_copy_(target, list(result.unbind(0)))  # pyright: ignore[reportPrivateImportUsage]
    else:
        target.copy_(result)
