"""Smallest perturbations that change a label, as far as a search finds them: upper bounds of the input margin.

DeepFool (Moosavi-Dezfooli et al. 2016, arXiv 1511.04599) gives the start; projected gradient ascent (Madry et al.
2018, arXiv 1706.06083) inside shrinking balls improves it; bisection on the segment to the point ends on the
boundary. Every radius returned belongs to an input that was evaluated and has another label.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Scores = Callable[[Tensor], Tensor]
"""(n, …) inputs → (n, c) scores."""
OVERSHOOT = 1.02


class Effort(NamedTuple):
    """How hard the search is.

    Attributes:
        deepfool_steps: linearizations; each takes a gradient per class.
        rounds: of projected gradient ascent, each in balls of 0.9 of the smallest radius so far.
        pgd_steps: in each round.
        segment: bisections on the segment to what was found.
    """

    deepfool_steps: int = 50
    rounds: int = 12
    pgd_steps: int = 20
    segment: int = 50


THOROUGH = Effort()


def functional_margins(scores: Tensor, labels: Tensor) -> Tensor:
    """(n,): z_y - max over the others."""
    own = scores.gather(1, labels[:, None])[:, 0]
    others = scores.scatter(1, labels[:, None], -torch.inf)
    return own - others.amax(1)


def attack(
    scores: Scores, x: Tensor, labels: Tensor, norm: str, *, effort: Effort = THOROUGH, seed: int = 0
) -> Tensor:
    """(n,) norms of the smallest perturbations found; 0 where the label is wrong already, inf where none was found.

    Args:
        scores: differentiable.
        x: (n, …), floating.
        labels: (n,).
        norm: "l2" or "linf".
        effort: how hard to search.
        seed: of the random starts in those balls.
    """
    right = functional_margins(scores(x).detach(), labels) > 0.0
    found = _onto_boundary(scores, x, _deepfool(scores, x, labels, norm, effort), labels, effort)
    best, at = _size(found - x, norm), found
    generator = torch.Generator().manual_seed(seed)
    for turn in range(effort.rounds):
        # Where nothing was found yet balls grow.
        radius = torch.where(torch.isfinite(best), 0.9 * best, 0.25 * 2.0**turn)
        start = _start(x, at, radius, norm, generator, from_best=turn % 2 == 0)
        tried = _onto_boundary(
            scores, x, _ascend(scores, x, start, labels, radius, norm, effort.pgd_steps), labels, effort
        )
        size = _size(tried - x, norm)
        better = size < best
        best = torch.where(better, size, best)
        at = torch.where(_shaped(better, x), tried, at)
    return torch.where(right, best, 0.0)


def _deepfool(scores: Scores, x: Tensor, labels: Tensor, norm: str, effort: Effort) -> Tensor:
    """(n, …) inputs beyond the nearest boundary of successive linearizations."""
    at = x.clone()
    for _ in range(effort.deepfool_steps):
        value, gradients = _differences(scores, at, labels)
        open_ = value.amin(1) > 0.0
        if not open_.any():
            break
        flat = gradients.flatten(2)
        dual = torch.linalg.vector_norm(flat, ord=2 if norm == "l2" else 1, dim=2)
        distance = torch.where(dual > 0.0, value / dual.clamp_min(1e-300), torch.inf)
        nearest = distance.argmin(1)
        rows = torch.arange(len(x))
        way, reach, length = flat[rows, nearest], distance[rows, nearest], dual[rows, nearest]
        unit = way / length.clamp_min(1e-300)[:, None] if norm == "l2" else way.sign()
        step = torch.where(torch.isfinite(reach), reach, 0.0)[:, None] * unit * OVERSHOOT
        # A hair more: on the boundary itself rounding decides.
        at = torch.where(_shaped(open_, x), at - (step + 1e-12 * unit).view_as(at), at)
    return at


def _differences(scores: Scores, at: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """z_y - z_c for the other labels c, (n, c - 1), and their gradients (n, c - 1, …)."""
    at = at.detach().requires_grad_()
    z = scores(at)
    classes = z.shape[1]
    others = torch.arange(classes).expand(len(labels), classes)
    others = others[others != labels[:, None]].view(len(labels), classes - 1)
    value = z.gather(1, labels[:, None]) - z.gather(1, others)
    gradients = [
        torch.autograd.grad(value[:, i].sum(), at, retain_graph=i < classes - 2)[0]
        for i in range(classes - 1)
    ]
    return value.detach(), torch.stack(gradients, dim=1)


def _start(
    x: Tensor, at: Tensor, radius: Tensor, norm: str, generator: torch.Generator, *, from_best: bool
) -> Tensor:
    """Inside the ball: the best point so far pulled in, or a random one."""
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    delta = at - x if from_best else noise * _shaped(radius, x)
    delta = torch.where(torch.isfinite(delta), delta, noise)
    return x + _projected(delta, radius, norm)


def _ascend(
    scores: Scores, x: Tensor, start: Tensor, labels: Tensor, radius: Tensor, norm: str, steps: int
) -> Tensor:
    """Projected gradient descent on the functional margin inside balls; stays where it has succeeded."""
    at = start
    for step in range(steps):
        at = at.detach().requires_grad_()
        margins = functional_margins(scores(at), labels)
        (gradient,) = torch.autograd.grad(margins.sum(), at)
        flat = gradient.flatten(1)
        size = torch.linalg.vector_norm(flat, dim=1, keepdim=True).clamp_min(1e-300)
        unit = (flat / size if norm == "l2" else flat.sign()).view_as(at)
        share = 0.5 * (1.0 - step / steps) + 0.02
        moved = x + _projected(at.detach() - share * _shaped(radius, x) * unit - x, radius, norm)
        at = torch.where(_shaped(margins.detach() > 0.0, x), moved, at.detach())
    return at.detach()


def _projected(delta: Tensor, radius: Tensor, norm: str) -> Tensor:
    """Onto the ball."""
    if norm == "linf":
        limit = _shaped(radius, delta)
        return delta.clamp(-limit, limit)
    size = _size(delta, norm)
    return delta * _shaped((radius / size.clamp_min(1e-300)).clamp_max(1.0), delta)


def _onto_boundary(scores: Scores, x: Tensor, there: Tensor, labels: Tensor, effort: Effort) -> Tensor:
    """The nearest point to x on the segment to `there` with another label; inf where `there` has none."""
    delta = there - x
    with torch.no_grad():
        succeeded = functional_margins(scores(there), labels) <= 0.0
        low, high = torch.zeros_like(succeeded, dtype=x.dtype), torch.ones_like(succeeded, dtype=x.dtype)
        for _ in range(effort.segment):
            middle = 0.5 * (low + high)
            wrong = functional_margins(scores(x + _shaped(middle, x) * delta), labels) <= 0.0
            low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
        return torch.where(_shaped(succeeded, x), x + _shaped(high, x) * delta, torch.inf)


def _size(delta: Tensor, norm: str) -> Tensor:
    flat = delta.flatten(1)
    return torch.linalg.vector_norm(flat, ord=2.0 if norm == "l2" else torch.inf, dim=1)


def _shaped(values: Tensor, like: Tensor) -> Tensor:
    """(n,) as (n, 1, …)."""
    return values.view(-1, *(1,) * (like.ndim - 1))
