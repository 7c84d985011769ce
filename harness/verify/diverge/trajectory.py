"""What is kept of a run to compare it with others step by step: losses, gradient norms, and sketches of the weights.

Torch-free, except for `sketch`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

BUCKETS = 256
"""Numbers that are kept of a parameter. A norm that is estimated from them is off by √(2/256) = 9 % (one sigma)."""


@dataclass
class Trajectory:
    """The first steps of a run.

    Attributes:
        losses: steps done → training loss of the steps since the previous entry, nats per token.
        tokens: steps done → tokens that carried loss in these steps; the weights of the losses.
        gradient_norms: steps done → global gradient norm before clipping.
        sketches: steps done → parameter → `sketch` of its weight, (BUCKETS,) in fp64. Empty where no weights are known.
        units: "loss" and "gradient norm" → unit of the last decimal of a table, 0 if it has all digits.
    """

    losses: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    gradient_norms: dict[int, float] = field(default_factory=dict)
    sketches: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    units: dict[str, float] = field(default_factory=dict)

    def difference(self, other: Trajectory, step: int) -> Mapping[str, float]:
        """Return parameter → ‖W - W_other‖ / ‖W - W_0‖ after a step, of the parameters that both have.

        W_0 are this run's first weights, so that 1 means: as far apart as the run has come. A parameter that has not
        moved is left out.
        """
        mine, theirs, start = self.sketches[step], other.sketches[step], self.sketches[0]
        moved = {
            name: float(np.linalg.norm(mine[name] - start[name])) for name in mine.keys() & theirs.keys()
        }
        return {
            name: float(np.linalg.norm(mine[name] - theirs[name])) / moved[name]
            for name in mine
            if moved.get(name)
        }

    def with_rows_of(self, other: Trajectory) -> Trajectory:
        """Return this run with losses that are means over the same steps as those of another one.

        A row of a run has the mean since the row before it; only rows that this run reaches are kept.
        """
        losses, before = {}, 0
        for step in sorted(other.losses):
            between = range(before + 1, step + 1)
            if all(one in self.losses for one in between):
                weights = [self.tokens.get(one, 1) for one in between]
                losses[step] = float(np.average([self.losses[one] for one in between], weights=weights))
            before = step
        return Trajectory(losses, self.tokens, self.gradient_norms, self.sketches)


def unit(values: Iterable[float]) -> float:
    """Return the unit of the last decimal of rounded numbers, 0 if they have more than seven decimals.

    Numbers of a table are often rounded to four decimals, which moves them more than an engine does.
    """
    finite = [value for value in values if math.isfinite(value)]
    for decimals in range(8):
        if all(math.isclose(value, round(value, decimals), rel_tol=1e-12) for value in finite):
            return 10.0**-decimals if finite else 0.0
    return 0.0


def sketch(name: str, weight: Tensor) -> np.ndarray:
    """Return a linear sketch of a tensor, (BUCKETS,) in fp64: sums of its elements with random signs.

    The squared norm of the sketch of a difference has the difference's squared norm as its mean (the AMS sketch of
    Alon, Matias and Szegedy 1999, with one sum per bucket), and is exact enough for differences of one ulp, because the
    sums are fp64.

    Args:
        name: of the parameter; it seeds the signs.
        weight: any shape, on a CPU.
    """
    import torch

    flat = weight.detach().reshape(-1).double()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    signs = torch.randint(0, 2, (flat.numel(),), generator=generator, dtype=torch.int8)
    signed = flat * (2 * signs - 1)
    padded = torch.nn.functional.pad(signed, (0, -signed.numel() % BUCKETS))
    return padded.view(-1, BUCKETS).sum(0).numpy()
