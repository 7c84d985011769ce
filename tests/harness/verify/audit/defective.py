"""A correct small optimizer, and one with a single defect for each check."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class Momentum(Optimizer):
    """Normalized momentum with decoupled decay, one parameter at a time, without a host read."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.8,
        weight_decay: float = 0.0,
        **more: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, **more})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.is_sparse:
                        raise RuntimeError("Momentum does not take sparse gradients")
                    self.update(p, p.grad, group)
        return loss

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        """Step one parameter."""
        state = self.state[p]
        if not state:
            state["moment"] = torch.zeros_like(p)
        moment = state["moment"].mul_(group["momentum"]).add_(gradient)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * self.direction(moment))

    def direction(self, moment: Tensor) -> Tensor:
        """Return the update before the rate."""
        return moment / (moment.norm() + 1e-8)


class Grows(Momentum):
    """Keeps every gradient."""

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        super().update(p, gradient, group)
        self.state[p].setdefault("history", []).append(gradient.clone())


class Overclaims(Momentum):
    """Reports half of its state."""

    def state_bytes(self) -> dict[str, int]:
        """Return kind → bytes."""
        return {"moment": sum(state["moment"].nbytes for state in self.state.values()) // 2}


class Forgets(Momentum):
    """Keeps its moments in an attribute, which `state_dict` does not hold."""

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, **options)
        self.moments: dict[nn.Parameter, Tensor] = {}

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        moment = self.moments.setdefault(p, torch.zeros_like(p)).mul_(group["momentum"]).add_(gradient)
        p.sub_(group["lr"] * self.direction(moment))


class Scale:
    """An object that pickle restores only by running code."""

    def __init__(self, value: float) -> None:
        self.value = value


class Pickles(Momentum):
    """Has an object of its own class in its state."""

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        super().update(p, gradient, group)
        self.state[p]["scale"] = Scale(1.0)


class CopiesRate(Momentum):
    """Reads the constructor's rate."""

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        super().update(p, gradient, {**group, "lr": self.defaults["lr"]})


class ReadsLastGroup(Momentum):
    """Takes the rate of the last group for all."""

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        super().update(p, gradient, {**group, "lr": self.param_groups[-1]["lr"]})


class NeedsFloat(Momentum):
    """Takes the exponent of the rate on the host, by a function of floats."""

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        if not isinstance(group["lr"], float):
            raise TypeError("lr must be a float")
        super().update(p, gradient, group)


class WritesRate(Momentum):
    """Scales a tensor rate in place."""

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        super().update(p, gradient, group)
        if torch.is_tensor(group["lr"]):
            group["lr"].mul_(1.0 - 1e-9)


class IgnoresDecay(Momentum):
    """Has a weight_decay that does nothing."""

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        super().update(p, gradient, {**group, "weight_decay": 0.0})


class Inflates(Momentum):
    """Adds the decay."""

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        super().update(p, gradient, {**group, "weight_decay": -group["weight_decay"]})


class CoupledUnderFlag(Momentum):
    """Says that its decay is decoupled, and adds it to the gradient."""

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, weight_decouple=True, **options)

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        super().update(p, gradient + group["weight_decay"] * p, {**group, "weight_decay": 0.0})


class DecaysAfter(Momentum):
    """Correct: decays after the update."""

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        super().update(p, gradient, {**group, "weight_decay": 0.0})
        p.mul_(1 - group["lr"] * group["weight_decay"])


class DecaysWithoutRate(Momentum):
    """Correct: decays by a part of the weights that the rate does not change."""

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        super().update(p, gradient, {**group, "weight_decay": group["weight_decay"] / group["lr"]})


class TrustRatio(Momentum):
    """Correct: scales decoupled updates by the norm of the weights."""

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, weight_decouple=True, **options)

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        super().update(p, gradient, {**group, "lr": group["lr"] * p.norm()})


class DecaysFrozen(Momentum):
    """Decays parameters that have no gradient."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
        return super().step(closure)


class SkipsLate(Momentum):
    """Knows the parameters of the first step only."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if not hasattr(self, "known"):
            self.known = {p for group in self.param_groups for p in group["params"] if p.grad is not None}
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.known:
                    p.grad = None
        return super().step(closure)


class DividesByZero(Momentum):
    """Has no eps."""

    def direction(self, moment: Tensor) -> Tensor:
        return moment / moment.norm()


class SpreadsNan(Momentum):
    """Clips by a norm over all parameters."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 100.0)
        return super().step(closure)


class DropsSparse(Momentum):
    """Passes over sparse gradients."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.is_sparse:
                    p.grad = None
        return super().step(closure)


class CountsAlways(Momentum):
    """Warms up by a counter that advances in every call."""

    calls = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.calls += 1
        return super().step(closure)

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        super().update(p, gradient, {**group, "lr": group["lr"] * min(1.0, self.calls / 10)})


class OverwritesGradient(Momentum):
    """Adds the decay into the gradient in place."""

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        super().update(p, gradient.add_(p, alpha=group["weight_decay"]), {**group, "weight_decay": 0.0})


class LosesLoss(Momentum):
    """Returns nothing."""

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        super().step(closure)


class NoGradClosure(Momentum):
    """Calls the closure without gradients."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        super().step()
        return loss


class Prints(Momentum):
    """Prints its rate."""

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        print("lr is", group["lr"])
        super().update(p, gradient, group)


class NeedsRows(Momentum):
    """Indexes the second axis of every parameter."""

    def direction(self, moment: Tensor) -> Tensor:
        return moment / (moment.square().sum(1, keepdim=True).sqrt() + 1e-8)


class BreaksOnEmpty(Momentum):
    """Takes a maximum, which nothing has."""

    def direction(self, moment: Tensor) -> Tensor:
        return moment / (moment.abs().max() + 1e-8)


class Unpacks(Momentum):
    """Takes the shape apart as that of a matrix."""

    def direction(self, moment: Tensor) -> Tensor:
        if moment.ndim >= 2:
            rows, columns = moment.shape
            return moment / (moment.norm() + 1e-8) * math.sqrt(rows / columns)
        return super().direction(moment)


class ReadsMemoryOrder(Momentum):
    """Takes the direction of the elements as they lie in memory."""

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        flat = p.data.as_strided((p.numel(),), (1,))
        flat.sub_(group["lr"] * gradient.contiguous().view(-1) / (gradient.norm() + 1e-8))


class SilentTwice(Momentum):
    """Takes a parameter as often as it is named, without torch's warning."""

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().__init__(params, **options)


class DependsOnPlace(Momentum):
    """Steps later parameters less."""

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        place = next(i for i, other in enumerate(group["params"]) if other is p)
        super().update(p, gradient, {**group, "lr": group["lr"] / (1 + place)})


class Vanishes(Momentum):
    """Takes steps that bf16 weights cannot hold."""

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, lr=1e-6, **options)


class Draws(Momentum):
    """Draws from a generator that no seed reaches."""

    def direction(self, moment: Tensor) -> Tensor:
        noise = torch.rand(moment.shape, generator=_UNSEEDED)
        return super().direction(moment) * (1 + 0.1 * noise)


_UNSEEDED = torch.Generator()


class ForeachDiffers(Momentum):
    """Leaves the momentum out in its foreach branch."""

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, foreach=None, **options)

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        super().update(p, gradient, {**group, "momentum": 0.0} if group["foreach"] else group)


class FusedDiffers(ForeachDiffers):
    """Leaves the momentum out in its fused branch."""

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        Momentum.__init__(self, params, fused=None, **options)

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        Momentum.update(self, p, gradient, {**group, "momentum": 0.0} if group["fused"] else group)


class ReadsHost(Momentum):
    """Decides by a norm on the host."""

    def direction(self, moment: Tensor) -> Tensor:
        return moment / float(moment.norm()) if moment.norm() > 0 else moment


class DiffersCompiled(Momentum):
    """Takes another branch under the compiler."""

    def direction(self, moment: Tensor) -> Tensor:
        return super().direction(moment) * (0.5 if torch.compiler.is_compiling() else 1.0)


def of_model(model: nn.Module) -> Momentum:
    """Return the correct optimizer over the parameters of a model."""
    return Momentum(model.parameters())


class TakesShards(Momentum):
    """Divides by the norm of this rank's shard."""

    def update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        p.sub_(group["lr"] * gradient / float(local.norm() + 1e-8))


class Endless(Momentum):
    def step(self, closure: Any = None) -> Any:
        while True:
            pass
