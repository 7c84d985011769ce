"""Twins of a run: they differ from it by rounding, and by nothing else. Torch is imported when one is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from harness.loop import Run
    from harness.protocols import MicroBatch


@dataclass(frozen=True)
class Twin:
    """How a twin differs from its run: by rounding, and by nothing else.

    Attributes:
        seed: of the random choices below; other twins have other ones.
        moves_weights: each initial weight is moved up or down by one ulp.
        reorders: the samples of each step are dealt out in another order and to micro-batches of another size, so that
            every sum over them is rounded differently.
    """

    seed: int
    moves_weights: bool = False
    reorders: bool = False


def make_twin(run: Run, twin: Twin) -> None:
    """Make an assembled run of one process the twin of what it was."""
    import torch

    generator = torch.Generator().manual_seed(twin.seed)
    if twin.moves_weights:
        _move_weights(run, generator)
    if twin.reorders:
        _reorder(run, generator)


def _move_weights(run: Run, generator: torch.Generator) -> None:
    """Move every weight to the next or the last number of its dtype."""
    import torch

    with torch.no_grad():
        for parameter in run.engine.named_parameters().values():
            up = torch.randint(0, 2, parameter.shape, generator=generator, dtype=torch.bool)
            away = torch.where(up, torch.inf, -torch.inf).to(parameter)
            parameter.copy_(torch.nextafter(parameter, away))


def _reorder(run: Run, generator: torch.Generator) -> None:
    """Deal out the samples of each step anew, to micro-batches of the run's size, of half of it, or of a quarter."""
    micro_batches = run.loader.micro_batches
    run.loader.micro_batches = (  # pyright: ignore[reportAttributeAccessIssue]
        lambda step: reordered(micro_batches(step), generator)
    )


def reordered(batches: Sequence[MicroBatch], generator: torch.Generator) -> list[MicroBatch]:
    """Return the rows of micro-batches in another order, in micro-batches of the same size, half of it, or a quarter.

    Args:
        batches: tensors of one row a sample; where micro-batches are padded to different lengths, rows stay in theirs.
        generator: draws order and size.
    """
    import torch

    widths = {tuple(part.shape[1:] for part in batch) for batch in batches}
    wholes: Sequence[MicroBatch] = batches
    if len(widths) == 1:
        wholes = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]
    orders = [torch.randperm(len(whole[0]), generator=generator) for whole in wholes]
    size = _divisor(len(batches[0][0]), int(torch.randint(0, 3, (), generator=generator)))
    return [
        micro_batch
        for whole, order in zip(wholes, orders, strict=True)
        for micro_batch in zip(*(part[order.to(part.device)].split(size) for part in whole), strict=True)
    ]


def _divisor(size: int, halvings: int) -> int:
    """Return a size after so many halvings, as far as they divide it."""
    while halvings and size % 2 == 0:
        size, halvings = size // 2, halvings - 1
    return size
