"""GaLore: Adam on the gradient's coordinates in a subspace (arXiv 2403.03507).

Ĝ = GQ   M ← β₁M + (1 - β₁)Ĝ   V ← β₂V + (1 - β₂)Ĝ²   W ← W - η α (√b₂/b₁) (M / (√V + ε)) Qᵀ,  bᵢ = 1 - βᵢᵗ
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from optimizers.options import option
from optimizers.rule import Axes, Rule
from optimizers.rule_options import TUNED_TINY, AdamOptions, LowRankOptions, PeakRate, Preset
from optimizers.rules import parts

if TYPE_CHECKING:
    from torch import Tensor

    from optimizers.interfaces import MatrixBatch, Steps, Update


class GaLore(Rule):
    """GaLore as galore-torch computes it (`std`: the moment keeps the long side; no transport at a refresh)."""

    needs_whole: ClassVar[bool] = False

    def update(self, b: MatrixBatch) -> Steps[Update]:
        """Take one step; see the module's formula."""
        yield from parts.refresh(b)
        g = yield parts.project(b)
        return parts.Update(parts.lift(b, adam(b, g)))

    def state(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return r·short numbers for the basis and 2·r·long for the moments (side "long")."""
        state = parts.subspace_state(shape, options)
        return {**state, "second_moment": state["moment"]}

    def axes(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, Axes]:
        """Return the axes of basis and moments; both moments have the same."""
        axes = parts.subspace_axes(shape, options)
        return {**axes, "second_moment": axes["moment"]}

    def low_rank_form(self, shape: tuple[int, int], options: Mapping[str, Any]) -> tuple[int, float] | None:
        """Return the rank; nothing of the gradient outside of the subspace is kept."""
        return parts.rank_of(shape, options), 0.0

    def sharded_step_bytes(
        self, shape: tuple[int, int], split: int, options: Mapping[str, Any], ranks: int
    ) -> float:
        """Return the bytes of Ĝ, or nothing where the moments keep the axis that is split."""
        return parts.projection_traffic(shape, split, options, ranks)


def adam(b: MatrixBatch, gradient: Tensor) -> Tensor:
    """Advance both moments by a projected gradient and return α·M̂/(√V̂ + ε).

    With `eps_form` raw, ε is added before the bias correction.
    """
    (beta1, beta2), eps = b.options["betas"], b.options["eps"]
    first = b.blend("moment", gradient, beta1, 1.0 - beta1)
    second = b.blend("second_moment", gradient.square(), beta2, 1.0 - beta2)
    bias1, bias2 = 1.0 - beta1**b.count, (1.0 - beta2**b.count).sqrt()
    # (√b₂/b₁)·M/(√V + ε') is M̂/(√V̂ + ε) for ε' = ε√b₂, and the raw form for ε' = ε.
    size = (b.options["alpha"] * bias2 / bias1).to(first.dtype)
    floor = eps if b.options["eps_form"] == "raw" else (eps * bias2).to(first.dtype)
    return first.div(second.sqrt().add_(floor)).mul_(size)


RULE = GaLore()


@dataclass(frozen=True, kw_only=True)
class GaLoreOptions(AdamOptions, LowRankOptions):
    """GaLore: a subspace, and Adam's moments in it."""

    eps_form: Literal["corrected", "raw"] = option(
        "corrected",
        "corrected: √v̂ + eps (torch); raw: √v + eps before bias correction (Hugging Face, galore-torch)",
    )


_SCRIPTS = "GaLore (arXiv 2403.03507), scripts/benchmark_c4"

PRESETS = (
    Preset(
        "galore",
        "galore",
        GaLoreOptions(
            lr=0.01,
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
    ),
)
