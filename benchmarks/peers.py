"""Build the peers that `step_time` measures, from their own packages, with one signature."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any

import torch
from torch import Tensor, nn


def galore_torch(weights: list[nn.Parameter], rank: int, interval: int) -> Any:
    """Build galore-torch's AdamW with projection, without the package's `__init__`, which needs bitsandbytes."""
    if "galore_torch" not in sys.modules:
        spec = find_spec("galore_torch")
        if spec is None:
            raise ModuleNotFoundError("galore-torch is not installed (extra: oracles)")
        sys.modules["galore_torch"] = module_from_spec(spec)
    kind = import_module("galore_torch.adamw").AdamW
    group = {"params": weights, "rank": rank, "update_proj_gap": interval, "scale": 0.25, "proj_type": "std"}
    return kind([group], lr=1e-2, no_deprecation_warning=True)


def keller_muon(weights: list[nn.Parameter]) -> Any:
    """Build the reference package's Muon (muon-optimizer), single device."""
    return import_module("muon").SingleDeviceMuon(weights, lr=1e-3)


def pytorch_optimizer_muon(weights: list[nn.Parameter]) -> Any:
    """Build pytorch_optimizer's Muon."""
    groups = [{"params": weights, "use_muon": True}]
    return import_module("pytorch_optimizer").Muon(groups, lr=1e-3)


def pytorch_optimizer_rule(name: str, weights: list[nn.Parameter], **options: Any) -> Any:
    """Build another optimizer of pytorch_optimizer: NorMuon, AdaMuon, Lion or SOAP."""
    group: dict[str, Any] = {"params": weights}
    if name.endswith("Muon"):
        group["use_muon"] = True
    return getattr(import_module("pytorch_optimizer"), name)([group], lr=1e-3, **options)


def pytorch_optimizer_fira(weights: list[nn.Parameter], rank: int, interval: int) -> Any:
    """Build pytorch_optimizer's Fira, at the scale at which it subtracts Q R from the gradient."""
    group = {
        "params": weights,
        "rank": rank,
        "update_proj_gap": interval,
        "scale": 1.0,
        "projection_type": "std",
    }
    return import_module("pytorch_optimizer").Fira([group], lr=1e-2)


def has_apollo_torch() -> bool:
    """Return True where apollo-torch is installed (pip install --no-deps apollo-torch; not for commercial use)."""
    return find_spec("apollo_torch") is not None


def apollo_torch(weights: list[nn.Parameter], rank: int, interval: int, scale_type: str) -> Any:
    """Build apollo-torch's AdamW, without the package's `__init__`, which needs bitsandbytes."""
    if "apollo_torch" not in sys.modules:
        spec = find_spec("apollo_torch")
        if spec is None:
            raise ModuleNotFoundError("apollo-torch is not installed")
        sys.modules["apollo_torch"] = module_from_spec(spec)
    group = {
        "params": weights,
        "rank": rank,
        "proj": "random",
        "scale_type": scale_type,
        "scale": 1.0,
        "update_proj_gap": interval,
        "proj_type": "std",
    }
    return import_module("apollo_torch.apollo").AdamW([group], lr=1e-2, no_deprecation_warning=True)


class PublicSumoLoop:
    """What the public SUMO code does per step, matrix by matrix: GaLore `std` projection, stored Nesterov
    momentum, `torch.linalg.svd` of the moment, limiter, residual, alpha, and decay after the step. Written
    from a description of its behaviour; no line of it is copied.
    """

    def __init__(self, weights: list[nn.Parameter], rank: int, interval: int, lr: float = 1e-3) -> None:
        self.weights, self.rank, self.interval, self.lr, self.t = weights, rank, interval, lr, 0
        self.bases: dict[int, Tensor] = {}
        self.moments: dict[int, Tensor] = {}
        self.norms: dict[int, float] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Take one step of all matrices."""
        self.t += 1
        for i, weight in enumerate(self.weights):
            gradient = weight.grad
            assert gradient is not None
            tall = gradient.shape[0] >= gradient.shape[1]
            if i not in self.bases or self.t % self.interval == 0:
                u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
                self.bases[i] = vt[: self.rank].clone() if tall else u[:, : self.rank].clone()
            basis = self.bases[i]
            projected = gradient @ basis.mT if tall else basis.mT @ gradient
            moment = self.moments.setdefault(i, torch.zeros_like(projected))
            moment.mul_(0.95).add_(projected)
            moment.copy_(projected + 0.95 * moment)
            u, _, vt = torch.linalg.svd(moment, full_matrices=False)
            factor = u @ vt
            norm = float(factor.norm())
            if norm > 1.1 * self.norms.get(i, norm):
                factor *= 1.1 * self.norms[i] / norm
            self.norms[i] = norm
            inner = projected - 0.2 * max(weight.shape) ** 0.5 * factor
            update = gradient - (inner @ basis if tall else basis @ inner)
            weight.add_(update, alpha=-4.0 * self.lr)
            weight.mul_(1.0 - self.lr * 0.01)
