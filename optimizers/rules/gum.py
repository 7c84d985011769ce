"""GUM: galore_muon made unbiased by full-rank periods of a random share of the matrices (arXiv 2510.17802).

    every K steps: Q from the gradient, and with probability q the matrix spends the period outside the subspace
    in:  R ← μR + QᵀG/(1 - q),          W ← W - η α s Q·orth(R)
    out: R ← μR + (G - QQᵀG)/q,         W ← W - η α s·orth(R)

The mean of what enters is G. With one orthogonal factor per period and R = 0 at its start, the factors 1/(1 - q) and
1/q change the lengths of R and not its factor.

Read: the equations (through a catalogue): Q from an SVD, orth by Newton-Schulz, q = γ/N_L for γ full-rank layers of
N_L. Not stated where we read: that R starts at 0 in a period (its shapes differ; assumed), momentum and scale (here
galore_muon's), and the side. Different: R is a state of the weight's size for every matrix; an implementation that
allocates it for the sampled ones alone would save that memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from optimizers.rule_options import PeakRate, Preset
from optimizers.rules.low_rank import ComposedOptions, LowRankRule

RULE = LowRankRule()


@dataclass(frozen=True, kw_only=True)
class GumOptions(ComposedOptions):
    """The family's options, set to GUM."""


PRESETS = (
    Preset(
        "gum",
        "gum",
        GumOptions(
            side="long",
            basis="svd",
            transport=False,
            momentum_form="sum",
            orthogonalizer="newton_schulz",
            orthogonalizer_dtype="auto",
            residual="unbiased",
            refresh_stagger=False,
        ).values,
        doc="Muon in GaLore's subspace, made unbiased by random full-rank periods",
        source="Pan et al. 2025, arXiv 2510.17802 (GUM)",
        rates=(
            PeakRate(
                50e6,
                1.5e9,
                1e-3,
                "AdamW's value: update_scale=rms_max gives updates of AdamW's size (arXiv 2502.16982)",
            ),
        ),
    ),
)
