"""Update rules as directions: what a rule would do to a whole matrix, up to its length, from the gradients alone.

A hypothesis is a momentum form, then a function of the matrix (`FACTORS`) or of its elements. The formulas are those of
`optimizers.reference`, for torch tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from optimizers.linalg.newton_schulz import Coefficients, cubic, newton_schulz, polar_express
from optimizers.linalg.polar import polar

# Newton–Schulz with another quintic in each step, as circulated since 2025 (modded-nanogpt; DeepSeek, NVIDIA's
# Emerging-Optimizers "quintic"): (a, b, c) of five steps.
FIVE_STEPS: tuple[Coefficients, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

BF16 = torch.bfloat16
EPS32 = torch.finfo(torch.float32).eps


def _five_steps(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    x = matrix
    for index, row in enumerate(FIVE_STEPS):
        # `newton_schulz` normalizes its argument: only the first step may.
        x = newton_schulz(x, 1, row, dtype) if index == 0 else _quintic(x, row, dtype)
    return x


def _quintic(x: Tensor, row: Coefficients, dtype: torch.dtype) -> Tensor:
    a, b, c = row
    y = (x.mT if x.shape[-2] > x.shape[-1] else x).to(dtype)
    gram = y @ y.mT
    y = a * y + (b * gram + c * gram @ gram) @ y
    return (y.mT if x.shape[-2] > x.shape[-1] else y).to(x.dtype)


@dataclass(frozen=True)
class Factor:
    """A function of a whole matrix that pushes its singular values towards 1.

    Attributes:
        name: as in reports.
        exact: of (…, m, n) in the matrix' precision.
        rounded: the same in bf16, whose distance from `exact` is the rounding that a correct implementation may have;
            None: nobody computes it in bf16.
    """

    name: str
    exact: Callable[[Tensor], Tensor]
    rounded: Callable[[Tensor], Tensor] | None


def factors(steps: int = 5) -> dict[str, Factor]:
    """Return the known orthogonalizers by name; ``steps`` is that of Newton–Schulz."""
    wide = partial(newton_schulz, steps=steps, dtype=torch.float32)
    return {
        "newton_schulz": Factor("newton_schulz", wide, partial(newton_schulz, steps=steps, dtype=BF16)),
        # Moments are fp32 at best: directions below its rounding are noise, whatever the precision here.
        "svd": Factor("svd", lambda m: polar(m, "svd", max(m.shape[-2:]) * EPS32).factor, None),
        "polar_express": Factor(
            "polar_express", partial(polar_express, dtype=torch.float32), partial(polar_express, dtype=BF16)
        ),
        "newton_schulz_5c": Factor(
            "newton_schulz_5c",
            partial(_five_steps, dtype=torch.float32),
            partial(_five_steps, dtype=BF16),
        ),
        "cubic": Factor("cubic", partial(cubic, dtype=torch.float32), None),
    }


@dataclass(frozen=True)
class Momentum:
    """How gradients become what is orthogonalized or applied.

    Attributes:
        mu: decay; 0: the gradient itself.
        nesterov: look ahead once more along the moment.
        ema: M ← μM + (1 - μ)G, otherwise M ← μM + G. From a zero state both give one direction.
        coupled: weight decay that is added to the gradient (L2), times the weight; 0: none.
    """

    mu: float
    nesterov: bool
    ema: bool = False
    coupled: float = 0.0

    def __call__(
        self, gradients: Sequence[Tensor], weights: Sequence[Tensor], start: Tensor | None
    ) -> list[Tensor]:
        """Return the direction of each update before any function of the matrix."""
        weight = 1.0 - self.mu if self.ema else 1.0
        moment = torch.zeros_like(gradients[0]) if start is None else start.to(gradients[0].dtype)
        directions = []
        for gradient, at in zip(gradients, weights):
            g = gradient + self.coupled * at if self.coupled else gradient
            moment = self.mu * moment + weight * g
            directions.append(weight * g + self.mu * moment if self.nesterov else moment)
        return directions

    def describe(self) -> str:
        """Return the form in words."""
        if self.mu == 0.0:
            return "no momentum"
        return f"momentum {self.mu:g}" + (", nesterov" if self.nesterov else "")


@dataclass(frozen=True)
class Adam:
    """AdamW's direction (arXiv 1711.05101), or Adam's with L2 decay in the gradient.

    Attributes:
        betas, eps: of the group.
        coupled: weight decay that is added to the gradient.
        raw_eps: add ε to √V before the bias correction, as galore-torch and Hugging Face's AdamW do.
    """

    betas: tuple[float, float]
    eps: float
    coupled: float = 0.0
    raw_eps: bool = False

    def __call__(
        self, gradients: Sequence[Tensor], weights: Sequence[Tensor], state: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """Return M̂/(√V̂ + ε) of each update."""
        beta1, beta2 = self.betas
        first = _state(state, ("exp_avg", "moment"), gradients[0])
        second = _state(state, ("exp_avg_sq", "second_moment"), gradients[0])
        t = int(state["step"]) if "step" in state else 0
        directions = []
        for gradient, at in zip(gradients, weights):
            g = gradient + self.coupled * at if self.coupled else gradient
            t += 1
            first = beta1 * first + (1 - beta1) * g
            second = beta2 * second + (1 - beta2) * g * g
            bias = (1 - beta2**t) ** 0.5
            eps = self.eps / bias if self.raw_eps else self.eps
            directions.append((first / (1 - beta1**t)) / (second.sqrt() / bias + eps))
        return directions


def _state(state: Mapping[str, Tensor], keys: tuple[str, ...], like: Tensor) -> Tensor:
    for key in keys:
        if key in state and state[key].shape == like.shape:
            return state[key].to(like.dtype)
    return torch.zeros_like(like)


def lion(
    betas: tuple[float, float], gradients: Sequence[Tensor], state: Mapping[str, Tensor]
) -> list[Tensor]:
    """Return Lion's sign directions (arXiv 2302.06675)."""
    moment = _state(state, ("exp_avg",), gradients[0])
    directions = []
    for g in gradients:
        directions.append((betas[0] * moment + (1 - betas[0]) * g).sign())
        moment = betas[1] * moment + (1 - betas[1]) * g
    return directions
