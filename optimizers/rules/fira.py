"""Fira: GaLore, and the gradient outside its subspace scaled as Adam scaled the one inside (arXiv 2410.01623).

    R = QᵀG    φ_j = ‖ψ(R)_j‖ / ‖R_j‖    W ← W - η α (Q ψ(R) + φ·(G - QR)),    ψ: Adam

Read: the scaling by column of R and the norm-growth limiter γ = 1.01 on the scaled residual; in the public code
(fira_adamw.py), that the limiter compares norms without bias correction, ε before bias correction, 1e-8 next to
‖R_j‖, and α = 0.25 at 60M (0.0625 at 1B) with lr 0.01 in its scripts. Different from the code: there α multiplies Q
ψ(R) and the R that is subtracted, so that with α < 1 a part of the gradient inside stays in the residual; here α
multiplies the whole update. With α = 1 the two agree (tested). The code decays weights after the step
(`decay_order`).
"""

from __future__ import annotations

from dataclasses import dataclass

from optimizers.rule_options import PeakRate, Preset
from optimizers.rules.low_rank import ComposedOptions, LowRankRule

RULE = LowRankRule()


@dataclass(frozen=True, kw_only=True)
class FiraOptions(ComposedOptions):
    """The family's options, set to Fira."""


PRESETS = (
    Preset(
        "fira",
        "fira",
        FiraOptions(
            lr=0.01,
            inner="adam",
            betas=(0.9, 0.999),
            eps=1e-6,
            eps_form="raw",
            side="long",
            basis="svd",
            transport=False,
            residual="scaled",
            norm_growth_limit=1.01,
            norm_growth_target="residual",
            alpha=0.25,
            aux_betas=(0.9, 0.999),
            aux_eps=1e-6,
            aux_eps_form="raw",
        ).values,
        doc="GaLore, and the gradient outside the subspace scaled as Adam scaled the one inside",
        source="Chen et al. 2024, arXiv 2410.01623 (Fira), §4; code github.com/xichen-fy/Fira",
        rates=(PeakRate(50e6, 1.5e9, 1e-2, "Fira's C4 scripts, 60M and 1B (pre_training_c4/scripts)"),),
    ),
)
