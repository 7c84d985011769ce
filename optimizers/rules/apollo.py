"""APOLLO: Adam under a random projection gives only the size of each channel's gradient (arXiv 2412.05270).

    R = PG, P_ij ~ N(0, 1/r)    R̃ = M̂ / (√V̂ + ε)    s_j = ‖R̃_j‖ / ‖R_j‖    W ← W - η α G diag(s)

`apollo_mini` has one s for the matrix, ‖R̃‖/‖R‖, and rank 1.

Read: Algorithm 1 of the paper through a catalogue; in apollo-torch 1.0.3, whose licence (CC-BY-NC) lets us compare
numbers and nothing else: a new P every 200 steps, γ = 1.01 of Fira's limiter on G diag(s), compared without bias
correction, α = √scale with scale 1 (channel) and 128 (tensor), ε before bias correction. Not stated: 1e-8 next to
‖R_j‖ is in the code only. pytorch_optimizer's APOLLO is another rule: it scales R and brings it back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from optimizers.rule_options import PeakRate, Preset
from optimizers.rules.low_rank import ComposedOptions, LowRankRule

RULE = LowRankRule()


@dataclass(frozen=True, kw_only=True)
class ApolloOptions(ComposedOptions):
    """The family's options, set to APOLLO."""


_APOLLO = ApolloOptions(
    lr=0.01,
    inner="adam",
    betas=(0.9, 0.999),
    eps=1e-6,
    eps_form="raw",
    side="long",
    basis="gaussian",
    transport=False,
    residual="drop",
    residual_scale=0.0,
    gradient_scaling="channel",
    norm_growth_limit=1.01,
    norm_growth_target="total",
    aux_betas=(0.9, 0.999),
    aux_eps=1e-6,
    aux_eps_form="raw",
)
_RATE = "APOLLO's scripts for LLaMA-350M: 60,000 steps, 512 sequences of 1024 (rank 256, scale 2)"

PRESETS = (
    Preset(
        "apollo",
        "apollo",
        _APOLLO.values,
        doc="the whole gradient, each channel scaled by what Adam does to a random projection of it",
        source="Zhu et al. 2024, arXiv 2412.05270 (APOLLO), Algorithm 1",
        rates=(PeakRate(50e6, 1.5e9, 1e-2, _RATE),),
    ),
    Preset(
        "apollo_mini",
        "apollo",
        replace(_APOLLO, rank=1, gradient_scaling="tensor", alpha=128.0**0.5).values,
        doc="APOLLO with one scale for a matrix, from a random projection of rank 1",
        source="Zhu et al. 2024, arXiv 2412.05270 (APOLLO-Mini)",
        rates=(PeakRate(50e6, 1.5e9, 1e-2, _RATE),),
    ),
)
