"""How an fp32 result lands in half-precision weights: to nearest, stochastically, or with Kahan
compensation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rounding:
    """Mode ("nearest", "stochastic", "kahan"), and what the random bits of this step depend on."""

    mode: str
    seed: int = 0

    def bits(self, like: Tensor, name: str, step: int) -> Tensor:
        """Return 16 random bits per element, int32, a function of (seed, name, step) alone.

        A step that was undone therefore repeats exactly, and equal replicas round equally.
        """
        (stream,) = self.streams(like.device, [name], step)
        return stream.draw(like.numel()).view(like.shape)

    def streams(self, device: torch.device, names: Sequence[str], step: int) -> list[RandomBits]:
        """Return one stream of these bits for each name."""
        return [RandomBits(device, f"{self.seed}/{name}/{step}/rounding") for name in names]

    def needs_bits(self, dtype: torch.dtype) -> bool:
        """Return True if weights of this dtype are rounded with random bits."""
        return self.mode == "stochastic" and dtype == torch.bfloat16


class RandomBits:
    """A stream of random numbers in [0, 65536), a function of its key alone.

    On a CPU pieces that are drawn one after the other are those of one draw.

    Args:
        device: of the numbers.
        key: any text.
    """

    def __init__(self, device: torch.device, key: str) -> None:
        self._device = device
        if device.type != "meta":
            seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
            self._generator = torch.Generator(device).manual_seed(seed)

    def draw(self, count: int) -> Tensor:
        """Return the next numbers, (count,) int32."""
        if self._device.type == "meta":
            return torch.empty(count, dtype=torch.int32, device="meta")
        return torch.randint(
            0, 1 << 16, (count,), generator=self._generator, device=self._device, dtype=torch.int32
        )


def stochastic_bf16(value: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to bf16, up or down with probabilities that make the expectation exact.

    A bf16 number is the upper half of an fp32 one: adding 16 random bits and cutting the lower half off
        carries
    into the upper half with the right probability. Values that are not finite are rounded to nearest.

    Args:
        value: fp32.
        bits: int32 in [0, 65536), same shape.
    """
    integer = (value.contiguous().view(torch.int32) + bits) & -65536
    return torch.where(torch.isfinite(value), integer.view(torch.float32), value).to(torch.bfloat16)


def rounded(value: Tensor, dtype: torch.dtype, rounding: Rounding, name: str, step: int) -> Tensor:
    """Return an fp32 tensor in a weight's dtype ("nearest" or "stochastic")."""
    if rounding.needs_bits(dtype):
        return stochastic_bf16(value, rounding.bits(value, name, step))
    return value.to(dtype)


def compensated(weight: Tensor, change: Tensor, compensation: Tensor) -> tuple[Tensor, Tensor]:
    """Apply Kahan's sum: carry the rounding error of this step to the next.

    Zamirai et al. 2020, arXiv 2010.06192.

    Args:
        weight: half precision.
        change: fp32, to be added.
        compensation: weight's dtype; what the weight lacks so far.

    Returns:
        (weight, compensation) in the weight's dtype.
    """
    wanted = change + compensation.float()
    exact = weight.float() + wanted
    new = exact.to(weight.dtype)
    return new, (wanted - (new.float() - weight.float())).to(weight.dtype)
