"""The optimizers by the names that people import."""

from __future__ import annotations

from optimizers.optimizer import Optimizer


class SUMO(Optimizer):
    """SUMO (Refael et al. 2025, arXiv 2505.24749); preset "sumo" unless another of its presets is named."""

    default_preset = "sumo"


class GaLore(Optimizer):
    """GaLore (Zhao et al. 2024, arXiv 2403.03507)."""

    default_preset = "galore"


class Muon(Optimizer):
    """Muon (Jordan et al. 2024); preset "muon" unless another of its presets is named."""

    default_preset = "muon"


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    default_preset = "adamw"


CLASSES: dict[str, type[Optimizer]] = {"sumo": SUMO, "galore": GaLore, "muon": Muon, "adamw": AdamW}
