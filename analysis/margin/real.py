"""Optimizers on torch modules: the classes of `optimizers`, and the reference descents as one more class.

For toy nets they are the truth that the fast rules are held to, and compute what has no fast rule (plug-ins, and
matrix rules where v is trained). The networks of mode `mlp` are trained with them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import optimizers
from analysis.margin.net import Ascent, Nets, ToyProblem
from analysis.margin.optimizer_specs import OptimizerSpec
from harness.errors import InputError
from optimizers.linalg.robust import full_precision

DESCENTS = ("gd", "ngd", "sign", "spectral")


class SteepestDescent(torch.optim.Optimizer):
    """Gradient descent, or steepest descent of unit size in a norm.

    Args:
        params: parameters.
        lr: step size.
        kind: "gd"; "ngd" (unit length over all parameters); "sign" (max norm); "spectral" (the exact polar factor
            of each matrix, and the unit vector of each vector).
    """

    def __init__(self, params: Iterable[Tensor], lr: float, kind: str) -> None:
        if kind not in DESCENTS:
            raise ValueError(f"kind must be one of {', '.join(DESCENTS)}, got {kind!r}")
        self.kind = kind
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step along the steepest descent direction."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [(p, p.grad, g["lr"]) for g in self.param_groups for p in g["params"] if p.grad is not None]
        total = torch.sqrt(sum((grad.square().sum() for _, grad, _ in pairs), torch.zeros(())))
        for parameter, grad, lr in pairs:
            parameter.sub_(lr * self._direction(grad, total))
        return loss

    def _direction(self, grad: Tensor, total: Tensor) -> Tensor:
        if self.kind == "gd":
            return grad
        if self.kind == "ngd":
            return grad / total.clamp_min(torch.finfo(grad.dtype).tiny)
        if self.kind == "sign":
            return grad.sign()
        if grad.ndim == 2:
            with full_precision(grad.device.type):
                return optimizers.polar(grad, "svd").factor
        # A vector is a matrix of one column: its polar factor is the unit vector.
        return grad / torch.linalg.vector_norm(grad).clamp_min(torch.finfo(grad.dtype).tiny)


def build(model: nn.Module, spec: OptimizerSpec) -> torch.optim.Optimizer:
    """Return the optimizer of a module: a reference descent, or a class of `optimizers` routed by module type.

    Raises:
        InputError: the options do not fit the model.
    """
    if spec.preset is None:
        return SteepestDescent([p for p in model.parameters() if p.requires_grad], spec.lr, spec.name)
    options = {key: value for key, value in spec.options.items() if key != "lr"}
    try:
        return optimizers.build(spec.preset, model.named_parameters(), lr=spec.lr, **options)
    except (optimizers.OptionError, TypeError, ValueError) as error:
        raise InputError(f"optimizer {spec.name}", "", f"cannot be built: {error}") from None


class ToyModule(nn.Module):
    """f(x) = Σ v_j relu(hidden_j · (x, 1)).

    The hidden matrix [w | b] is one parameter, so that a matrix rule sees it whole; v is another.
    """

    def __init__(self, hidden: NDArray[np.floating], output: NDArray[np.floating], *, trains: bool) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.tensor(hidden))
        self.output = nn.Parameter(torch.tensor(output), requires_grad=trains)

    def forward(self, augmented: Tensor) -> Tensor:
        """Map (n, d + 1) to (n,)."""
        return torch.relu(augmented @ self.hidden.mT) @ self.output


def objective(outputs: Tensor, y: Tensor, problem: ToyProblem, *, scale_free: bool) -> Tensor:
    """Return the loss; scale-free, a function whose gradient is -Σ p_i y_i ∇f with p = softmax of ln |ℓ'|."""
    z = y * outputs
    if not scale_free:
        each = torch.exp(-z) if problem.loss == "exp" else nn.functional.softplus(-z)
        return each.mean() if problem.reduction == "mean" else each.sum()
    slopes = -z if problem.loss == "exp" else -nn.functional.softplus(z)
    return -(torch.softmax(slopes.detach(), 0) * z).sum()


class TorchStepper:
    """Steps of toy nets with torch optimizers (`steps.Stepper`); each run has a module and an optimizer of its own.

    Raises:
        InputError: spectral descent with a trained v, which is not a matrix.
    """

    def __init__(self, start: Nets, problem: ToyProblem, spec: OptimizerSpec) -> None:
        if spec.kind == "spectral" and problem.train_output:
            reason = "has a rule for the hidden matrix alone, and v is trained"
            raise InputError("optimizer", spec.name, reason, fix="v=fixed")
        self._problem, self._spec = problem, spec
        dtype = torch.float64 if start.hidden.dtype == np.float64 else torch.float32
        self._x = torch.tensor(problem.points.augmented, dtype=dtype)
        self._y = torch.tensor(problem.points.y, dtype=dtype)
        self._modules = [
            ToyModule(start.hidden[..., run], start.output[..., run], trains=problem.train_output)
            for run in range(start.runs)
        ]
        self._optimizers = [build(module, spec) for module in self._modules]
        self._before: list[list[Tensor]] = []

    @property
    def nets(self) -> Nets:
        """Return the weights as arrays."""
        hidden = [module.hidden.detach().numpy() for module in self._modules]
        output = [module.output.detach().numpy() for module in self._modules]
        return Nets(np.stack(hidden, axis=-1), np.stack(output, axis=-1))

    def advance(self, first: int, last: int) -> None:
        """Take steps of every run."""
        for _ in range(first, last):
            self._step([[torch.zeros_like(p, dtype=torch.bool) for p in trained(m)] for m in self._modules])

    def step_and_tell(self, t: int) -> Ascent:
        """Take one step and tell the updates.

        What the step before did not move takes this one from 0, where no rounding hides its update.
        """
        still = [
            [p.detach() == old for p, old in zip(trained(module), last)]
            for module, last in zip(self._modules, self._before)
        ]
        told = self._step(
            still or [[torch.zeros_like(p, dtype=torch.bool) for p in trained(m)] for m in self._modules]
        )
        hidden, *output = (np.stack([run[i].numpy() for run in told], axis=-1) for i in range(len(told[0])))
        return Ascent(hidden, output[0] if output else None)

    def _step(self, from_zero: list[list[Tensor]]) -> list[list[Tensor]]:
        """Take a step of every run, marked weights from 0, and return the updates of each run's parameters."""
        told, self._before = [], []
        decay = 1.0 - self._spec.lr * self._spec.weight_decay
        with full_precision("cpu"):
            for module, optimizer, masks in zip(self._modules, self._optimizers, from_zero):
                optimizer.zero_grad(set_to_none=True)
                outputs = module(self._x)
                objective(outputs, self._y, self._problem, scale_free=self._spec.scale_free).backward()
                parameters = trained(module)
                before = [p.detach().clone() for p in parameters]
                with torch.no_grad():
                    for p, mask in zip(parameters, masks):
                        p[mask] = 0.0
                optimizer.step()
                updates = []
                with torch.no_grad():
                    for p, old, mask in zip(parameters, before, masks):
                        updates.append(torch.where(mask, p, p - old))
                        p[mask] = old[mask] * decay + p[mask]
                self._before.append(before)
                told.append(updates)
        return told

    def keep(self, mask: NDArray[np.bool_]) -> None:
        """Drop the runs that the mask does not mark."""
        self._modules = [module for module, is_kept in zip(self._modules, mask) if is_kept]
        self._optimizers = [optimizer for optimizer, is_kept in zip(self._optimizers, mask) if is_kept]
        self._before = [before for before, is_kept in zip(self._before, mask) if is_kept]


def trained(module: ToyModule) -> list[nn.Parameter]:
    """Return the parameters that are trained: hidden, then v if it is."""
    return [p for p in (module.hidden, module.output) if p.requires_grad]
