"""SUMO: momentum in a gradient subspace, orthogonalized, plus the gradient outside it (arXiv 2505.24749).

    Ĝ = QᵀG      M ← μM + Ĝ      O = (MMᵀ)^(-1/2) M      W ← W - η α (s·QO + ρ·(G - QQᵀG))

`galore_muon` is this rule with ρ = 0, no transport and Newton-Schulz. What was read, derived, and not stated in the
paper: docs/optimizers.md#sumo.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType

from optimizers.rule_options import TUNED_TINY, PeakRate, Preset
from optimizers.rules.low_rank import ComposedOptions, LowRankRule

RULE = LowRankRule()


@dataclass(frozen=True, kw_only=True)
class SumoOptions(ComposedOptions):
    """The family's options; their defaults are Algorithm 1 and the text of the paper, with large refreshes spread."""


LATER = MappingProxyType(
    {
        "inner": ("orthogonalize",),
        # `residual_scale` tells them apart.
        "residual": ("drop", "sgd"),
        "gradient_scaling": ("none",),
        "error_feedback": (False,),
    }
)

_PAPER = SumoOptions(refresh_stagger=False)
_OFFICIAL = replace(
    _PAPER,
    side="long",
    basis="svd",
    refresh_offset=1,
    transport=False,
    nesterov="stored",
    orthogonalizer="svd",
    alpha=4.0,
    weight_decay=0.01,
    decay_order="after",
    aux_lr=1e-5,
    aux_scheduled=False,
    aux_betas=(0.9, 0.999),
    aux_eps=1e-6,
    aux_eps_form="raw",
)
_GALORE_MUON = replace(
    _PAPER,
    refresh_stagger="auto",
    side="long",
    basis="svd",
    transport=False,
    momentum_form="ema",
    nesterov=True,
    orthogonalizer="newton_schulz",
    orthogonalizer_dtype="auto",
    residual="drop",
    residual_scale=0.0,
)
_MATCHED = PeakRate(
    50e6,
    1.5e9,
    1e-3,
    "AdamW's value: update_scale=rms_max gives updates of AdamW's size (arXiv 2502.16982); "
    "SUMO's paper states none",
)

PRESETS = (
    Preset(
        "sumo_paper",
        "sumo",
        _PAPER.values,
        doc="SUMO as Algorithm 1 and the text have it: short side, transport, exact polar factor, residual",
        source="Refael et al. 2025, arXiv 2505.24749, Algorithm 1",
        rates=(_MATCHED,),
        later=LATER,
    ),
    Preset(
        "sumo",
        "sumo",
        SumoOptions().values,
        doc="SUMO with the recommended settings (those of sumo_paper; large models spread their refreshes)",
        source="Refael et al. 2025, arXiv 2505.24749; differences from sumo_paper: docs/optimizers.md",
        rates=(PeakRate(1e6, 4e6, 4e-3, TUNED_TINY, tuned=True, aux_lr=1.6e-2), _MATCHED),
        later=LATER,
    ),
    Preset(
        "sumo_official",
        "sumo",
        _OFFICIAL.values,
        doc="SUMO as the public code behaves: long side, full SVD, no transport, stored Nesterov, alpha 4",
        source="public code of arXiv 2505.24749 (sumo_optimizer.py), read through a fork",
        rates=(PeakRate(50e6, 1.5e9, 1e-3, "default of SUMO's public code (sumo_optimizer.py)"),),
        later=LATER,
    ),
    Preset(
        "sumo_ns5",
        "sumo",
        replace(_PAPER, orthogonalizer="newton_schulz").values,
        doc="sumo_paper with five Newton–Schulz steps instead of the exact polar factor",
        source="Refael et al. 2025, arXiv 2505.24749, §4 (SUMO-NS5)",
        rates=(_MATCHED,),
        later=LATER,
    ),
    Preset(
        "galore_muon",
        "sumo",
        _GALORE_MUON.values,
        doc="Muon in GaLore's subspace: SUMO without exact factor, transport and residual",
        source="the ablation between GaLore (arXiv 2403.03507) and SUMO (arXiv 2505.24749)",
        rates=(_MATCHED,),
        later=LATER,
    ),
)
