"""A small Muon that is right on whole parameters and on DTensors, and defects of others, by their mathematics.

Shared by the controls of `audit` and `watch`: a check that stays green under one of them proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

DEFECTS: Mapping[str, str] = {
    "plain SGD under Muon's name": "the momentum is applied as it is, never orthogonalized",
    "no matrix routed": "every parameter takes AdamW, because none looks like a matrix when the optimizer is built",
    "stale gradient of offload": "each step uses the gradient of the step before, which has arrived on the host",
    "whole QKV orthogonalized": "a fused QKV weight is orthogonalized as one matrix instead of three",
    "padding rows change the scale": "rows that pad shards to equal sizes count in the scale √(rows/columns)",
    "flat parameters routed to AdamW": "parameters that arrive as flat vectors take AdamW",
    "shard-local Newton–Schulz": "each rank orthogonalizes the rows that it holds",
    "clipping after orthogonalization": "the norm of the update is clipped instead of the gradient's",
    "unsynchronized basis, shards": "each rank projects its rows with a random basis of its own",
    "unsynchronized basis, replicas": "each replica projects with a random basis of its own",
    "smooth cut": "directions about the cut are damped by σ²/(σ² + cut²) instead of kept or dropped",
}
"""Defect of the optimizer → its meaning."""

BETAS, EPS = (0.9, 0.95), 1e-10
CUT = 0.5
"""Of singular values relative to the largest, for "smooth cut" and its right counterpart."""
RANK = 8
"""Of the random basis of the "unsynchronized basis" defects and their right counterparts."""
MAX_UPDATE = 1.0


class DefectiveMuon(torch.optim.Optimizer):
    """Muon with an exact polar factor for 2-D parameters, AdamW without decay for the others.

    Args:
        params: parameters, plain or DTensors.
        lr: of both rules; the updates of matrices are scaled by √max(1, rows/columns).
        momentum: μ of M ← μM + G.
        defect: key of `DEFECTS`; None: right.
        when: the defect is active: "always"; only where there is more than one rank, so that one process remains the
            reference; "never", which leaves its right counterpart.

    Raises:
        ValueError: an unknown defect.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        defect: str | None = None,
        when: Literal["always", "distributed", "never"] = "distributed",
    ) -> None:
        if defect is not None and defect not in DEFECTS:
            raise ValueError(f"{defect!r} is no defect; there are {', '.join(DEFECTS)}")
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self._rule, self._when = defect, when

    @property
    def defect(self) -> str | None:
        """Return the defect that is active in this process; None: none."""
        is_distributed = dist.is_initialized() and dist.get_world_size() > 1
        is_active = self._when == "always" or (self._when == "distributed" and is_distributed)
        return self._rule if is_active else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step."""
        changes: list[tuple[Tensor, Tensor, float]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    changes.append((parameter, self._update(parameter, group), group["lr"]))
        factor = 1.0
        if self.defect == "clipping after orthogonalization":
            norm = torch.stack([_whole(update).norm() for _, update, _ in changes]).norm()
            factor = min(1.0, MAX_UPDATE / float(norm))
        for parameter, update, lr in changes:
            parameter.sub_(lr * factor * update)

    def _update(self, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Return the update of a parameter, laid out like it."""
        state = self.state[parameter]
        gradient = parameter.grad
        assert gradient is not None
        if self.defect == "stale gradient of offload":
            gradient, state["arrived"] = state.get("arrived", torch.zeros_like(gradient)), gradient.clone()
        if parameter.ndim < 2 or self.defect == "no matrix routed":
            return self._adam(state, gradient)
        if self.defect == "shard-local Newton–Schulz" and isinstance(gradient, DTensor):
            local = self._muon(state, gradient.to_local(), group["momentum"])
            return DTensor.from_local(
                local,
                gradient.device_mesh,
                gradient.placements,
                shape=gradient.shape,
                stride=gradient.stride(),
            )
        whole = self._muon(state, _whole(gradient), group["momentum"])
        if isinstance(parameter, DTensor):
            # Every rank has computed all of it.
            return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return whole

    def _adam(self, state: dict[str, Any], gradient: Tensor) -> Tensor:
        first, second = BETAS
        state["step"] = state.get("step", 0) + 1
        state["mean"] = first * state.get("mean", torch.zeros_like(gradient)) + (1 - first) * gradient
        square = state.get("square", torch.zeros_like(gradient))
        state["square"] = second * square + (1 - second) * gradient.square()
        mean = state["mean"] / (1 - first ** state["step"])
        return mean / ((state["square"] / (1 - second ** state["step"])).sqrt() + EPS)

    def _muon(self, state: dict[str, Any], gradient: Tensor, momentum: float) -> Tensor:
        if self._rule is not None and self._rule.startswith("unsynchronized basis"):
            basis = self._basis(gradient.shape[1]).to(gradient)
            gradient = gradient @ basis @ basis.T
        state["momentum"] = momentum * state.get("momentum", torch.zeros_like(gradient)) + gradient
        moment = state["momentum"]
        if self.defect == "plain SGD under Muon's name":
            return moment
        rows, columns = moment.shape
        is_fused = rows == 3 * columns and self.defect != "whole QKV orthogonalized"
        return torch.cat([self._factor(part) for part in moment.chunk(3 if is_fused else 1)])

    def _factor(self, moment: Tensor) -> Tensor:
        rows, columns = moment.shape
        if self.defect == "padding rows change the scale":
            shards = dist.get_world_size() if dist.is_initialized() else 2
            rows = -(-rows // shards) * shards
        left, values, right = torch.linalg.svd(moment, full_matrices=False)
        weights = (values > 1e-6 * values.max()).to(values)
        if self._rule == "smooth cut":
            relative = values / values.max()
            weights = (relative > CUT).to(values)
            if self.defect:
                weights = relative**2 / (relative**2 + CUT**2)
        if self._rule is not None and self._rule.startswith("unsynchronized basis"):
            weights = (values > 1e-3 * values.max()).to(values)
        return max(1.0, rows / columns) ** 0.5 * (left * weights) @ right

    def _basis(self, columns: int) -> Tensor:
        """Return an orthonormal basis of random directions, (columns, RANK)."""
        own = dist.get_rank() if self.defect else 0
        generator = torch.Generator().manual_seed(own)
        return torch.linalg.qr(torch.randn(columns, min(RANK, columns), generator=generator))[0]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
