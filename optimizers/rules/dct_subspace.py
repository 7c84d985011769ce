"""Adam in a subspace of DCT-II columns that hold most of the gradient: DCT-AdamW (arXiv 2505.17967).

    S = DᵀG by FFT    Q: the r columns of D with the largest ‖S_k‖    C = QᵀQ₋    M ← C M, V ← |C V|    then Adam on QᵀG

A subspace is r column numbers; D is shared by all matrices with this side. C has entries 0 and 1, so that carrying
moments over as LDAdam does is the paper's |C V|.

Read: the equations through a catalogue; in the public code (dct_adamw.py), β = (0.9, 0.999), ε = 1e-8 after bias
correction, a new choice in every step, no error feedback and no rotation of the moments by default (the paper has
both as options; here moments are carried over, `error_feedback=gradient` is the other). Different: columns are ranked
by the 2-norm, of which the paper proves contraction; the code's default is the 1-norm. Not stated: a learning rate
that we read.
"""

from __future__ import annotations

from dataclasses import dataclass

from optimizers.rule_options import PeakRate, Preset
from optimizers.rules.low_rank import ComposedOptions, LowRankRule

RULE = LowRankRule()


@dataclass(frozen=True, kw_only=True)
class DctOptions(ComposedOptions):
    """The family's options, set to DCT-AdamW."""


PRESETS = (
    Preset(
        "dct_subspace",
        "dct_subspace",
        DctOptions(
            lr=1e-3,
            inner="adam",
            betas=(0.9, 0.999),
            eps=1e-8,
            side="long",
            basis="dct",
            refresh_interval=1,
            refresh_stagger=False,
            transport="projection_aware",
            residual="drop",
            residual_scale=0.0,
            norm_growth_target="total",
            aux_betas=(0.9, 0.999),
        ).values,
        doc="Adam in the columns of the DCT-II matrix that hold most of the gradient",
        source="Modoranu et al. 2025, arXiv 2505.17967 (DCT-AdamW)",
        rates=(PeakRate(50e6, 1.5e9, 1e-3, "AdamW's value: an Adam step inside the subspace, alpha 1"),),
    ),
)
