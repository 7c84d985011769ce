"""A model whose gradients are given: the same on every engine, to the last bit, whatever the weights are.

Its loss is linear, ⟨W, G⟩, so that the gradient of W is G. The numbers in G have so few digits that a mean over
processes and micro-batches is exact in any order, so that one replay serves all engines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from harness.verify.audit.cells import STEPS, Sizes

SHAPES: Mapping[Sizes, Mapping[str, tuple[int, ...]]] = {
    "even": {
        "embed.weight": (32, 16),
        "block.qkv.weight": (48, 16),
        "block.proj.weight": (16, 16),
        "block.up.weight": (40, 16),
        "block.down.weight": (16, 40),
        "block.norm.weight": (16,),
        "head.bias": (24,),
    },
    "uneven": {
        "embed.weight": (31, 13),
        "block.qkv.weight": (39, 13),
        "block.proj.weight": (13, 13),
        "block.up.weight": (37, 13),
        "block.down.weight": (13, 37),
        "block.norm.weight": (13,),
        "head.bias": (23,),
    },
    # Of the second of two ranks fsdp2 leaves nothing of what has one row.
    "empty": {
        "embed.weight": (32, 16),
        "block.qkv.weight": (48, 16),
        "block.proj.weight": (16, 16),
        "block.router.weight": (1, 16),
        "block.norm.weight": (16,),
        "block.scale": (1,),
    },
}
"""Parameters of a small language model: tall, wide, square and fused matrices, vectors. Of a square one both
covariances have full rank, so that rules in their eigenbases are determined."""

WEIGHT_STD = 0.05
_GRID = {False: 20, True: 6}
"""Bits of a gradient of one process: fine; coarse ones are exact in bf16 (8 bits), two of them summed, too."""


@dataclass(frozen=True)
class Given:
    """Weights and gradients of one model.

    Attributes:
        start: name → weight, exact in bf16.
        gradients: of each step, name → mean gradient over the batch.
        offsets: of each step, name → what half of the processes add to the mean and the others subtract.
    """

    start: dict[str, Tensor]
    gradients: list[dict[str, Tensor]]
    offsets: list[dict[str, Tensor]]


def given(sizes: Sizes, *, is_coarse: bool = False, steps: int = STEPS) -> Given:
    """Return the weights and gradients that all cells of these sizes share.

    Args:
        sizes: key of `SHAPES`.
        is_coarse: the gradients are exact in bf16.
        steps: number of them.
    """
    shapes = SHAPES[sizes]
    start = {name: _weight(name, shape) for name, shape in shapes.items()}
    bits = _GRID[is_coarse]
    gradients: list[dict[str, Tensor]] = []
    offsets: list[dict[str, Tensor]] = []
    for step in range(steps):
        draws = {name: _gradient(name, shape, step, bits) for name, shape in shapes.items()}
        gradients.append({name: mean for name, (mean, _) in draws.items()})
        offsets.append({name: offset for name, (_, offset) in draws.items()})
    return Given(start, gradients, offsets)


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))


def _weight(name: str, shape: tuple[int, ...]) -> Tensor:
    noise = torch.randn(shape, generator=_generator("weight", name))
    return (noise * WEIGHT_STD).bfloat16().float()


def _gradient(name: str, shape: tuple[int, ...], step: int, bits: int) -> tuple[Tensor, Tensor]:
    """Return a mean gradient and an offset; mean ± offset has ``bits`` bits, counted from the same place."""
    lasting = torch.randn(shape, generator=_generator("lasting", name))
    generator = _generator("gradient", name, step)
    # Exponents of their own keep coarse gradients from repeating values, and so from ties in signs and sorts.
    exponent = torch.randint(-5, 1, shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    half = 2 ** (bits - 1)
    mean = torch.round((lasting + noise) * half / 5).clamp(-half + 1, half - 1)
    offset = torch.round(torch.randn(shape, generator=generator) * half / 5).clamp(-half + 1, half - 1)
    if name == "embed.weight":
        # Tokens that the batch does not hold.
        absent = torch.rand(shape[0], generator=generator) < 0.25
        mean[absent], offset[absent] = 0.0, 0.0
    scale = torch.exp2(exponent.float()) * 2.0**-5 / half
    return mean * scale, offset * scale


class GivenModel(nn.Module):
    """A model whose output is a loss that is linear in the weights.

    Args:
        start: name → weight.
        dtype: of the weights.
    """

    def __init__(self, start: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, weight in start.items():
            path, _, leaf = name.rpartition(".")
            module: nn.Module = self
            for part in path.split("."):
                if part not in dict(module.named_children()):
                    module.add_module(part, _Part())
                module = cast(nn.Module, getattr(module, part))
            module.register_parameter(leaf, nn.Parameter(weight.to(dtype, copy=True)))

    def forward(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Return Σ ⟨W, G⟩ over all parameters.

        Args:
            gradients: name → G, in the shape of the whole parameter.
        """
        total = torch.zeros(())
        for name, child in self.named_children():
            total = total + child(_below(gradients, name))
        return total


class _Part(nn.Module):
    def forward(self, gradients: Mapping[str, Tensor]) -> Tensor:
        total = torch.zeros(())
        for name, parameter in self.named_parameters(recurse=False):
            if parameter.requires_grad:
                total = total + (parameter * gradients[name].to(parameter.dtype)).sum()
        for name, child in self.named_children():
            total = total + child(_below(gradients, name))
        return total


def _below(gradients: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {
        path.removeprefix(f"{name}."): gradient
        for path, gradient in gradients.items()
        if path.startswith(f"{name}.")
    }


def share(data: Given, step: int, part: int, parts: int) -> dict[str, Tensor]:
    """Return the gradient of one micro-batch of one process; the mean over all of them is exactly the step's.

    Args:
        data: of the model.
        step: from 0.
        part: number of the (process, micro-batch).
        parts: of them; 1 or an even number.
    """
    sign = 0.0 if parts == 1 else (1.0 if part % 2 else -1.0)
    return {name: mean + sign * data.offsets[step][name] for name, mean in data.gradients[step].items()}
