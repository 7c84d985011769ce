"""Training sets that satisfy the conditions of the given one and are not it.

Inside one activation pattern Φ and ∇_θΦ are affine in x. So a (label, pattern) group may be replaced by any
points z_k of the same pattern with multipliers μ_k ≥ 0 where Σμ_k = Σλᵢ and Σμ_k z_k = Σλᵢxᵢ: the weights cannot
tell. Splits (x → x + αν, x − βν with λβ/(α+β), λα/(α+β)) and merges are special cases.

With more than two classes an image has a multiplier for each other class j, and the two sums must hold for each j. A
split divides all multipliers of an image alike. A merge needs a point for each j, because an image's weight in the
mean of one class is not its weight in another's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from analysis.reconstruction import multipliers
from analysis.reconstruction.certificate import Span, groups, project_out
from analysis.reconstruction.network import (
    Network,
    all_margins,
    constraints,
    forward,
    inherited,
    input_gradients,
    label_margins,
    outputs,
)
from analysis.reconstruction.scoring import hausdorff, nearest

CONTROL_RADII = (100.0, 0.05)
"""Radii of the random splits that must fail: one that breaks patterns, one that moves margins alone."""
EXACT_TOLERANCE = 1e-12
"""Tolerance of the residual at an exact KKT network, times max(1, radius): the rounding of x + αν."""
MARGIN_TOLERANCE = 1e-10
"""Tolerance of the least margin there, times max(1, radius)."""
TRAINED_TOLERANCE = 1e-9
"""Tolerance of residual and margin at a trained network, relative to the training set's, times max(1, radius)."""
SMALL_PART = 0.05
"""Share of W₁ that may lie along the directions of an alternative that explains a trained network."""


@dataclass(frozen=True)
class KktPoint:
    """A network at a least margin of 1 with the images and multipliers that explain it.

    Attributes:
        x: (n, d). labels: (n,). lambdas: (n, r) ≥ 0, one for each of `network.constraints`.
        span: of x.
    """

    task: str
    network: Network
    x: Tensor
    labels: Tensor
    lambdas: Tensor
    span: Span


@dataclass(frozen=True)
class Alternative:
    """A set of images with multipliers.

    Attributes:
        kind: name of the construction.
        radius: ‖αν‖ of a split; None where there is none.
        x: (m, d). labels: (m,). lambdas: (m, r).
        parents: (m,): the image whose gates each point should have.
        basis: (k, d) orthonormal rows: the directions that points moved along where the weights should have no
            part in them; (0, d) where there are none.
        is_control: it is wrong on purpose and must not pass.
    """

    kind: str
    radius: float | None
    x: Tensor
    labels: Tensor
    lambdas: Tensor
    parents: Tensor
    basis: Tensor
    is_control: bool = False


def original(point: KktPoint) -> Alternative:
    """Return the training set itself, which alternatives are measured against."""
    every = torch.arange(len(point.x))
    return Alternative("original", None, point.x, point.labels, point.lambdas, every, _nowhere(point))


def split(
    point: KktPoint,
    kind: str,
    radius: float,
    directions: Tensor,
    *,
    ratio: float = 1.0,
    basis: Tensor | None = None,
    is_control: bool = False,
) -> Alternative:
    """Replace every image xᵢ by xᵢ + ανᵢ and xᵢ − βνᵢ, with α = radius and β = ratio·radius.

    Args:
        directions: (n, d) unit vectors ν.
        ratio: β/α.
        basis: see `Alternative`.
    """
    there = point.x + radius * directions
    back = point.x - ratio * radius * directions
    share = ratio / (1 + ratio)
    every = torch.arange(len(point.x))
    return Alternative(
        kind,
        radius,
        torch.cat([there, back]),
        point.labels.repeat(2),
        torch.cat([point.lambdas * share, point.lambdas * (1 - share)]),
        every.repeat(2),
        _nowhere(point) if basis is None else basis,
        is_control,
    )


def null_split(point: KktPoint, radius: float, seed: int) -> Alternative | None:
    """Split along directions orthogonal to all images; None if the images span the whole space."""
    return _in_basis(point, "null_split", radius, point.span.outside, seed)


def dead_pixel_split(point: KktPoint, radius: float, seed: int) -> Alternative | None:
    """Split along pixels that are 0 in every image, the one null direction that Adam leaves alone; None without any."""
    basis = torch.eye(point.x.shape[1], dtype=point.x.dtype)[point.span.dead]
    return _in_basis(point, "dead_pixel_split", radius, basis, seed)


def in_span_split(point: KktPoint, radius: float, seed: int) -> Alternative | None:
    """Split along directions *inside* the images' span that no neuron of layer 1 sees; None if there are none.

    ν ⊥ the row space of W₁ keeps every pre-activation. Weights that are exact combinations of few vectors (the
    closed form has two) leave far alternatives even if the data span the whole space.
    """
    sigma, rows = torch.linalg.svd(point.network.weights[0] @ point.span.inside.T)[1:]
    cut = sigma[0] * max(point.network.weights[0].shape) * torch.finfo(sigma.dtype).eps
    rank = int((sigma > cut).sum())
    return _in_basis(point, "in_span_split", radius, rows[rank:] @ point.span.inside, seed)


def margin_split(point: KktPoint, seed: int) -> Alternative | None:
    """Split each image a little inside the span with ν ⊥ ∇ₓ of each margin, so that all stay, at any depth.

    The step is half of what keeps the first layer's pattern along a random direction; None where no image can
    move (all on kinks in every direction).
    """
    c = constraints(point.task, outputs(point.network, point.x), point.labels)
    slopes = torch.stack([input_gradients(point.network, point.x, each) for each in c.unbind(1)], 1)
    directions = _orthogonal(_random(point, point.span.inside, seed), slopes)
    if directions is None:
        return None
    radius = _pattern_radius(point, directions)
    if radius == 0:
        return None
    return split(point, "margin_split", radius, directions)


def merge(point: KktPoint) -> Alternative | None:
    """Merge each (label, pattern) group into its λ-weighted means, one for each margin; None if nothing merges.

    Images without a multiplier are left out: they only had to lie beyond the margin.
    """
    number = groups(point.network, point.x, point.labels)
    points, lambdas, parents = [], [], []
    for group in number[(point.lambdas > 0).any(1)].unique():
        for margin in range(point.lambdas.shape[1]):
            weight = point.lambdas[:, margin] * (number == group)
            if not bool(weight.any()):
                continue
            points.append(weight @ point.x / weight.sum())
            lambdas.append(torch.zeros_like(point.lambdas[0]))
            lambdas[-1][margin] = weight.sum()
            parents.append(int(weight.nonzero()[0]))
    if len(points) >= int((point.lambdas > 0).any(1).sum()):
        return None
    index = torch.tensor(parents)
    return Alternative(
        "merge",
        None,
        torch.stack(points),
        point.labels[index],
        torch.stack(lambdas),
        index,
        _nowhere(point),
    )


def controls(point: KktPoint, seed: int, radii: Sequence[float] = ()) -> list[Alternative]:
    """Return sets that must fail: random splits that break patterns, and a small one that moves margins alone.

    Args:
        radii: further radii, those of the sets that must pass.
    """
    everywhere = torch.eye(point.x.shape[1], dtype=point.x.dtype)
    directions = _random(point, everywhere, seed)
    return [
        split(point, "random_split", radius, directions, is_control=True)
        for radius in sorted({*CONTROL_RADII, *radii})
    ]


BY_RADIUS: tuple[Callable[[KktPoint, float, int], Alternative | None], ...] = (
    null_split,
    in_span_split,
    dead_pixel_split,
)


def _in_basis(point: KktPoint, kind: str, radius: float, basis: Tensor, seed: int) -> Alternative | None:
    if not basis.shape[0]:
        return None
    return split(point, kind, radius, _random(point, basis, seed), basis=basis)


def _nowhere(point: KktPoint) -> Tensor:
    return point.x.new_zeros(0, point.x.shape[1])


def _random(point: KktPoint, basis: Tensor, seed: int) -> Tensor:
    """Return a random unit direction of the basis (k, d) for each image, (n, d)."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(len(point.x), basis.shape[0], generator=generator, dtype=point.x.dtype)
    return mixed / mixed.norm(dim=1, keepdim=True) @ basis


def _orthogonal(directions: Tensor, slopes: Tensor) -> Tensor | None:
    """Return unit vectors: directions (n, d) without their parts along slopes (n, r, d); None if nothing is left."""
    basis = torch.linalg.svd(slopes, full_matrices=False)
    # A margin that does not depend on the image along a direction has no slope to keep.
    rows = basis.Vh * (basis.S[:, :1] * 1e-12 < basis.S).unsqueeze(-1)
    left = directions - ((rows @ directions.unsqueeze(-1)) * rows).sum(1)
    sizes = left.norm(dim=1, keepdim=True)
    return left / sizes if bool((sizes > 1e-9).all()) else None


def _pattern_radius(point: KktPoint, directions: Tensor) -> float:
    """Return half of the largest common step along ±directions that changes no gate in any layer."""
    base = forward(point.network, point.x)
    radius = 0.5
    for _ in range(40):
        moved = [forward(point.network, point.x + s * radius * directions) for s in (1.0, -1.0)]
        same = all(torch.equal(g, h) for m in moved for g, h in zip(m.gates, base.gates))
        if same:
            return radius / 2
        radius /= 2
    return 0.0


@dataclass(frozen=True)
class VerifiedAlternative:
    """One row of the table `alternatives`.

    Attributes:
        kind, radius, points, is_control: of the alternative.
        residual: ‖θ − Σμ_k c_k∇Φ(z_k)‖/‖θ‖ with the gates that the network has at z_k.
        residual_inherited: with the gates of the images that the points come from.
        residual_projected: recomputed gates, without the part of W₁ along the directions that points moved
            along. projection_change: how much of W₁ that is, relative.
        residual_original, residual_original_projected: the training set's own, with the same λ.
        margin_min, margin_max: of the points, where the training set's least is 1.
        margin_projected, margin_original_projected: least margins of points and training set without that part
            of W₁.
        slackness: max μ_k|margin − 1|/Σμ.
        nn_distance: least distance of a point to a training image. nn_train_to_alt, nn_alt_to_train: medians.
            hausdorff: between the two sets.
        tolerance: of the residual.
        passed: the set explains the weights as the training set does.
    """

    kind: str
    radius: float | None
    points: int
    is_control: bool
    residual: float
    residual_inherited: float
    residual_projected: float
    projection_change: float
    residual_original: float
    residual_original_projected: float
    margin_min: float
    margin_max: float
    margin_projected: float
    margin_original_projected: float
    slackness: float
    nn_distance: float
    nn_train_to_alt: float
    nn_alt_to_train: float
    hausdorff: float
    tolerance: float
    passed: bool


def build_alternatives(point: KktPoint, radii: Sequence[float], seed: int) -> list[Alternative]:
    """Return the training set, every alternative that data and weights allow, and the controls, in this order."""
    sets: list[Alternative | None] = [original(point)]
    for radius in radii:
        sets += [make(point, radius, seed) for make in BY_RADIUS]
    sets += [merge(point), margin_split(point, seed)]
    return [a for a in sets if a is not None] + controls(point, seed, radii)


def verify(point: KktPoint, alternative: Alternative, is_exact: bool) -> VerifiedAlternative:
    """Recompute everything about one alternative.

    Args:
        problem: network at a least margin of 1, images, multipliers.
        alternative: the set to verify.
        is_exact: the network is an exact KKT point (the closed form): recomputed gates and margins must agree
            to rounding. Else the small part of W₁ outside the images' span flips gates of near-kinked pairs, and
            the exact statement is the one about the network without that part, which must be small.
    """
    base = original(point)
    projected = project_out(point.network, alternative.basis)
    first = point.network.weights[0]
    margins = _margins(point, point.network, alternative)
    every = all_margins(point.task, outputs(point.network, alternative.x), alternative.labels)
    to_train, _ = nearest(alternative.x, point.x)
    to_alternative, _ = nearest(point.x, alternative.x)
    reach = max(1.0, alternative.radius or 0.0)
    total = float(alternative.lambdas.sum())
    row = VerifiedAlternative(
        kind=alternative.kind,
        radius=alternative.radius,
        points=len(alternative.x),
        is_control=alternative.is_control,
        residual=_residual(point, point.network, alternative),
        residual_inherited=_residual(point, point.network, alternative, inherit=True),
        residual_projected=_residual(point, projected, alternative),
        projection_change=float((projected.weights[0] - first).norm() / first.norm()),
        residual_original=_residual(point, point.network, base),
        residual_original_projected=_residual(point, projected, base),
        margin_min=float(margins.min()),
        margin_max=float(margins.max()),
        margin_projected=float(_margins(point, projected, alternative).min()),
        margin_original_projected=float(_margins(point, projected, base).min()),
        slackness=float((alternative.lambdas * (every - 1)).abs().max()) / max(total, 1e-300),
        nn_distance=float(to_train.min()),
        nn_train_to_alt=float(to_alternative.median()),
        nn_alt_to_train=float(to_train.median()),
        hausdorff=hausdorff(alternative.x, point.x),
        tolerance=(EXACT_TOLERANCE if is_exact else TRAINED_TOLERANCE) * reach,
        passed=False,
    )
    return replace(row, passed=_passes(row, is_exact, reach))


def _passes(row: VerifiedAlternative, is_exact: bool, reach: float) -> bool:
    if is_exact:
        return row.residual <= row.tolerance and row.margin_min >= 1 - MARGIN_TOLERANCE * reach
    return (
        row.projection_change <= SMALL_PART
        and abs(row.residual_projected - row.residual_original_projected) <= row.tolerance
        and row.margin_projected >= row.margin_original_projected - row.tolerance
    )


def _margins(point: KktPoint, network: Network, of: Alternative) -> Tensor:
    return label_margins(point.task, outputs(network, of.x), of.labels)


def _residual(point: KktPoint, network: Network, of: Alternative, inherit: bool = False) -> float:
    if not inherit:
        return multipliers.residual(point.task, network, of.x, of.labels, of.lambdas)
    gates = [g[of.parents] for g in forward(point.network, point.x).gates]
    return multipliers.residual(point.task, network, of.x, of.labels, of.lambdas, inherited(gates))
