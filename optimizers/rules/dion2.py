"""Dion2: Muon on the largest rows or columns of the momentum (Ahn, Amsel & Langford 2025, arXiv 2512.16928).

M ← M + G     K: the ⌈φm⌉ rows of M with the largest ℓ1 norms     O = orth(M_K)     W_K ← W_K - η α s·O     M_K ← μ M_K

Rows where m ≤ n, else columns (`select`). What is not chosen stays in M undiminished until it is: error feedback.
Read in the abstract and in the authors' code (microsoft/dion, dion2.py): all of this, and s = √(out/in) of the whole
matrix. Not stated: ties. The code chooses along the axis that is sharded, among the rows that each rank holds, so that
its steps depend on the number of ranks; here they don't: if the other axis is split, ranks sum the norms and only the
chosen submatrix travels; if the same one is, the whole matrix does. Axes to shard are chosen by that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from optimizers.options import option
from optimizers.rule import Axes, Rule
from optimizers.rule_options import DecayOptions, PeakRate, PolarOptions, Preset, ScaleOptions
from optimizers.rules import parts

if TYPE_CHECKING:
    from optimizers.interfaces import MatrixBatch, Steps, Update


class Dion2(Rule):
    """Muon on a fraction of each matrix."""

    needs_whole: ClassVar[bool] = False

    def update(self, b: MatrixBatch) -> Steps[Update]:
        """Take one step; see the module's formula."""
        axis, count = selection(b.shape, b.options)
        m = b.blend("moment", b.gradient, 1.0, 1.0)
        b.release()
        chosen = yield from parts.largest_slices(b, m, axis, count)
        submatrix = parts.take_slices(m, chosen, axis)
        o = yield from parts.orthogonalize_slices(b, submatrix, axis)
        b.commit("moment", parts.decay_slices(m, chosen, axis, b.options["momentum"]))
        rank = min(count, b.shape[1 - axis])
        size = b.options["alpha"] * parts.scale(b.options["update_scale"], b.shape, b.fans, rank)
        delta = parts.spread_slices(m, o.factor * size, chosen, axis)
        return parts.Update(delta, submatrix, o.factor, o.singular_values, o.fallbacks)

    def state(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shape of the moment: mn numbers."""
        return {"moment": shape}

    def axes(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, Axes]:
        """Return the axes of the moment, those of the matrix."""
        return {"moment": (0, 1)}

    def state_holds_spectrum(self, options: Mapping[str, Any]) -> bool:
        """Return False: a part of the moment is orthogonalized."""
        return False

    def sharded_step_bytes(
        self, shape: tuple[int, int], split: int, options: Mapping[str, Any], ranks: int
    ) -> float:
        """Return the bytes of the norms (fp64), and of the chosen submatrix to its owner and back.

        Infinite where the rows that are chosen from are split: how many of them a rank holds only the device knows.
        """
        axis, count = selection(shape, options)
        if split == axis:
            return math.inf
        norms = 16.0 * shape[axis] * (ranks - 1) / ranks
        return norms + 8.0 * count * shape[1 - axis] * (ranks - 1) / ranks**2


def selection(shape: tuple[int, int], options: Mapping[str, Any]) -> tuple[int, int]:
    """Return what is chosen of (m, n) matrices: 0 for rows or 1 for columns, and how many, at least one."""
    axis = {"rows": 0, "columns": 1}.get(options["select"], int(shape[0] > shape[1]))
    # A fraction such as 0.1 has no exact float: 0.1·30 must not become four of them.
    return axis, max(1, math.ceil(options["fraction"] * shape[axis] - 1e-9))


RULE = Dion2()


@dataclass(frozen=True, kw_only=True)
class Dion2Options(ScaleOptions, PolarOptions, DecayOptions):
    """Dion2's own options are what it chooses."""

    fraction: float = option(
        0.25, "φ, part of the rows or columns that a step orthogonalizes, at least one of them",
        minimum=1e-6, maximum=1,
    )  # fmt: skip
    select: Literal["short", "rows", "columns"] = option(
        "short", "what is chosen from: the slices along the shorter side (rows if square), rows, or columns"
    )


PRESETS = (
    Preset(
        "dion2",
        "dion2",
        Dion2Options(
            lr=0.02,
            weight_decay=0.01,
            orthogonalizer="polar_express",
            orthogonalizer_dtype="auto",
            update_scale="fan_ratio",
            aux_lr=3e-4,
            aux_weight_decay=0.01,
        ).values,
        doc="Dion2: Muon on the quarter of the rows or columns whose momentum is largest",
        source="Ahn et al. 2025, arXiv 2512.16928; code github.com/microsoft/dion",
        rates=(
            PeakRate(100e6, 200e6, 2e-2, "github.com/microsoft/dion, configs/dion2_160m.yaml (fraction 0.5)"),
        ),
    ),
)
