"""The loss sum against a plain fp64 computation."""

from __future__ import annotations

import numpy as np
import torch

from harness.model import loss_sum


def _by_hand(logits: torch.Tensor, labels: torch.Tensor) -> float:
    numbers = logits.double().numpy()
    log_sum = np.log(np.exp(numbers).sum(-1))
    total = 0.0
    for row in range(labels.shape[0]):
        for column in range(labels.shape[1]):
            label = int(labels[row, column])
            if label != -100:
                total += log_sum[row, column] - numbers[row, column, label]
    return total


def test_sum_over_labels_that_count() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 11, generator=generator)
    labels = torch.randint(0, 11, (3, 5), generator=generator)
    labels[1, 2:] = -100
    # fp32 sums of 12 terms of size 3: a few units in the last place, 1e-6 relative.
    assert abs(loss_sum(logits, labels).item() / _by_hand(logits, labels) - 1) < 1e-6


def test_softmax_is_fp32_for_half_precision_logits() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 4, 50, generator=generator).bfloat16()
    labels = torch.randint(0, 50, (2, 4), generator=generator)
    assert loss_sum(logits, labels).dtype == torch.float32
    assert abs(loss_sum(logits, labels).item() / _by_hand(logits.float(), labels) - 1) < 1e-6


def test_control_mean_of_row_means_differs() -> None:
    logits = torch.zeros(2, 4, 10)
    logits[0, :, 0] = 3.0
    labels = torch.zeros(2, 4, dtype=torch.long)
    labels[1, 1:] = -100
    mean = loss_sum(logits, labels).item() / 5
    mean_of_means = (
        sum(loss_sum(logits[i : i + 1], labels[i : i + 1]).item() / n for i, n in enumerate((4, 1))) / 2
    )
    assert abs(mean - mean_of_means) > 0.1
