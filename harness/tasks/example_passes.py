"""Forward passes over validation examples: what each of them gives, on every process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from harness.data.micro_batches import to_device
from harness.tasks.samples import MakeBatch, Split, batches_by_length

if TYPE_CHECKING:
    from harness.loop import Run
    from harness.protocols import MicroBatch

OfBatch = Callable[[Any, "MicroBatch"], Sequence[torch.Tensor]]
"""From the outputs of a forward pass and its micro-batch to columns of figures, each ``(rows,)``."""


@torch.no_grad()
def of_examples(run: Run, split: Split, collate: MakeBatch, columns: int, of_batch: OfBatch) -> torch.Tensor:
    """Return figures of all examples of a split in its order, on every process (a collective).

    Batches are dealt out to the processes; each fills in its own examples of a table of zeros, and their sum is the
    whole table. A process with fewer batches repeats one without keeping it, because a forward pass of sharded weights
    is itself a collective.

    Args:
        run: assembled.
        split: of the examples.
        collate: makes its micro-batches.
        columns: figures of an example.
        of_batch: gives them.

    Returns:
        ``(columns, examples)`` fp64 on the CPU.
    """
    engine = run.engine
    batches = batches_by_length(split.lengths, run.config.micro_batch_size or 1)
    table = torch.zeros(columns, len(split), dtype=torch.float64, device=engine.device)
    was_training = run.model.training
    # Dropout must not change the result, nor the random numbers of training.
    run.model.eval()
    try:
        with engine.inference() as forward:
            for first in range(0, len(batches), engine.world_size):
                number = first + engine.rank
                indices = batches[min(number, len(batches) - 1)]
                batch = to_device(collate(indices), engine.device)
                with engine.autocast():
                    outputs = forward(**run.objective.inputs(batch))
                if number < len(batches):
                    places = torch.tensor(indices, device=engine.device)
                    table[:, places] = torch.stack([figure.double() for figure in of_batch(outputs, batch)])
    finally:
        run.model.train(was_training)
    return engine.sum(table).cpu()
