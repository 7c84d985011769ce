"""Muon: the orthogonalized momentum of the whole matrix (Jordan et al. 2024; Moonlight, arXiv 2502.16982).

M ← μM + (1 - μ)G  or  μM + G      U = look-ahead of M      W ← W - η α s·orth(U)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from optimizers.rule import Rule
from optimizers.rule_options import CONDA_BASELINE, TUNED_TINY, PeakRate, Preset, ScaledOrthogonalOptions
from optimizers.rules import parts

if TYPE_CHECKING:
    from optimizers.interfaces import MatrixBatch, Update


class Muon(Rule):
    """Muon; the orthogonalizer decides between Newton-Schulz, Polar Express and the exact factor."""

    needs_whole: ClassVar[bool] = True

    def update(self, b: MatrixBatch) -> Update:
        """Take one step; see the module's formula."""
        u = parts.momentum(b, b.gradient, overwrites=True)
        o = parts.orthogonalize(u, b.options)
        size = b.options["alpha"] * parts.scale(b.options["update_scale"], b.shape, b.fans, min(b.shape))
        delta = o.factor if size == 1.0 else o.factor * size
        return parts.Update(delta, u, o.factor, o.singular_values, o.fallbacks)

    def state(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shape of the moment: mn numbers."""
        return {"moment": shape}

    def state_holds_spectrum(self, options: Mapping[str, Any]) -> bool:
        """Return False with a look-ahead that is not stored."""
        return options["nesterov"] is not True


RULE = Muon()


@dataclass(frozen=True, kw_only=True)
class MuonOptions(ScaledOrthogonalOptions):
    """Muon takes nothing but what all orthogonalizing rules take."""


_JORDAN = MuonOptions(
    lr=0.02,
    momentum_form="ema",
    nesterov=True,
    orthogonalizer="newton_schulz",
    orthogonalizer_dtype="auto",
    update_scale="rows_cols",
    aux_lr=3e-4,
    aux_eps=1e-10,
)
_MOONLIGHT = replace(
    _JORDAN,
    lr=1e-3,
    weight_decay=0.1,
    momentum_form="sum",
    update_scale="rms_max",
    aux_lr=None,
    aux_eps=1e-8,
    aux_weight_decay=0.1,
)
_RATE = "Jordan et al. 2024 (kellerjordan.github.io/posts/muon), used at 124M"

PRESETS = (
    Preset(
        "muon",
        "muon",
        _JORDAN.values,
        doc="Muon: five Newton–Schulz steps on the Nesterov momentum of the whole matrix",
        source="Jordan et al. 2024, kellerjordan.github.io/posts/muon",
        rates=(
            PeakRate(1e6, 4e6, 2e-2, TUNED_TINY, tuned=True, aux_lr=1.6e-2),
            PeakRate(100e6, 150e6, 2e-2, _RATE, tuned=True),
        ),
    ),
    Preset(
        "muon_moonlight",
        "muon",
        _MOONLIGHT.values,
        doc="Muon with the update scaled to AdamW's size, so that both share one learning rate",
        source="Liu et al. 2025, arXiv 2502.16982 (Moonlight)",
        rates=(PeakRate(50e6, 1.5e9, 1e-3, CONDA_BASELINE),),
    ),
    Preset(
        "muon_svd",
        "muon",
        replace(_JORDAN, orthogonalizer="auto").values,
        doc="Muon with the exact polar factor",
        source="Jordan et al. 2024 with an exact factor",
        rates=(PeakRate(100e6, 150e6, 2e-2, f"as muon: {_RATE}"),),
    ),
    Preset(
        "muon_polar_express",
        "muon",
        replace(_JORDAN, orthogonalizer="polar_express").values,
        doc="Muon with the Polar Express iteration",
        source="Amsel et al. 2025, arXiv 2505.16932 (Polar Express)",
        rates=(PeakRate(100e6, 150e6, 2e-2, f"as muon: {_RATE}"),),
    ),
)
