"""MuonClip: Muon, and QK-clip after each step (Kimi K2, arXiv 2507.20534, Algorithm 1).

The step is Moonlight's Muon (`optimizers.rules.muon`). Then, for each head with S = max qᵀk/√d > τ over the batch:

    W_q ← (τ/S)^½ W_q      W_k ← (τ/S)^½ W_k

which is a hook (`optimizers.qk_clip`): whoever runs the model gives it the logits (`optimizer.units.clip_attention`).
Read in descriptions of the paper: the rule, τ = 100. Derived: where query heads share a key head, the queries take the
whole factor. The look-ahead is that of Moonlight's code; the formula as it is described has none (`nesterov=false`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optimizers.options import OptionError, option
from optimizers.rule_options import AS_ADAMW, PeakRate, Preset, ScaledOrthogonalOptions
from optimizers.rules.muon import Muon

RULE = Muon()


@dataclass(frozen=True, kw_only=True)
class MuonClipOptions(ScaledOrthogonalOptions):
    """MuonClip's own option is the bound of attention logits."""

    qk_clip_threshold: float | None = option(
        100.0,
        "τ: largest attention logit of a head, above which its W_q and W_k shrink; null: off",
        minimum=1e-6,
    )

    @staticmethod
    def check(values: Mapping[str, Any]) -> None:
        """Refuse to keep the norm of weights that QK-clip shrinks.

        Raises:
            OptionError: naming the option.
        """
        if values["qk_clip_threshold"] is not None and values["weight_norm"] != "free":
            raise OptionError(
                "weight_norm",
                values["weight_norm"],
                "undoes QK-clip, which makes the weights of queries and keys smaller",
                ("free", f"{values['weight_norm']} with qk_clip_threshold=null"),
            )


PRESETS = (
    Preset(
        "muon_clip",
        "muon_clip",
        MuonClipOptions(
            lr=1e-3,
            weight_decay=0.1,
            nesterov=True,
            orthogonalizer="newton_schulz",
            orthogonalizer_dtype="auto",
            aux_weight_decay=0.1,
        ).values,
        doc="MuonClip: Moonlight's Muon, and query and key projections that shrink where attention logits exceed 100",
        source="Kimi Team 2025, arXiv 2507.20534 (Kimi K2), Algorithm 1",
        rates=(PeakRate(50e6, 1.5e9, 1e-3, f"{AS_ADAMW}as muon_moonlight"),),
    ),
)
