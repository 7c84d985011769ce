"""Muon with known defects, re-created from their mathematics: each must turn `watch` red under its own name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def quintic(matrix: Tensor) -> Tensor:
    """Return five of Jordan's Newton–Schulz steps in fp32."""
    x = matrix / matrix.norm()
    x = x.mT if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def smooth(matrix: Tensor, cut: float = 0.1) -> Tensor:
    """Return a polar factor whose directions about the cut are damped by σ²/(σ² + cut²)."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((u * (s**2 / (s**2 + (cut * s[0]) ** 2))) @ vt).to(matrix)


def spectral(rows: int, columns: int) -> float:
    return max(1.0, rows / columns) ** 0.5


class Muon(torch.optim.Optimizer):
    """Jordan's Muon on matrices and AdamW on the rest, with one defect or none.

    Args:
        params: groups with `use_muon`.
        defect: key of `DEFECTS`, or None.
    """

    def __init__(self, params: Sequence[dict[str, Any]], defect: str | None = None, **options: Any) -> None:
        self.defect = defect
        defaults = {"lr": 0.02, "momentum": 0.95, "nesterov": True, "weight_decay": 0.0}
        super().__init__(
            params, {**defaults, "betas": (0.9, 0.95), "eps": 1e-8, "adjust_lr_fn": None, **options}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        updates: list[tuple[Tensor, Tensor, float]] = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                is_matrix = group["use_muon"] and self.defect != "no matrix routed"
                update = self.matrix(p, group) if is_matrix else self.adamw(p, group)
                updates.append((p, update, group["lr"]))
        shrink = 1.0
        if self.defect == "clipping after orthogonalization":
            total = torch.stack([u.norm() for _, u, _ in updates]).norm()
            shrink = min(1.0, 1.0 / float(total))
        for p, update, lr in updates:
            p.add_(update, alpha=-lr * shrink)

    def matrix(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the update of a matrix, weight decay included."""
        state = self.state[p]
        assert p.grad is not None
        moment = state.setdefault("momentum_buffer", torch.zeros_like(p))
        gradient = p.grad
        if self.defect == "stale gradient of offload":
            gradient, state["last"] = state.get("last", torch.zeros_like(p)), p.grad.clone()
        decay = group["weight_decay"] * p
        if self.defect == "weight decay in the gradient":
            gradient, decay = gradient + decay, torch.zeros_like(p)
        if self.defect == "another weight decay":
            decay = 3 * decay
        moment.lerp_(gradient, 1 - group["momentum"])
        nesterov = self.defect != "another momentum"
        moved = gradient.lerp(moment, group["momentum"]) if nesterov else moment
        if self.defect == "another learning rate":
            state["count"] = state.get("count", 0) + 1
            decay = decay + (state["count"] - 1) * 0.5 * self.factor(p, moved)
        return self.factor(p, moved) + decay

    def factor(self, p: Tensor, moved: Tensor) -> Tensor:
        """Return the orthogonalized direction with its scale."""
        rows, columns = p.shape
        if not bool(moved.any()):
            return torch.zeros_like(moved)
        if self.defect in ("plain SGD under Muon's name", "offload without orthogonalization"):
            return moved
        if self.defect == "shard-local Newton–Schulz":
            halves = moved.chunk(2)
            return torch.cat([quintic(half) for half in halves]) * spectral(rows, columns)
        if self.defect == "padding rows change the scale":
            return quintic(moved) * spectral(-(-rows // 32) * 32, columns)
        if self.defect == "another scale":
            return quintic(moved) * 0.2 * max(rows, columns) ** 0.5
        if self.defect == "fused projections differ" and rows == 3 * columns and getattr(p, "splits", False):
            parts = [quintic(part) * spectral(columns, columns) for part in moved.chunk(3)]
            return torch.cat(parts)
        if self.defect == "smooth cut":
            return smooth(moved) * spectral(rows, columns)
        if self.defect == "unexplained update":
            return torch.linalg.qr(moved if rows >= columns else moved.mT)[0].reshape(moved.shape)
        return quintic(moved) * spectral(rows, columns)

    def adamw(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the update of anything else, weight decay included."""
        state, (beta1, beta2) = self.state[p], group["betas"]
        assert p.grad is not None
        first = state.setdefault("exp_avg", torch.zeros_like(p))
        second = state.setdefault("exp_avg_sq", torch.zeros_like(p))
        state["step"] = state.get("step", 0) + 1
        first.lerp_(p.grad, 1 - beta1)
        second.lerp_(p.grad.square(), 1 - beta2)
        root = (second / (1 - beta2 ** state["step"])).sqrt() + group["eps"]
        return first / (1 - beta1 ** state["step"]) / root + group["weight_decay"] * p


Groups = Callable[[nn.Module], list[dict[str, Any]]]
