"""Raise the cut of exact factors, so that the moments of certified runs have directions at either side of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from harness.verify.cells import RAISED_CUT
from optimizers.linalg import polar
from optimizers.rules.parts import building_blocks


@contextmanager
def raised_cut() -> Iterator[None]:
    """Replace the default cut of polar factors, which depends on the dtype, by `RAISED_CUT` for a block."""

    def cut(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> float:
        return RAISED_CUT

    with patch.object(polar, "default_rtol", cut), patch.object(building_blocks, "default_rtol", cut):
        yield
