"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv 2409.11321, Algorithms 3 and 4).

G' = Q_LᵀGQ_R     M' ← β₁M' + (1 - β₁)G'     V ← β₂V + (1 - β₂)G'⊙G'     W ← (1 - ηλ)W - η α Q_L (M̂'/(√V + ε)) Q_Rᵀ
L ← β₂L + (1 - β₂)GGᵀ     R ← β₂R + (1 - β₂)GᵀG     every K steps, after the update:  Q_L ← QR(L Q_L), Q_R ← QR(R Q_R)

Read in the paper: all of this, and that either side may be left unrotated. M is kept in the eigenbasis and turned with
it, M' ← Q_newᵀQ_old M', which is the paper's Q_LᵀMQ_R without a rotation a step. Read in the authors' code, not stated
in the paper: columns are sorted by their eigenvalue estimates before QR (and V with them); the first gradient makes the
basis, by an eigendecomposition, and moves nothing, so that no gradient is seen in a basis made of itself; ε is added
before the bias correction. Derived: what the first gradient does not determine of a basis (`linalg.eigenbasis`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from optimizers.options import OptionError, option
from optimizers.rule import Rule
from optimizers.rule_options import AdamOptions, PeakRate, Preset, RefreshOptions
from optimizers.rules import parts

if TYPE_CHECKING:
    from torch import Tensor

    from optimizers.interfaces import MatrixBatch, Steps, Update

SIDES = ("left", "right")


class Soap(Rule):
    """SOAP on whole matrices: both Grams contract a side, whichever one is split."""

    def update(self, b: MatrixBatch) -> Steps[Update]:
        """Take one step; see the module's formula."""
        yield from parts.start_eigenbases(b, sorted(b.fresh))
        g = b.gradient
        rotated = parts.rotated(b, g)
        for position in b.fresh:
            rotated[position].zero_()
        delta = parts.rotated(b, adam(b, rotated), back=True)
        parts.accumulate_grams(b, g)
        yield from parts.iterate_eigenbases(b, [position for position in b.due if position not in b.fresh])
        return parts.Update(delta)

    def state(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return 2mn numbers for the moments, and 2k² for each rotated side of length k (3k² with fp64 Grams)."""
        state: dict[str, tuple[int, ...]] = {"moment": shape, "second_moment": shape}
        for side in rotated_sides(shape, options):
            k = shape[SIDES.index(side)]
            state[f"{side}_gram"] = (k, k) if options["gram_dtype"] == "float32" else (2, k, k)
            state[f"{side}_basis"] = (k, k)
        return state


def rotated_sides(shape: tuple[int, int], options: Mapping[str, Any]) -> Sequence[str]:
    """Return the sides of (m, n) matrices that have a basis: "left" (length m), "right" (length n)."""
    limit = options["max_side"]
    sides = [side for side, k in zip(SIDES, shape) if limit is None or k <= limit]
    if options["one_sided"] and len(sides) == 2:
        return [SIDES[0] if shape[0] <= shape[1] else SIDES[1]]
    return sides


def adam(b: MatrixBatch, gradient: Tensor) -> Tensor:
    """Advance both moments by a rotated gradient and return α·(√b₂/b₁)·M'/(√V + ε), bᵢ = 1 - βᵢᵗ.

    t counts the steps after the first one, which moves nothing.
    """
    (beta1, beta2), eps = b.options["betas"], b.options["eps"]
    first = b.blend("moment", gradient, beta1, 1.0 - beta1)
    second = b.blend("second_moment", gradient.square(), beta2, 1.0 - beta2)
    t = (b.count - 1.0).clamp_min(1.0)
    size = (b.options["alpha"] * (1.0 - beta2**t).sqrt() / (1.0 - beta1**t)).to(first.dtype)
    return first.div(second.sqrt().add_(eps)).mul_(size)


RULE = Soap()


@dataclass(frozen=True, kw_only=True)
class SoapOptions(AdamOptions, RefreshOptions):
    """SOAP: Adam's moments, and bases that are renewed."""

    max_side: int | None = option(
        10000,
        "sides longer than this are not rotated and have no state of their own; null: all are",
        minimum=1,
    )
    one_sided: bool = option(False, "rotate the shorter side only (half the work, and its state)")
    gram_dtype: Literal["float32", "float64"] = option(
        "float32",
        "precision of L and R and of the power iteration; float64 (kept as two float32 numbers) is for "
        "comparisons: the last columns of a basis are as accurate as eps times the condition number of L",
    )

    @staticmethod
    def check(values: Mapping[str, Any]) -> None:
        """Refuse eps = 0, with which the first step divides 0 by 0.

        Raises:
            OptionError: naming the option.
        """
        if values["eps"] == 0:
            raise OptionError("eps", 0, "divides 0 by 0: the first gradient makes the bases only", ("1e-8",))


PRESETS = (
    Preset(
        "soap",
        "soap",
        SoapOptions(
            lr=3e-3,
            weight_decay=1e-4,
            betas=(0.95, 0.95),
            refresh_interval=10,
            aux_betas=(0.95, 0.95),
            aux_weight_decay=1e-4,
        ).values,
        doc="SOAP: Adam in the eigenbasis of Shampoo's preconditioner, renewed by QR",
        source="Vyas et al. 2024, arXiv 2409.11321; code github.com/nikhilvyas/SOAP",
        rates=(
            PeakRate(
                50e6, 1.5e9, 3e-3, "SOAP (arXiv 2409.11321), 360M and 660M; default of its code", tuned=True
            ),
        ),
    ),
)
