"""How a Gram matrix becomes the map that turns its moment into a factor: what a rule tells a layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optimizers.linalg.inverse_root import GRAM_RTOL, InverseRoot, inverse_root
from optimizers.linalg.newton_schulz import polynomial_root


@dataclass(frozen=True)
class GramRoot:
    """A method with its settings.

    Attributes:
        method: "gram" or "dwh" (`inverse_root`), or a polynomial ("newton_schulz", "cubic", "polar_express").
        rtol: cut of the exact ones, relative to σ1.
        steps: of the polynomial ones.
        dtype: that the root is applied in, so that it need not travel in a wider one.
    """

    method: str = "gram"
    rtol: float = GRAM_RTOL
    steps: int = 5
    dtype: torch.dtype = torch.float32

    @property
    def gives_singular_values(self) -> bool:
        """Whether the root comes with singular values."""
        return self.method == "gram"

    def __call__(self, gram: Tensor) -> InverseRoot:
        """(b, r, r) fp64 → roots."""
        if self.method in ("gram", "dwh"):
            return inverse_root(gram, self.rtol, self.method)
        return polynomial_root(gram, self.method, self.steps)
