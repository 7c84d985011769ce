"""NorMuon: Muon whose rows take an adaptive step each (Li et al. 2025, arXiv 2510.05491, Algorithm 1).

M ← μM + (1 - μ)G      O = orth(M)      v ← β₂v + (1 - β₂)·mean over columns of O⊙O      Ô = O / (√v + ε), row by row
W ← (1 - ηλ)W - η α·0.2·√(mn)·Ô / ‖Ô‖_F

A row is an output neuron; of a weight that is stored as (in, out) it is a column. The formula was read in a description
of the paper. Differences of the authors' code and of pytorch_optimizer (default): they look ahead (Nesterov), and
restore ‖O‖_F instead of 0.2·√(mn); both agree for an exact factor, times `rms_max`. Not stated: ε (1e-10 there and
here).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimizers.rule import Rule
from optimizers.rule_options import AS_ADAMW, NormalizedOrthogonalOptions, PeakRate, Preset
from optimizers.rules import parts

if TYPE_CHECKING:
    from optimizers.interfaces import MatrixBatch, Update


class NorMuon(Rule):
    """Muon with a second moment for each output neuron; row norms need whole rows of the factor of the whole matrix."""

    def update(self, b: MatrixBatch) -> Update:
        """Take one step; see the module's formula."""
        u = parts.momentum(b, b.gradient, overwrites=True)
        o = parts.orthogonalize(u, b.options)
        delta = parts.scaled_to_rms(b, parts.normalized_rows(b, o.factor))
        return parts.Update(delta, u, o.factor, o.singular_values, o.fallbacks)

    def state(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the moment (mn numbers) and of the second moment of rows.

        The shape does not tell if a weight is stored transposed, so there is room for the longer side: one number for
        each output neuron, and zeros.
        """
        return {"moment": shape, "row_second_moment": (max(shape),)}

    def state_holds_spectrum(self, options: Mapping[str, Any]) -> bool:
        """Return False with a look-ahead that is not stored."""
        return options["nesterov"] is not True


RULE = NorMuon()


@dataclass(frozen=True, kw_only=True)
class NorMuonOptions(NormalizedOrthogonalOptions):
    """NorMuon takes nothing but what rules take that normalize an orthogonal factor."""


PRESETS = (
    Preset(
        "normuon",
        "normuon",
        NorMuonOptions(
            lr=1e-3,
            weight_decay=0.1,
            momentum_form="ema",
            orthogonalizer="newton_schulz",
            orthogonalizer_dtype="auto",
            eps=1e-10,
            aux_weight_decay=0.1,
        ).values,
        doc="NorMuon: Muon, with the orthogonal factor normalized by a second moment of each output neuron",
        source="Li et al. 2025, arXiv 2510.05491, Algorithm 1",
        rates=(PeakRate(50e6, 1.5e9, 1e-3, f"{AS_ADAMW}0.2·√(mn)/‖Ô‖ in Algorithm 1 of arXiv 2510.05491"),),
    ),
)
