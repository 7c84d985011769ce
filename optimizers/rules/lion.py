"""Lion: the sign of a momentum (Chen et al. 2023, arXiv 2302.06675, Program 1).

C ← β₁M + (1 - β₁)G      M ← β₂M + (1 - β₂)G      W ← (1 - ηλ)W - η α·sign(C)

It is elementwise, so that every layout steps the rows that it holds and nothing crosses ranks. It takes the hidden
matrices, as Muon does; the paper lets it step every parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from optimizers.rule import Axes, Rule
from optimizers.rule_options import BetaOptions, MatrixOptions, PeakRate, Preset
from optimizers.rules import parts

if TYPE_CHECKING:
    from optimizers.interfaces import MatrixBatch, Update


class Lion(Rule):
    """Lion on hidden matrices."""

    needs_whole: ClassVar[bool] = False

    def update(self, b: MatrixBatch) -> Update:
        """Take one step; see the module's formula."""
        beta1, beta2 = b.options["betas"]
        g = b.gradient
        c = b.state["moment"].lerp(g, 1.0 - beta1)
        b.blend("moment", g, beta2, 1.0 - beta2)
        delta = c.sign_()
        return parts.Update(delta if b.options["alpha"] == 1.0 else delta.mul_(b.options["alpha"]))

    def state(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shape of the moment: mn numbers."""
        return {"moment": shape}

    def axes(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, Axes]:
        """Return the axes of the moment, those of the matrix."""
        return {"moment": (0, 1)}

    def sharded_step_bytes(
        self, shape: tuple[int, int], split: int, options: Mapping[str, Any], ranks: int
    ) -> float:
        """Return 0: each rank steps the elements that it holds."""
        return 0.0


RULE = Lion()


@dataclass(frozen=True, kw_only=True)
class LionOptions(BetaOptions, MatrixOptions):
    """Lion takes two decay rates, and the AdamW of the other parameters."""


PRESETS = (
    Preset(
        "lion",
        "lion",
        LionOptions(lr=1e-4, betas=(0.9, 0.99), weight_decay=1.0, aux_lr=1e-3, aux_weight_decay=0.1).values,
        doc="Lion: the sign of an interpolated momentum, on hidden matrices",
        source="Chen et al. 2023, arXiv 2302.06675, Program 1; betas as there",
        rates=(
            PeakRate(
                50e6,
                1.5e9,
                1e-4,
                "a tenth of AdamW's 1e-3, with ten times its weight decay: the paper's advice is 3 to 10 "
                "(arXiv 2302.06675, §5)",
                aux_lr=1e-3,
            ),
        ),
    ),
)
