"""The training and validation loss: a sum, so that whoever knows the global token count can weight it right."""

from __future__ import annotations

import torch
import torch.nn.functional as F

IGNORED = -100
"""Label of a position that carries no loss (padding)."""


def loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy in nats over the labels that are not `IGNORED`.

    A sum instead of a mean: means of micro-batches or processes with different numbers of tokens do not
    average to the mean over the global batch. The softmax is taken in fp32 whatever the logits' dtype.

    Args:
        logits: ``(batch, seq_len, vocab)``.
        labels: ``(batch, seq_len)`` int64, already shifted.

    Returns:
        0-dim fp32 tensor.
    """
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
