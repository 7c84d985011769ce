"""The KKT attack: find (x, λ) whose Σ λᵢcᵢ∇_θΦ(xᵢ) is θ. It sees weights and declared priors, nothing else.

Haim et al. 2022 (arXiv 2206.07758) minimize ‖θ − Σ λᵢyᵢ∇_θΦ(xᵢ)‖² with gates σ(αh) in the backward pass and
5·Σ relu(λ_min − λ)²; Buzaglo et al. 2023 (arXiv 2307.01827) bring the multiclass and the regression term. Here
residuals are K = ‖θ − u‖²/‖θ‖² without the public code's factor 1/m, and the norm-matched objective is 1 − a
(`geometry`). All grid points with equally many candidates run in one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from analysis.reconstruction import geometry
from analysis.reconstruction.geometry import Geometry
from analysis.reconstruction.network import Network, factors, forward, kkt_coefficients, recomputed, smoothed

BOX_WEIGHT, RADIUS_WEIGHT, LAMBDA_WEIGHT = 1.0, 1.0, 5.0


@dataclass(frozen=True)
class AttackPrior:
    """What the attacker claims to know. Everything here is declared, nothing is read from the training set.

    Attributes:
        kind: "none"; "box": pixels stay in [low, high]; "radius": ‖x‖ stays at the initial radius; "offset":
            candidates start around `center`.
        typical_norm: of an image of this kind, in the network's coordinates.
        low, high, center: (d,), in the network's coordinates.
    """

    kind: str
    typical_norm: float
    low: Tensor
    high: Tensor
    center: Tensor


@dataclass(frozen=True)
class GridPoint:
    """One grid point.

    Attributes:
        alpha: sharpness of the smoothed gates.
        lambda_min: the least λ that is not penalized.
        lambda_init: λ starts uniform in [0, lambda_init].
        radius: initial ‖x‖ over `Prior.typical_norm`.
        candidates: m; their labels are spread evenly over the classes.
        lr: of x and λ at the first step, times max(1, radius) for x.
        seed: of the initial x and λ.
    """

    alpha: float
    lambda_min: float
    lambda_init: float
    radius: float
    candidates: int
    lr: float
    seed: int


@dataclass(frozen=True)
class AttackSettings:
    """What all grid points share.

    Attributes:
        task: one of `network.TASKS`.
        labels: the classes' labels, e.g. (1, -1).
        steps: of the attack.
        method: "adam" with a cosine schedule, or "sgd": momentum 0.9 at a constant rate (as published).
        geometry: of the objective 1 − a; None: the published ℓ2 residual.
        level: candidates are also kept as they were when K first fell to it.
    """

    task: str
    labels: tuple[float, ...]
    steps: int
    method: str
    geometry: Geometry | None
    level: float


@dataclass(frozen=True)
class Candidates:
    """What an attack at one grid point found.

    Attributes:
        point: the grid point.
        x: (m, d). labels: (m,). lambdas: (m,).
        residual: K with the smoothed gates. hard_residual: with the network's own.
        alignment: in the objective's geometry (ℓ2 for the published objective).
        at_level: x when K first fell to the common level, or None.
        level_step: that step, from 1, or None.
        history: K at each of `history_steps`.
    """

    point: GridPoint
    x: Tensor
    labels: Tensor
    lambdas: Tensor
    residual: float
    hard_residual: float
    alignment: float
    at_level: Tensor | None
    level_step: int | None
    history: tuple[float, ...]
    history_steps: tuple[int, ...]


@dataclass(frozen=True)
class InitialValues:
    """Given initial values in place of random ones: x (m, d), labels (m,), λ (m,). For the oracle baseline."""

    x: Tensor
    labels: Tensor
    lambdas: Tensor


def run(
    network: Network,
    prior: AttackPrior,
    points: Sequence[GridPoint],
    settings: AttackSettings,
    start: InitialValues | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Candidates]:
    """Attack at every grid point; results in the order of the points.

    Args:
        network: the weights, float64, detached.
        prior: what the attacker knows.
        points: grid points; those with equal `candidates` share a batch.
        settings: what they share.
        start: initial values for all points.
        progress: called with (step, steps) four times a batch.
    """
    order = sorted(range(len(points)), key=lambda i: points[i].candidates)
    results: dict[int, Candidates] = {}
    for _, batch in groupby(order, key=lambda i: points[i].candidates):
        indices = list(batch)
        candidates = _Batch(network, prior, [points[i] for i in indices], settings, start).run(progress)
        results.update(zip(indices, candidates))
    return [results[i] for i in range(len(points))]


def spread_labels(labels: Sequence[float], candidates: int) -> Tensor:
    """Return (m,): the labels in blocks of equal size, the first ones one longer where m is not a multiple."""
    size, more = divmod(candidates, len(labels))
    counts = [size + (i < more) for i in range(len(labels))]
    return torch.tensor([v for v, n in zip(labels, counts) for _ in range(n)], dtype=torch.float64)


class _Batch:
    """Grid points with equally many candidates, as tensors (B, m, d) and (B, m)."""

    def __init__(
        self,
        network: Network,
        prior: AttackPrior,
        points: Sequence[GridPoint],
        settings: AttackSettings,
        start: InitialValues | None,
    ) -> None:
        self.network, self.prior, self.points, self.settings = network, prior, points, settings
        self.labels = start.labels if start else spread_labels(settings.labels, points[0].candidates)
        self.alpha = _column([p.alpha for p in points]).unsqueeze(-1)
        self.lambda_min = _column([p.lambda_min for p in points])
        self.radii = _column([p.radius * prior.typical_norm for p in points])
        self.scale = network.squared_norm
        self.size = geometry.norm(settings.geometry or Geometry("l2"), network)
        rates = _column([p.lr for p in points])
        self.x_rate = (rates * _column([max(1.0, p.radius) for p in points])).unsqueeze(-1)
        self.lambda_rate = rates
        self.x, self.lambdas = self._initial(start)

    def _initial(self, start: InitialValues | None) -> tuple[Tensor, Tensor]:
        if start is not None:
            rows = len(self.points)
            return start.x.expand(rows, -1, -1).clone(), start.lambdas.expand(rows, -1).clone()
        xs, lambdas = [], []
        for point in self.points:
            generator = torch.Generator().manual_seed(point.seed)
            shape = (point.candidates, self.prior.low.numel())
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            x = x / x.norm(dim=1, keepdim=True) * (point.radius * self.prior.typical_norm)
            xs.append(x + self.prior.center if self.prior.kind == "offset" else x)
            uniform = torch.rand(point.candidates, generator=generator, dtype=torch.float64)
            spread = 2 * uniform - 1 if self.settings.task == "regression" else uniform
            lambdas.append(spread * point.lambda_init)
        return torch.stack(xs), torch.stack(lambdas)

    def run(self, progress: Callable[[int, int], None] | None) -> list[Candidates]:
        """Take all steps of all grid points of the batch."""
        steps = self.settings.steps
        every = max(1, steps // 60)
        history: list[Tensor] = []
        at: list[int] = []
        reached = torch.zeros(len(self.points), dtype=torch.long)
        x_at_level = torch.empty_like(self.x)
        moments = [torch.zeros_like(t) for t in (self.x, self.x, self.lambdas, self.lambdas)]
        self.x.requires_grad_(True)
        self.lambdas.requires_grad_(True)
        for step in range(1, steps + 1):
            loss, residual = self._loss()
            with torch.no_grad():
                fell = (residual <= self.settings.level) & (reached == 0)
                if bool(fell.any()):
                    reached[fell] = step
                    x_at_level[fell] = self.x.detach()[fell]
                if step % every == 1 or every == 1:
                    history.append(residual.detach().clone())
                    at.append(step)
                    if progress and len(at) % 15 == 0:
                        progress(step, steps)
            slopes = torch.autograd.grad(loss.sum(), (self.x, self.lambdas))
            with torch.no_grad():
                self._step(step, slopes, moments)
        return self._found(reached, x_at_level, history, at)

    def _loss(self) -> tuple[Tensor, Tensor]:
        """Return (objective, K) of each grid point, (B,)."""
        passed = forward(self.network, self.x, smoothed(self.alpha))
        c = kkt_coefficients(self.settings.task, passed.outputs, self.labels)
        u = factors(self.network, passed, self.lambdas.unsqueeze(-1) * c)
        residual = geometry.squared_distance(self.network, u, self.scale) / self.scale
        loss = residual
        if self.settings.geometry is not None:
            loss = 1 - geometry.alignment(self.settings.geometry, self.network, u, self.size)
        if self.settings.task != "regression":
            loss = loss + LAMBDA_WEIGHT * (self.lambda_min - self.lambdas).relu().square().sum(-1)
        return loss + self._prior_loss(), residual

    def _prior_loss(self) -> Tensor | float:
        if self.prior.kind == "box":
            outside = (self.x - self.prior.high).relu().square() + (self.prior.low - self.x).relu().square()
            return BOX_WEIGHT * outside.sum((-2, -1))
        if self.prior.kind == "radius":
            return RADIUS_WEIGHT * (self.x.norm(dim=-1) - self.radii).square().sum(-1)
        return 0.0

    def _step(self, step: int, slopes: Sequence[Tensor], moments: list[Tensor]) -> None:
        pairs = zip(
            (self.x, self.lambdas), slopes, (moments[:2], moments[2:]), (self.x_rate, self.lambda_rate)
        )
        for value, slope, (first, second), rate in pairs:
            if self.settings.method == "sgd":
                first.mul_(0.9).add_(slope)
                value.sub_(rate * first)
                continue
            first.lerp_(slope, 0.1)
            second.mul_(0.999).addcmul_(slope, slope, value=0.001)
            decay = 0.5 * (1 + math.cos(math.pi * (step - 1) / self.settings.steps))
            root = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
            value.sub_(rate * (decay / (1 - 0.9**step)) * first / root)

    @torch.no_grad()
    def _found(
        self, reached: Tensor, x_at_level: Tensor, history: list[Tensor], at: list[int]
    ) -> list[Candidates]:
        x, lambdas = self.x.detach(), self.lambdas.detach()
        measured = []
        for gates in (smoothed(self.alpha), recomputed):
            passed = forward(self.network, x, gates)
            c = kkt_coefficients(self.settings.task, passed.outputs, self.labels)
            u = factors(self.network, passed, lambdas.unsqueeze(-1) * c)
            norm_geometry = self.settings.geometry or Geometry("l2")
            residual = geometry.squared_distance(self.network, u, self.scale) / self.scale
            measured.append((residual, geometry.alignment(norm_geometry, self.network, u)))
        (residual, aligned), (hard, _) = measured
        return [
            Candidates(
                point,
                x[i].clone(),
                self.labels.clone(),
                lambdas[i].clone(),
                float(residual[i]),
                float(hard[i]),
                float(aligned[i]),
                x_at_level[i].clone() if reached[i] else None,
                int(reached[i]) or None,
                tuple(float(h[i]) for h in history),
                tuple(at),
            )
            for i, point in enumerate(self.points)
        ]


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(-1)
