"""The KKT attack: find (x, λ) whose Σ λᵢcᵢ∇_θΦ(xᵢ) is θ. It sees weights and declared priors, nothing else.

Haim et al. 2022 (arXiv 2206.07758) minimize ‖θ − (1/m) Σ λᵢyᵢ∇_θΦ(xᵢ)‖² with gates σ(αh) in the backward pass and
5·Σ relu(λ_min − λ)²; Buzaglo et al. 2023 (arXiv 2307.01827) bring the multiclass term. Here λ includes the factor
1/m, residuals are K = ‖θ − u‖²/‖θ‖², and the norm-matched objective is 1 − a (`geometry`). Problems with equally many
candidates run in one batch, whichever networks they attack. All tensors are float64.
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
from analysis.reconstruction.network import (
    Network,
    factors,
    forward,
    kkt_coefficients,
    recomputed,
    smoothed,
    stacked,
)

BOX_WEIGHT, LAMBDA_WEIGHT = 1.0, 5.0
BATCH = 16
"""Most problems of a batch: beyond it a core gains nothing."""
BATCH_NUMBERS = 2**24
"""Most parameters and activations of the networks of a batch together."""


@dataclass(frozen=True)
class AttackPrior:
    """What the attacker claims to know. Everything here is declared, nothing is read from the training set.

    Attributes:
        kind: "none"; "box": pixels stay in [low, high]; "offset": candidates start around `center`; "pca": candidates
            stay in `center` + span of `basis`.
        typical_norm: of an image of this kind, in the network's coordinates; "offset": of its distance from `center`.
        low, high, center: (d,), in the network's coordinates.
        basis: (k, d) orthonormal rows, or None.
    """

    kind: str
    typical_norm: float
    low: Tensor
    high: Tensor
    center: Tensor
    basis: Tensor | None = None


@dataclass(frozen=True)
class GridPoint:
    """One grid point.

    Attributes:
        alpha: sharpness of the smoothed gates.
        lambda_min: the least λ that is not penalized.
        lambda_init: λ starts uniform in [0, lambda_init].
        radius: initial ‖x‖ over `AttackPrior.typical_norm`.
        candidates: m; their labels are spread evenly over the classes.
        lr: of x and λ at the first step, times max(1, radius) for x.
        seed: of the initial x and λ.
        weights: "margin" or "raw", the scale of the network that is attacked.
        offset: of pixels, that the attacker believes in; `AttackPrior` is made for it.
    """

    alpha: float
    lambda_min: float
    lambda_init: float
    radius: float
    candidates: int
    lr: float
    seed: int
    weights: str = "margin"
    offset: float = 0.0


@dataclass(frozen=True)
class AttackSettings:
    """What all problems share.

    Attributes:
        task: one of `network.TASKS`.
        labels: the classes' labels, e.g. (1, -1).
        steps: of the attack.
        balance: "relative": K + 5·Σ relu(λ_min − λ)²; "public": ‖θ − u‖² + 5·Σ relu(m(λ_min − λ))², as in the public
            code, whose λ is m times ours.
        geometry: of the objective 1 − a; None: the published ℓ2 residual.
        level: candidates are also kept as they were when K first fell to it.
    """

    task: str
    labels: tuple[float, ...]
    steps: int
    balance: str
    geometry: Geometry | None
    level: float


@dataclass(frozen=True)
class InitialValues:
    """Where an attack starts in place of random candidates: x (m, d), labels (m,), lambdas (m,)."""

    x: Tensor
    labels: Tensor
    lambdas: Tensor


@dataclass(frozen=True)
class AttackProblem:
    """A network under attack, what the attacker claims to know, the grid point, and declared starts if any."""

    network: Network
    prior: AttackPrior
    point: GridPoint
    start: InitialValues | None = None


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


def run(
    problems: Sequence[AttackProblem],
    settings: AttackSettings,
    progress: Callable[[int, int], None] | None = None,
) -> list[Candidates]:
    """Attack the network of each problem; results are in the problems' order.

    Args:
        problems: networks of one architecture; none or all of them with starts of the same labels.
        progress: takes (step, steps) of a batch now and then.
    """
    results: dict[int, Candidates] = {}
    order = sorted(range(len(problems)), key=lambda i: problems[i].point.candidates)
    for _, group in groupby(order, key=lambda i: problems[i].point.candidates):
        indices = list(group)
        size = _batch_size(problems[indices[0]])
        for first in range(0, len(indices), size):
            chunk = indices[first : first + size]
            found = _Batch([problems[i] for i in chunk], settings).run(progress)
            results.update(zip(chunk, found, strict=True))
    return [results[i] for i in range(len(problems))]


def _batch_size(problem: AttackProblem) -> int:
    """Return how many problems of this size run together; it depends on the sizes alone, so that a rerun is equal."""
    network = problem.network
    units = sum(w.shape[0] + w.shape[1] for w in network.weights)
    numbers = sum(p.numel() for p in network.parameters) + problem.point.candidates * units
    return max(1, min(BATCH, BATCH_NUMBERS // numbers))


def spread_labels(labels: Sequence[float], candidates: int) -> Tensor:
    """Return (m,): the labels in blocks of equal size, the first ones one longer where m is not a multiple."""
    size, more = divmod(candidates, len(labels))
    counts = [size + (i < more) for i in range(len(labels))]
    return torch.tensor([v for v, n in zip(labels, counts) for _ in range(n)], dtype=torch.float64)


class _Batch:
    """Problems with equally many candidates, as tensors (B, m, d) and (B, m)."""

    def __init__(self, problems: Sequence[AttackProblem], settings: AttackSettings) -> None:
        self.problems, self.settings = problems, settings
        self.points = points = [p.point for p in problems]
        self.network = stacked([p.network for p in problems])
        start = problems[0].start
        self.labels = start.labels if start else spread_labels(settings.labels, points[0].candidates)
        self.alpha = _column([p.alpha for p in points]).unsqueeze(-1)
        self.lambda_min = _column([p.lambda_min for p in points])
        self.squared_norm = torch.tensor([p.network.squared_norm for p in problems], dtype=torch.float64)
        chosen = settings.geometry or Geometry("l2")
        self.size = torch.stack([geometry.norm(chosen, p.network) for p in problems])
        priors = [p.prior for p in problems]
        self.low, self.high, self.center = (
            torch.stack([getattr(prior, name) for prior in priors]).unsqueeze(1)
            for name in ("low", "high", "center")
        )
        bases = [prior.basis for prior in priors if prior.basis is not None]
        self.basis = torch.stack(bases) if bases else None
        rates = _column([p.lr for p in points])
        self.x_rate = (rates * _column([max(1.0, p.radius) for p in points])).unsqueeze(-1)
        self.lambda_rate = rates
        self.x, self.lambdas = self._initial()

    def _initial(self) -> tuple[Tensor, Tensor]:
        starts = [p.start for p in self.problems if p.start is not None]
        if starts:
            x, lambdas = torch.stack([s.x for s in starts]), torch.stack([s.lambdas for s in starts])
            return self._inside(x), lambdas
        xs, lambda_rows = [], []
        for problem in self.problems:
            point, prior = problem.point, problem.prior
            generator = torch.Generator().manual_seed(point.seed)
            shape = (point.candidates, prior.low.numel())
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            x = x / x.norm(dim=1, keepdim=True) * (point.radius * prior.typical_norm)
            xs.append(x + prior.center if prior.kind == "offset" else x)
            uniform = torch.rand(point.candidates, generator=generator, dtype=torch.float64)
            lambda_rows.append(uniform * point.lambda_init)
        return self._inside(torch.stack(xs)), torch.stack(lambda_rows)

    def _inside(self, x: Tensor) -> Tensor:
        """Return x (B, m, d) projected onto the affine space of the prior, if it declares one."""
        if self.basis is None:
            return x
        return self.center + (x - self.center) @ self.basis.mT @ self.basis

    def run(self, progress: Callable[[int, int], None] | None) -> list[Candidates]:
        """Take all steps of all problems of the batch."""
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
        """Return (objective, K) of each problem, (B,)."""
        passed = forward(self.network, self.x, smoothed(self.alpha))
        c = kkt_coefficients(self.settings.task, passed.outputs, self.labels)
        u = factors(self.network, passed, self.lambdas.unsqueeze(-1) * c)
        squared = geometry.squared_distance(self.network, u, self.squared_norm)
        residual = squared / self.squared_norm
        is_public = self.settings.balance == "public"
        loss = squared if is_public else residual
        if self.settings.geometry is not None:
            loss = 1 - geometry.alignment(self.settings.geometry, self.network, u, self.size)
        short = (self.lambda_min - self.lambdas).relu()
        if is_public:
            short = short * self.lambdas.shape[-1]
        return loss + LAMBDA_WEIGHT * short.square().sum(-1) + self._prior_loss(), residual

    def _prior_loss(self) -> Tensor | float:
        if self.problems[0].prior.kind != "box":
            return 0.0
        outside = (self.x - self.high).relu().square() + (self.low - self.x).relu().square()
        return BOX_WEIGHT * outside.sum((-2, -1))

    def _step(self, step: int, slopes: Sequence[Tensor], moments: list[Tensor]) -> None:
        """Take one step of Adam with a cosine schedule."""
        decay = 0.5 * (1 + math.cos(math.pi * (step - 1) / self.settings.steps))
        pairs = zip(
            (self.x, self.lambdas), slopes, (moments[:2], moments[2:]), (self.x_rate, self.lambda_rate)
        )
        for value, slope, (first, second), rate in pairs:
            first.lerp_(slope, 0.1)
            second.mul_(0.999).addcmul_(slope, slope, value=0.001)
            root = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
            value.sub_(rate * (decay / (1 - 0.9**step)) * first / root)
        if self.basis is not None:
            self.x.copy_(self._inside(self.x))

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
            residual = geometry.squared_distance(self.network, u, self.squared_norm) / self.squared_norm
            measured.append((residual, geometry.alignment(norm_geometry, self.network, u, self.size)))
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
