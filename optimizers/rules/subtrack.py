"""SubTrack++: a subspace that moves along geodesics, with Fira's residual and LDAdam's moments (arXiv 2502.01586).

    A = QᵀG    T = 2(G - QA)Aᵀ ≈ σ u vᵀ    Q ← Q v cos(ησ) vᵀ + u sin(ησ) vᵀ + Q(I - vvᵀ)    every K steps
    W ← W - η α (Q ψ(R) + φ·(G - QR)),  R = QᵀG, φ and γ as in Fira, moments carried over as in LDAdam

Read: the geodesic with a rank-1 tangent, the first basis from an SVD, recovery scaling with γ = 1.01, and in the
scripts for C4 lr 1e-3 (60M) and 1e-4 (1B), scale 0.25, K = 200, η = 10. Derived: T in two products with the gradient.
The sign is that of descent on ‖G - QQᵀG‖². Different from the public code: α multiplies the whole update (see
`fira`), the moments are carried over before the step that uses them, and the basis is orthonormalized after each
move. η multiplies σ, which has the size of a squared gradient: with other gradients η must be another one.
"""

from __future__ import annotations

from dataclasses import dataclass

from optimizers.rule_options import PeakRate, Preset
from optimizers.rules.low_rank import ComposedOptions, LowRankRule

RULE = LowRankRule()


@dataclass(frozen=True, kw_only=True)
class SubTrackOptions(ComposedOptions):
    """The family's options, set to SubTrack++."""


_SCRIPTS = "SubTrack++'s C4 scripts (github.com/criticalml-uw/SubTrack, scripts/c4)"

PRESETS = (
    Preset(
        "subtrack",
        "subtrack",
        SubTrackOptions(
            lr=1e-3,
            inner="adam",
            betas=(0.9, 0.999),
            eps=1e-6,
            eps_form="raw",
            side="long",
            basis="tracked",
            track_step=10.0,
            transport="projection_aware",
            residual="scaled",
            norm_growth_limit=1.01,
            norm_growth_target="residual",
            alpha=0.25,
            aux_betas=(0.9, 0.999),
            aux_eps=1e-6,
            aux_eps_form="raw",
        ).values,
        doc="Fira in a subspace that moves along geodesics instead of being found anew",
        source="Rajabi et al. 2025, arXiv 2502.01586 (SubTrack++)",
        rates=(
            PeakRate(50e6, 150e6, 1e-3, f"{_SCRIPTS}, 60M"),
            PeakRate(1e9, 1.5e9, 1e-4, f"{_SCRIPTS}, 1B"),
        ),
    ),
)
