"""Certified radii of Linear–ReLU chains: no input closer than this has another label.

Interval bounds (IBP; Gowal et al. 2018, arXiv 1810.12715) and backward linear bounds (CROWN; Zhang et al. 2018,
arXiv 1811.00866) of the differences z_y - z_c over a ball, and bisection on its radius.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

Layer = tuple[Tensor, Tensor]
"""Weight (m, n) and bias (m,)."""
BISECTIONS = 45
FARTHEST = 1e6
"""Where bisection begins for inputs that no attack succeeded on."""
_DUAL = {"l2": 2.0, "linf": 1.0}


def layers_of(model: nn.Module) -> list[Layer]:
    """Weights and biases of a Sequential of Linear layers with a ReLU between any two.

    Raises:
        ValueError: anything else: no bound here covers it.
    """
    parts = list(model.children()) if isinstance(model, nn.Sequential) else []
    linear = parts[0::2]
    fits = bool(parts) and len(parts) % 2 == 1 and all(isinstance(p, nn.Linear) for p in linear)
    if not fits or not all(isinstance(p, nn.ReLU) for p in parts[1::2]):
        raise ValueError("certified bounds cover Sequential(Linear, ReLU, …, Linear)")
    found = []
    for part in linear:
        assert isinstance(part, nn.Linear)
        bias = torch.zeros(part.out_features, dtype=part.weight.dtype) if part.bias is None else part.bias
        found.append((part.weight.detach(), bias.detach()))
    return found


def certified_radius(
    model: nn.Module, x: Tensor, labels: Tensor, norm: str, method: str, most: Tensor
) -> Tensor:
    """(n,) largest radius at which all differences are provably positive, by bisection; 0 where misclassified.

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
    """(n,) q/(√2·Π‖W‖₂) for l2: z_y - z_c moves by at most √2 times as much as z; 0 where q ≤ 0."""
    product = math.prod(float(torch.linalg.matrix_norm(weight, ord=2)) for weight, _ in layers_of(model))
    return margins.clamp_min(0.0) / (math.sqrt(2.0) * product)


def _last_layers(last: Layer, labels: Tensor) -> Layer:
    """(n, c - 1, m) and (n, c - 1): rows W_y - W_c for the other labels c."""
    weight, bias = last
    classes = weight.shape[0]
    others = torch.arange(classes).expand(len(labels), classes)
    others = others[others != labels[:, None]].view(len(labels), classes - 1)
    return weight[labels][:, None] - weight[others], bias[labels][:, None] - bias[others]


def _reach(weight: Tensor, norm: str) -> Tensor:
    """Dual norm of rows: how far a row's product moves per unit of radius."""
    return torch.linalg.vector_norm(weight, ord=_DUAL[norm], dim=-1)


def _ibp(hidden: Sequence[Layer], last: Layer, x: Tensor, radius: Tensor, norm: str) -> Tensor:
    """(n, c - 1) lower bounds; the first layer takes the ball itself, later ones the box around it."""
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
    """(n, c - 1) lower bounds by linear relaxation, layer after layer."""
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
    """Lower bound of rows·relu(…) + offsets: (n, o, m) rows are pulled back to the input."""
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
