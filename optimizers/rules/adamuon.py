"""AdaMuon: Muon with a second moment of each element of its factor (Si et al. 2025, arXiv 2507.11005v3, Algorithm 1).

M ← μM + G      O = orth(sign(M))      V ← β₂V + (1 - β₂)·O⊙O      Ô = O / (√V + ε)
W ← (1 - ηλ)W - η α·0.2·√(mn)·Ô / ‖Ô‖_F

Read in descriptions of the paper: sign, second moment without bias correction, the rescaling. In the paper one β serves
as μ and β₂ (derived from its text; both are options here). Not stated: ε. The authors' first code and
pytorch_optimizer orthogonalize M instead of its sign (`stabilizer=none`) and correct the bias of V, which the
rescaling cancels but for ε.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from optimizers.options import option
from optimizers.rule import Rule
from optimizers.rule_options import AS_ADAMW, NormalizedOrthogonalOptions, PeakRate, Preset
from optimizers.rules import parts

if TYPE_CHECKING:
    from optimizers.interfaces import MatrixBatch, Update


class AdaMuon(Rule):
    """Muon with Adam's denominator on the orthogonal factor; the factor needs the whole matrix."""

    def update(self, b: MatrixBatch) -> Update:
        """Take one step; see the module's formula."""
        u = parts.momentum(b, b.gradient, overwrites=True)
        s = u.sign() if b.options["stabilizer"] == "sign" else u
        o = parts.orthogonalize(s, b.options)
        delta = parts.scaled_to_rms(b, parts.normalized_elements(b, o.factor))
        return parts.Update(delta, s, o.factor, o.singular_values, o.fallbacks)

    def state(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of both moments: 2mn numbers."""
        return {"moment": shape, "second_moment": shape}

    def state_holds_spectrum(self, options: Mapping[str, Any]) -> bool:
        """Return False where a sign, or a look-ahead that is not stored, is orthogonalized."""
        return options["stabilizer"] == "none" and options["nesterov"] is not True


RULE = AdaMuon()


@dataclass(frozen=True, kw_only=True)
class AdaMuonOptions(NormalizedOrthogonalOptions):
    """AdaMuon's own option is what it orthogonalizes."""

    stabilizer: Literal["sign", "none"] = option(
        "sign", "what is orthogonalized: the signs of the moment (the paper), or the moment (the first code)"
    )


PRESETS = (
    Preset(
        "adamuon",
        "adamuon",
        AdaMuonOptions(
            lr=6e-4,
            weight_decay=0.1,
            orthogonalizer="newton_schulz",
            orthogonalizer_dtype="auto",
            aux_weight_decay=0.1,
        ).values,
        doc="AdaMuon: the orthogonal factor of the momentum's signs, over the root of its second moment",
        source="Si et al. 2025, arXiv 2507.11005v3, Algorithm 1",
        rates=(
            PeakRate(
                100e6, 1.6e9, 6e-4, f"{AS_ADAMW}6e-4 in the authors' GPT-2 small (gpt2/config/small.py)"
            ),
        ),
    ),
)
