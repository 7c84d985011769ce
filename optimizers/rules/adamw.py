"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), on every parameter or on those that no matrix rule takes.

M ← β₁M + (1 - β₁)G   V ← β₂V + (1 - β₂)G²   W ← (1 - ηλ)W - η M̂/(√V̂ + ε)

It is elementwise, so it has no `Rule`: `optimizers.rules.parts.adamw_kernels` steps parameters instead of matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

from optimizers.rule_options import CONDA_BASELINE, TUNED_TINY, AdamOptions, AuxRateOptions, PeakRate, Preset


@dataclass(frozen=True, kw_only=True)
class AdamWOptions(AuxRateOptions, AdamOptions):
    """AdamW takes what all rules with Adam's moments take, and like a matrix rule a second rate."""


PRESETS = (
    Preset(
        "adamw",
        "adamw",
        AdamWOptions(weight_decay=0.1).values,
        doc="AdamW on every parameter (torch's fused kernel)",
        source="Loshchilov & Hutter 2019, arXiv 1711.05101",
        later={"aux_lr": (None,)},
        rates=(
            PeakRate(1e6, 4e6, 2e-3, TUNED_TINY, tuned=True, aux_lr=1.6e-2),
            PeakRate(50e6, 1.5e9, 1e-3, CONDA_BASELINE),
            PeakRate(6e9, 8e9, 3e-4, "LLaMA (arXiv 2302.13971), Table 2, 7B"),
        ),
    ),
)
