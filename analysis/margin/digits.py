"""Real data that a package ships: scikit-learn's 8×8 digits, split once and for all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TRAIN = 1000
SPLIT_SEED = 0


class Digits(NamedTuple):
    """fp64 images (n, 64) in [0, 1] and labels (n,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load() -> Digits:
    """1000 training images and the other 797 for the margins, in an order that depends on nothing."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    x = torch.tensor(images, dtype=torch.float64)[order] / 16.0
    y = torch.tensor(labels, dtype=torch.int64)[order]
    return Digits(x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:])
