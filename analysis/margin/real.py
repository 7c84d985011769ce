"""The optimizer classes of `optimizers` on a toy net: the reference of the fast rules, and what computes the rest.

The hidden matrix [w | b] is one fp64 parameter, so that a matrix rule sees it whole; v is another. Runs are
independent: each has a module and an optimizer of its own.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import optimizers
from analysis.margin.chosen import Chosen
from analysis.margin.net import Nets, Problem
from harness.config.errors import InputError
from optimizers.linalg.precision import full_precision


class Toy(nn.Module):
    """f(x) = Σ v_j relu(hidden_j · (x, 1))."""

    def __init__(self, hidden: NDArray[np.floating], output: NDArray[np.floating], *, trains: bool) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.tensor(hidden))
        self.output = nn.Parameter(torch.tensor(output), requires_grad=trains)

    def forward(self, augmented: Tensor) -> Tensor:
        """(n, d + 1) → (n,)."""
        return torch.relu(augmented @ self.hidden.mT) @ self.output


def objective(outputs: Tensor, y: Tensor, problem: Problem, *, scale_free: bool) -> Tensor:
    """The loss; or, scale-free, a function whose gradient is Σ p_i y_i ∇f with p = softmax of ln |ℓ'|."""
    z = y * outputs
    if not scale_free:
        each = torch.exp(-z) if problem.loss == "exp" else nn.functional.softplus(-z)
        return each.mean() if problem.reduction == "mean" else each.sum()
    slopes = -z if problem.loss == "exp" else -nn.functional.softplus(z)
    return -(torch.softmax(slopes.detach(), 0) * z).sum()


class Real:
    """Steps with the real classes (`steps.Stepper`)."""

    def __init__(self, start: Nets, problem: Problem, optimizer: Chosen) -> None:
        self._problem, self._optimizer = problem, optimizer
        dtype = torch.float64 if start.hidden.dtype == np.float64 else torch.float32
        self._x = torch.tensor(problem.points.augmented, dtype=dtype)
        self._y = torch.tensor(problem.points.y, dtype=dtype)
        self._models = [
            Toy(start.hidden[..., run], start.output[..., run], trains=problem.train_output)
            for run in range(start.runs)
        ]
        self._steppers = [build(model, optimizer) for model in self._models]

    @property
    def nets(self) -> Nets:
        """The weights as arrays."""
        hidden = [model.hidden.detach().numpy() for model in self._models]
        output = [model.output.detach().numpy() for model in self._models]
        return Nets(np.stack(hidden, axis=-1), np.stack(output, axis=-1))

    def advance(self, first: int, last: int) -> None:
        """Steps of every run."""
        scale_free = self._optimizer.scale_free
        with full_precision("cpu"):
            for model, stepper in zip(self._models, self._steppers):
                for _ in range(first, last):
                    stepper.zero_grad(set_to_none=True)
                    objective(model(self._x), self._y, self._problem, scale_free=scale_free).backward()
                    stepper.step()

    def keep(self, mask: NDArray[np.bool_]) -> None:
        """Drop runs."""
        self._models = [model for model, is_kept in zip(self._models, mask) if is_kept]
        self._steppers = [stepper for stepper, is_kept in zip(self._steppers, mask) if is_kept]


def build(model: nn.Module, optimizer: Chosen) -> torch.optim.Optimizer:
    """The optimizer over a model; every 2-D parameter takes the matrix rule.

    Raises:
        InputError: the reference has no torch class, or the options don't fit the model.
    """
    if optimizer.kind == "gd":
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=optimizer.lr)
    if optimizer.preset is None:
        reason = "has a rule for the hidden matrix alone, and v is trained"
        raise InputError("optimizer", optimizer.name, reason, fix="v=fixed")
    options = {key: value for key, value in optimizer.options.items() if key != "lr"}
    try:
        return optimizers.build(optimizer.preset, model.named_parameters(), lr=optimizer.lr, **options)
    except (optimizers.OptionError, TypeError, ValueError) as error:
        raise InputError(f"optimizer {optimizer.name}", "", f"cannot be built: {error}") from None
