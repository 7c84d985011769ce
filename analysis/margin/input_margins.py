"""Input margins of networks: upper bounds by an attack, lower bounds by certificates.

Upper: DeepFool (Moosavi-Dezfooli et al. 2016, arXiv 1511.04599) gives the start; projected gradient ascent (Madry et
al. 2018, arXiv 1706.06083) inside shrinking balls improves it; bisection on the segment to the point ends on the
boundary. Every radius returned belongs to an input that was evaluated and has another label.

Lower, for chains of Linear and ReLU: interval bounds (IBP; Gowal et al. 2018, arXiv 1810.12715) and backward linear
bounds (CROWN; Zhang et al. 2018, arXiv 1811.00866) of the differences z_y - z_c over a ball, and bisection on its
radius. No input closer than such a radius has another label.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

Scores = Callable[[Tensor], Tensor]
"""(n, …) inputs → (n, c) scores."""
OVERSHOOT = 1.02
"""Factor on DeepFool's steps, which end beyond the linearized boundary."""
Layer = tuple[Tensor, Tensor]
"""Weight (m, n) and bias (m,)."""
BISECTIONS = 45
FARTHEST = 1e6
"""Where bisection begins for inputs that no attack succeeded on."""
_DUAL = {"l2": 2.0, "linf": 1.0}


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
    """Return the margins z_y - max over the other classes, (n,)."""
    own = scores.gather(1, labels[:, None])[:, 0]
    others = scores.scatter(1, labels[:, None], -torch.inf)
    return own - others.amax(1)


def attack(
    scores: Scores, x: Tensor, labels: Tensor, norm: str, *, effort: Effort = THOROUGH, seed: int = 0
) -> Tensor:
    """Return the norms of the smallest perturbations that change a label, (n,).

    They are 0 where the label is wrong already and inf where none was found.

    Args:
        scores: differentiable.
        x: (n, …), floating.
        labels: (n,).
        norm: "l2" or "linf".
        effort: how hard to search.
        seed: of the random starts in those balls.
    """
    right = functional_margins(scores(x).detach(), labels) > 0.0
    at = _onto_boundary(scores, x, _deepfool(scores, x, labels, norm, effort), labels, effort)
    best = _size(at - x, norm)
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
    """Return inputs (n, …) beyond the nearest boundary of successive linearizations."""
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
    """Return z_y - z_c for the other labels c, (n, c - 1), and their gradients (n, c - 1, …)."""
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
    """Return a start inside the ball: the best point so far pulled in, or a random one."""
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    delta = at - x if from_best else noise * _shaped(radius, x)
    delta = torch.where(torch.isfinite(delta), delta, noise)
    return x + _projected(delta, radius, norm)


def _ascend(
    scores: Scores, x: Tensor, start: Tensor, labels: Tensor, radius: Tensor, norm: str, steps: int
) -> Tensor:
    """Descend the functional margin by projected gradients inside balls; stay where it has succeeded."""
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
    """Project perturbations onto the ball."""
    if norm == "linf":
        limit = _shaped(radius, delta)
        return delta.clamp(-limit, limit)
    size = _size(delta, norm)
    return delta * _shaped((radius / size.clamp_min(1e-300)).clamp_max(1.0), delta)


def _onto_boundary(scores: Scores, x: Tensor, there: Tensor, labels: Tensor, effort: Effort) -> Tensor:
    """Return the nearest point to x on the segment to `there` with another label; inf where `there` has none."""
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
    """Return (n,) as (n, 1, …)."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def layers_of(model: nn.Module) -> list[Layer]:
    """Return weights and biases of a Sequential of Linear layers with a ReLU between any two.

    Raises:
        ValueError: anything else: no bound here covers it.
    """
    parts = list(model.children()) if isinstance(model, nn.Sequential) else []
    linear = parts[0::2]
    fits = bool(parts) and len(parts) % 2 == 1 and all(isinstance(p, nn.Linear) for p in linear)
    if not fits or not all(isinstance(p, nn.ReLU) for p in parts[1::2]):
        raise ValueError("certified bounds cover Sequential(Linear, ReLU, …, Linear)")
    layers = []
    for part in linear:
        assert isinstance(part, nn.Linear)
        bias = torch.zeros(part.out_features, dtype=part.weight.dtype) if part.bias is None else part.bias
        layers.append((part.weight.detach(), bias.detach()))
    return layers


def certified_radius(
    model: nn.Module, x: Tensor, labels: Tensor, norm: str, method: str, most: Tensor
) -> Tensor:
    """Return the largest radius at which all differences are provably positive, (n,); 0 where misclassified.

    Args:
        model: Sequential(Linear, ReLU, …, Linear), fp64.
        x: (n, d).
        labels: (n,).
        norm: "l2" or "linf" of the perturbation.
        method: "ibp" or "crown". CROWN takes its intermediate bounds from CROWN.
        most: (n,) radii at which an attack succeeded: bisection begins there.
    """
    layers = layers_of(model)
    differences = _last_layers(layers[-1], labels)
    low, high = torch.zeros_like(most), torch.where(torch.isfinite(most), most, FARTHEST)
    lower = {"ibp": _ibp, "crown": _crown}[method]

    def holds(radius: Tensor) -> Tensor:
        return (lower(layers[:-1], differences, x, radius, norm) > 0.0).all(1)

    right = holds(low)
    full = holds(high)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        good = holds(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(right, torch.where(full, high, low), 0.0)


def lipschitz_radius(model: nn.Module, margins: Tensor) -> Tensor:
    """Return q/(√2·Π‖W‖₂) for l2, (n,): z_y - z_c moves by at most √2 times as much as z; 0 where q ≤ 0."""
    product = math.prod(float(torch.linalg.matrix_norm(weight, ord=2)) for weight, _ in layers_of(model))
    return margins.clamp_min(0.0) / (math.sqrt(2.0) * product)


def _last_layers(last: Layer, labels: Tensor) -> Layer:
    """Return rows W_y - W_c (n, c - 1, m) and biases (n, c - 1) for the other labels c."""
    weight, bias = last
    classes = weight.shape[0]
    others = torch.arange(classes).expand(len(labels), classes)
    others = others[others != labels[:, None]].view(len(labels), classes - 1)
    return weight[labels][:, None] - weight[others], bias[labels][:, None] - bias[others]


def _reach(weight: Tensor, norm: str) -> Tensor:
    """Return the dual norm of rows: how far a row's product moves per unit of radius."""
    return torch.linalg.vector_norm(weight, ord=_DUAL[norm], dim=-1)


def _ibp(hidden: Sequence[Layer], last: Layer, x: Tensor, radius: Tensor, norm: str) -> Tensor:
    """Return lower bounds (n, c - 1); the first layer takes the ball itself, later ones the box around it."""
    if not hidden:
        return (last[0] @ x[:, :, None])[..., 0] + last[1] - radius[:, None] * _reach(last[0], norm)
    weight, bias = hidden[0]
    centre, spread = x @ weight.mT + bias, radius[:, None] * _reach(weight, norm)
    low, high = centre - spread, centre + spread
    for weight, bias in hidden[1:]:
        low, high = _through(weight, bias, low.clamp_min(0.0), high.clamp_min(0.0))
    low, high = low.clamp_min(0.0), high.clamp_min(0.0)
    weight, bias = last
    middle, half = 0.5 * (low + high), 0.5 * (high - low)
    return (weight @ middle[..., None] - weight.abs() @ half[..., None])[..., 0] + bias


def _through(weight: Tensor, bias: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    middle, half = 0.5 * (low + high), 0.5 * (high - low)
    centre, spread = middle @ weight.mT + bias, half @ weight.abs().mT
    return centre - spread, centre + spread


def _crown(hidden: Sequence[Layer], last: Layer, x: Tensor, radius: Tensor, norm: str) -> Tensor:
    """Return lower bounds (n, c - 1) by linear relaxation, layer after layer."""
    bounds: list[tuple[Tensor, Tensor]] = []
    for depth, (weight, bias) in enumerate(hidden):
        rows, offsets = weight.expand(len(x), *weight.shape), bias.expand(len(x), len(bias))
        low = _backward(hidden[:depth], bounds, rows, offsets, x, radius, norm)
        high = -_backward(hidden[:depth], bounds, -rows, -offsets, x, radius, norm)
        bounds.append((low, high))
    return _backward(hidden, bounds, last[0], last[1], x, radius, norm)


def _backward(
    hidden: Sequence[Layer],
    bounds: Sequence[tuple[Tensor, Tensor]],
    rows: Tensor,
    offsets: Tensor,
    x: Tensor,
    radius: Tensor,
    norm: str,
) -> Tensor:
    """Return a lower bound of rows·relu(…) + offsets: rows (n, o, m) are pulled back to the input."""
    for (weight, bias), (low, high) in zip(reversed(hidden), reversed(bounds[: len(hidden)])):
        # On [l, u] with l < 0 < u: αz ≤ relu z ≤ u(z - l)/(u - l), α = 1 where u > -l.
        crossing = (low < 0.0) & (high > 0.0)
        width = torch.where(crossing, high - low, 1.0)
        above = torch.where(crossing, high / width, (low >= 0.0).to(x.dtype))
        shift = torch.where(crossing, -high * low / width, 0.0)
        below = torch.where(crossing, (high > -low).to(x.dtype), (low >= 0.0).to(x.dtype))
        rise, fall = rows.clamp_min(0.0), rows.clamp_max(0.0)
        offsets = offsets + (fall * shift[:, None]).sum(-1)
        rows = rise * below[:, None] + fall * above[:, None]
        offsets = offsets + rows @ bias
        rows = rows @ weight
    return (rows @ x[:, :, None])[..., 0] + offsets - radius[:, None] * _reach(rows, norm)
