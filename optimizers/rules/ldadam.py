"""LDAdam: a subspace that follows in every step, moments that are carried over, and error feedback (arXiv 2410.16103).

    A = G + E    B = ρ Q₋M̂₋ + (1 - ρ)A    Q = QR(B BᵀQ₋)    C = QᵀQ₋
    M₋ ← C M₋    V₋ ← (1 - β₂ᵗ⁻¹)·|C∘C (V̂₋ - M̂₋²) + (C M̂₋)²|    then Adam on QᵀA
    W ← W - η Q M̂/(√V̂ + ε)    E ← A - QQᵀA + β₁/(1 - β₁)·(Q₋M₋ - Q C M₋)

Read: these equations (through a catalogue), the first basis from an SVD, the side (tall matrices are projected from
the right), and β = (0.908, 0.99), ρ = 0.908 from the public code's signature. Derived: BᵀQ₋ without forming B. Not
stated: the public code keeps E in the gradient's memory; here it is a state of the weight's size.
"""

from __future__ import annotations

from dataclasses import dataclass

from optimizers.rule_options import PeakRate, Preset
from optimizers.rules.low_rank import ComposedOptions, LowRankRule

RULE = LowRankRule()


@dataclass(frozen=True, kw_only=True)
class LDAdamOptions(ComposedOptions):
    """The family's options, set to LDAdam."""


PRESETS = (
    Preset(
        "ldadam",
        "ldadam",
        LDAdamOptions(
            lr=1e-3,
            inner="adam",
            betas=(0.908, 0.99),
            eps=1e-8,
            side="long",
            basis="power",
            subspace_momentum=0.908,
            refresh_interval=1,
            refresh_stagger=False,
            transport="projection_aware",
            residual="drop",
            residual_scale=0.0,
            error_feedback="generalized",
            norm_growth_target="total",
            aux_betas=(0.908, 0.99),
        ).values,
        doc="Adam in a subspace that follows the gradient in every step, with error feedback",
        source="Robert et al. 2024, arXiv 2410.16103 (LDAdam), Algorithm 1",
        rates=(PeakRate(50e6, 1.5e9, 1e-3, "default of the public code (LDAdamW)"),),
    ),
)
