"""Optimizers of the tests: one of each class, and some that misbehave. Imported by rank processes, too."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Rule(torch.optim.Optimizer):
    """Descend by `change` of each gradient."""

    def __init__(self, params: Iterable[Any], lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    def change(self, gradient: Tensor) -> Tensor:
        return gradient

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * self.change(p.grad))


class Elementwise(Rule):
    def change(self, gradient: Tensor) -> Tensor:
        return gradient / (gradient.abs() + 1e-8)


class Sign(Rule):
    """The sign of the gradient, which no rounding changes."""

    def change(self, gradient: Tensor) -> Tensor:
        return gradient.sign()


class Rowwise(Rule):
    def change(self, gradient: Tensor) -> Tensor:
        return gradient / (gradient.norm(dim=-1, keepdim=True) + 1e-8)


class Columnwise(Rule):
    def change(self, gradient: Tensor) -> Tensor:
        return gradient / (gradient.norm(dim=0, keepdim=True) + 1e-8)


class Matrix(Rule):
    def change(self, gradient: Tensor) -> Tensor:
        return gradient / (gradient.norm() + 1e-8)


class Global(Rule):
    """Normalize by the norm of all gradients, as an optimizer that clips by itself does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            p.sub_(self.param_groups[0]["lr"] * p.grad / norm)


class Ordered(Rule):
    """Give later parameters smaller steps."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for number, p in enumerate(p for group in self.param_groups for p in group["params"]):
            p.sub_(0.01 / (1 + number) * p.grad)


class Drawing(Rule):
    def change(self, gradient: Tensor) -> Tensor:
        return gradient + 0.01 * torch.randn_like(gradient)


class Unrepeatable(Rule):
    def change(self, gradient: Tensor) -> Tensor:
        return gradient * (1 + 0.1 * (os.urandom(1)[0] / 256))


class Late(Rule):
    """Element-wise at first, then normalized by its matrix."""

    steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(0.01 * (p.grad if self.steps <= 10 else p.grad / p.grad.norm()))


class Nothing(Rule):
    """Move nothing, ever."""

    def step(self, closure: Any = None) -> Any:
        return None


class Waiting(Rule):
    """Move no weight before the ninth step."""

    steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(0.01 * p.grad * (self.steps > 8))


class RankDependent(Rule):
    """Draw from a generator of its own, seeded by the rank."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        rank = dist.get_rank() if dist.is_initialized() else 0
        generator = torch.Generator().manual_seed(rank)
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad * torch.rand(p.shape, generator=generator))


class Momentum(Rule):
    """A sum of gradients with momentum 0.9."""

    def factor(self) -> float:
        """Return the factor on the learning rate."""
        return 1.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    moment = self.state[p].setdefault("moment", torch.zeros_like(p)).mul_(0.9).add_(p.grad)
                    p.sub_(self.factor() * group["lr"] * moment)


class Halved(Momentum):
    """Half the updates where there are several processes."""

    def factor(self) -> float:
        return 0.5 if dist.is_initialized() and dist.get_world_size() > 1 else 1.0


class Counting(Rule):
    """Keep a counter in the state that belongs to no parameter, as MADGRAD and SPAM do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        state: Any = self.state
        state["count"] = state.get("count", 0) + 1
        super().step()


class Refusing(Rule):
    """Refuse flat slices."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if max(p.numel() for group in self.param_groups for p in group["params"] if p.ndim == 1) > 100:
            raise ValueError("flat slices are not supported")
        super().step()


class Hanging(Rule):
    """Never return on more than one process."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if dist.is_initialized() and dist.get_world_size() > 1:
            time.sleep(1000)
        super().step()


class Dying(Rule):
    """End the second process."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if dist.is_initialized() and dist.get_rank() == 1:
            os._exit(9)
        super().step()


class Printing(Rule):
    """Print on standard output."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        print("not JSON")
        os.system("echo not JSON either")
        super().step()
