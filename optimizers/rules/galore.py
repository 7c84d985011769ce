"""GaLore: Adam on the gradient's coordinates in a subspace (arXiv 2403.03507).

Ĝ = GQ   M ← β₁M + (1 - β₁)Ĝ   V ← β₂V + (1 - β₂)Ĝ²   W ← W - η α (√b₂/b₁) (M / (√V + ε)) Qᵀ,  bᵢ = 1 - βᵢᵗ

As galore-torch computes it (`std`: the moment keeps the long side; no transport at a refresh).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from optimizers.rule_options import TUNED_TINY, PeakRate, Preset
from optimizers.rules.low_rank import ComposedOptions, LowRankRule

RULE = LowRankRule()


@dataclass(frozen=True, kw_only=True)
class GaLoreOptions(ComposedOptions):
    """The family's options, set to GaLore."""


_SCRIPTS = "GaLore (arXiv 2403.03507), scripts/benchmark_c4"

PRESETS = (
    Preset(
        "galore",
        "galore",
        GaLoreOptions(
            lr=0.01,
            inner="adam",
            residual="drop",
            residual_scale=0.0,
            norm_growth_target="total",
            betas=(0.9, 0.999),
            eps=1e-6,
            eps_form="raw",
            side="long",
            basis="svd",
            transport=False,
            alpha=0.25,
            aux_betas=(0.9, 0.999),
            aux_eps=1e-6,
            aux_eps_form="raw",
        ).values,
        doc="GaLore: Adam in the gradient's leading subspace",
        source="Zhao et al. 2024, arXiv 2403.03507; code galore-torch 1.0",
        rates=(
            PeakRate(1e6, 4e6, 5e-3, TUNED_TINY, tuned=True, aux_lr=1.6e-2),
            PeakRate(50e6, 1.5e9, 1e-2, f"{_SCRIPTS}, 60M to 1B", tuned=True),
            PeakRate(6e9, 8e9, 5e-3, f"{_SCRIPTS}/llama_7b.sh"),
        ),
        later=MappingProxyType(
            {
                "inner": ("adam",),
                "residual": ("drop",),
                "residual_scale": (0.0,),
                "refresh_threshold": (None,),
                "norm_growth_limit": (None,),
                "norm_growth_target": ("total",),
                "gradient_scaling": ("none",),
                "error_feedback": (False,),
            }
        ),
    ),
)
