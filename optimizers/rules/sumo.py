"""SUMO: momentum in a gradient subspace, orthogonalized, plus the gradient outside it (arXiv 2505.24749).

    Ĝ = QᵀG      M ← μM + Ĝ      O = (MMᵀ)^(-1/2) M      W ← W - η α (s·QO + ρ·(G - QQᵀG))

`galore_muon` is this rule with ρ = 0, no transport and Newton-Schulz.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from optimizers.options import OptionError, option
from optimizers.rule import Axes, Rule
from optimizers.rule_options import TUNED_TINY, LowRankOptions, PeakRate, Preset, ScaledOrthogonalOptions
from optimizers.rules import parts

if TYPE_CHECKING:
    from torch import Tensor

    from optimizers.interfaces import LowRank, MatrixBatch, Steps, Update


class Sumo(Rule):
    """SUMO with every published difference as an option."""

    needs_whole: ClassVar[bool] = False

    def update(self, b: MatrixBatch) -> Steps[Update]:
        """Take the step of Algorithm 1; see the module's formula."""
        # Block 1: Q ← leading singular vectors of G every K steps, and M ← QₙₑwᵀQ M.
        yield from parts.refresh(b)
        g = yield parts.project(b)  # Ĝ = QᵀG
        yield from parts.record_projected_norm(b, g)  # ‖Ĝ‖ ≤ ς asks for a new Q
        # Block 2: M ← μM + Ĝ and O = (MMᵀ)^(-1/2) M.
        m = parts.momentum(b, g)
        o = yield from parts.orthogonalize_subspace(b, m)
        # Block 3: ‖O‖ grows at most by γ a step.
        factor = yield from parts.limit_growth(b, "factor", o.factor)
        # Block 4: α (s·QO + ρ·(G - QĜ)).
        delta = yield from compose(b, g, factor)
        return parts.Update(delta, m, o.factor, o.singular_values, o.fallbacks)

    def state(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return r(m + n) numbers, and one more for each of: norm-growth limiter, residual criterion."""
        state = parts.subspace_state(shape, options)
        if options["norm_growth_limit"] is not None:
            state["previous_norm"] = ()
        if options["refresh_threshold"] is not None:
            state["projected_norm"] = ()
        return state

    def axes(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, Axes]:
        """Return the axes of basis and moment; the norms are one number for the whole matrix."""
        return {**parts.subspace_axes(shape, options), "previous_norm": (), "projected_norm": ()}

    def low_rank_form(self, shape: tuple[int, int], options: Mapping[str, Any]) -> tuple[int, float] | None:
        """Return the rank and factor of αρG + Q(sO - ρĜ); a limiter on residual or total needs it formed."""
        if parts.limits_growth(options, "residual") or parts.limits_growth(options, "total"):
            return None
        return parts.rank_of(shape, options), options["alpha"] * options["residual_scale"]

    def sharded_step_bytes(
        self, shape: tuple[int, int], split: int, options: Mapping[str, Any], ranks: int
    ) -> float:
        """Return the bytes of Ĝ where Q contracts the split axis; else of Grams and roots (12r²), or of gathering."""
        if split == parts.contracted(parts.keeps_left(shape, options["side"])):
            return parts.projection_traffic(shape, split, options, ranks)
        r = parts.rank_of(shape, options)
        return min(12.0 * r * r, 8.0 * shape[split] * r / ranks) * (ranks - 1) / ranks

    def state_holds_spectrum(self, options: Mapping[str, Any]) -> bool:
        """Return False with a look-ahead that is not stored."""
        return options["nesterov"] is not True


def compose(b: MatrixBatch, gradient: Tensor, factor: Tensor) -> Steps[Tensor | LowRank]:
    """Return α (ρ(G - QĜ) + s·QO), as α (ρG + Q(sO - ρĜ)), which never forms the residual.

    Args:
        b: the batch.
        gradient: Ĝ; overwritten.
        factor: O.
    """
    options = b.options
    s = parts.scale(options["update_scale"], b.shape, b.fans, parts.rank_of(b.shape, options))
    alpha, rho = options["alpha"], options["residual_scale"]
    if not (parts.limits_growth(options, "residual") or parts.limits_growth(options, "total")):
        moved = gradient.mul_(-alpha * rho).add_(factor, alpha=s * alpha)
        return parts.lift(b, moved, keep=alpha * rho)
    # The limiter looks at what only exists as a whole matrix; one batch after the other forms it.
    yield parts.InTurn()
    residual = parts.lift(b, -rho * gradient, keep=rho).dense(b)
    residual = yield from parts.limit_growth(b, "residual", residual)
    total = parts.lift(b, s * factor).dense(b).add_(residual)
    return (yield from parts.limit_growth(b, "total", total)).mul_(alpha)


RULE = Sumo()


@dataclass(frozen=True, kw_only=True)
class SumoOptions(ScaledOrthogonalOptions, LowRankOptions):
    """SUMO's options; the defaults are Algorithm 1 and the text of the paper, with large refreshes spread."""

    refresh_threshold: float | None = option(
        None,
        "ς: a step with ‖Ĝ‖_F ≤ ς takes a new subspace too (decided on the device); null: off",
        minimum=0,
    )
    residual_scale: float = option(
        1.0, "factor on the gradient outside the subspace, G − QQᵀG (0: dropped)", minimum=0
    )
    norm_growth_limit: float | None = option(
        None, "γ: the target's norm grows at most by this factor a step; null: off", minimum=1
    )
    norm_growth_target: Literal["factor", "residual", "total"] = option(
        "factor", "what γ limits: the orthogonal factor O, the residual G − QQᵀG, or the whole update"
    )

    @staticmethod
    def check(values: Mapping[str, Any]) -> None:
        """Refuse a limiter on a residual that is dropped.

        Raises:
            OptionError: naming the option.
        """
        limits_residual = (
            values["norm_growth_limit"] is not None and values["norm_growth_target"] == "residual"
        )
        if limits_residual and values["residual_scale"] == 0:
            raise OptionError("norm_growth_target", "residual", "limits nothing where residual_scale is 0")


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
    ),
    Preset(
        "sumo",
        "sumo",
        SumoOptions().values,
        doc="SUMO with the recommended settings (those of sumo_paper; large models spread their refreshes)",
        source="Refael et al. 2025, arXiv 2505.24749; differences from sumo_paper: docs/optimizers.md",
        rates=(PeakRate(1e6, 4e6, 4e-3, TUNED_TINY, tuned=True, aux_lr=1.6e-2), _MATCHED),
    ),
    Preset(
        "sumo_official",
        "sumo",
        _OFFICIAL.values,
        doc="SUMO as the public code behaves: long side, full SVD, no transport, stored Nesterov, alpha 4",
        source="public code of arXiv 2505.24749 (sumo_optimizer.py), read through a fork",
        rates=(PeakRate(50e6, 1.5e9, 1e-3, "default of SUMO's public code (sumo_optimizer.py)"),),
    ),
    Preset(
        "sumo_ns5",
        "sumo",
        replace(_PAPER, orthogonalizer="newton_schulz").values,
        doc="sumo_paper with five Newton–Schulz steps instead of the exact polar factor",
        source="Refael et al. 2025, arXiv 2505.24749, §4 (SUMO-NS5)",
        rates=(_MATCHED,),
    ),
    Preset(
        "galore_muon",
        "sumo",
        _GALORE_MUON.values,
        doc="Muon in GaLore's subspace: SUMO without exact factor, transport and residual",
        source="the ablation between GaLore (arXiv 2403.03507) and SUMO (arXiv 2505.24749)",
        rates=(_MATCHED,),
    ),
)
