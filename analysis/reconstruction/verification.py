"""Alternatives verified by recomputation: residual three ways, margins, distances. One row each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from analysis.reconstruction import alternatives, distances, multipliers, spans, tasks
from analysis.reconstruction.alternatives import Alternative, Problem
from analysis.reconstruction.network import Network, forward, inherited, outputs

EXACT_TOLERANCE = 1e-12
"""Of the residual at an exact KKT network, times max(1, radius): what rounding of x + αν costs."""
MARGIN_TOLERANCE = 1e-10
"""Of the least margin there, times max(1, radius)."""
TRAINED_TOLERANCE = 1e-9
"""Of residual and margin against the training set's at a trained network, times max(1, radius)."""
SMALL_PART = 0.05
"""Of W₁ may lie along the directions of an alternative that is said to explain the trained network."""
FACTOR_TOLERANCE = 1e-9
"""Of the polar factor of a trained network's gradient, whose small singular values amplify rounding."""


@dataclass(frozen=True)
class Verified:
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
        factor_error: max|msign(DX′) − msign(DX)| of the Muon family, else None.
        tolerance: of the residual.
        passed: it explains the weights as the training set does.
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
    factor_error: float | None
    tolerance: float
    passed: bool

    def row(self) -> dict[str, Any]:
        """As a row of a table."""
        return asdict(self)


def build(problem: Problem, radii: Sequence[float], seed: int, with_muon: bool) -> list[Alternative]:
    """The training set, then every alternative that the data and weights allow, then the controls."""
    found: list[Alternative | None] = [alternatives.original(problem)]
    for radius in radii:
        found += [make(problem, radius, seed) for make in alternatives.BY_RADIUS]
    found += [alternatives.merge(problem), alternatives.margin_split(problem, seed)]
    if with_muon:
        found.append(alternatives.muon_family(problem, seed))
    return [a for a in found if a is not None] + alternatives.controls(problem, seed)


def verify(problem: Problem, alternative: Alternative, is_exact: bool) -> Verified:
    """Recompute everything about one alternative.

    Args:
        problem: network at a least margin of 1, images, multipliers.
        alternative: what is said to explain it.
        is_exact: the network is an exact KKT point (the closed form): recomputed gates and margins must agree
            to rounding. Else the small part of W₁ outside the images' span flips gates of near-kinked pairs, and
            the exact statement is the one about the network without that part, which must be small.
    """
    base = alternatives.original(problem)
    projected = spans.without(problem.network, alternative.basis)
    first = problem.network.weights[0]
    margins = _margins(problem, problem.network, alternative)
    to_train, _ = distances.nearest(alternative.x, problem.x)
    to_alternative, _ = distances.nearest(problem.x, alternative.x)
    reach = max(1.0, alternative.radius or 0.0)
    total = float(alternative.lambdas.sum())
    row = Verified(
        kind=alternative.kind,
        radius=alternative.radius,
        points=len(alternative.x),
        is_control=alternative.is_control,
        residual=_residual(problem, problem.network, alternative),
        residual_inherited=_residual(problem, problem.network, alternative, inherit=True),
        residual_projected=_residual(problem, projected, alternative),
        projection_change=float((projected.weights[0] - first).norm() / first.norm()),
        residual_original=_residual(problem, problem.network, base),
        residual_original_projected=_residual(problem, projected, base),
        margin_min=float(margins.min()),
        margin_max=float(margins.max()),
        margin_projected=float(_margins(problem, projected, alternative).min()),
        margin_original_projected=float(_margins(problem, projected, base).min()),
        slackness=float((alternative.lambdas * (margins - 1)).abs().max()) / max(total, 1e-300),
        nn_distance=float(to_train.min()),
        nn_train_to_alt=float(to_alternative.median()),
        nn_alt_to_train=float(to_train.median()),
        hausdorff=distances.hausdorff(alternative.x, problem.x),
        factor_error=_factor_error(problem, alternative) if alternative.kind == "muon_family" else None,
        tolerance=(EXACT_TOLERANCE if is_exact else TRAINED_TOLERANCE) * reach,
        passed=False,
    )
    return replace(row, passed=_passes(row, is_exact, reach))


def _passes(row: Verified, is_exact: bool, reach: float) -> bool:
    if row.factor_error is not None:
        return row.factor_error <= FACTOR_TOLERANCE
    if is_exact:
        return row.residual <= row.tolerance and row.margin_min >= 1 - MARGIN_TOLERANCE * reach
    return (
        row.projection_change <= SMALL_PART
        and abs(row.residual_projected - row.residual_original_projected) <= row.tolerance
        and row.margin_projected >= row.margin_original_projected - row.tolerance
    )


def _margins(problem: Problem, network: Network, of: Alternative) -> Tensor:
    return tasks.margins(problem.task, outputs(network, of.x), of.labels)


def _residual(problem: Problem, network: Network, of: Alternative, inherit: bool = False) -> float:
    if not inherit:
        return multipliers.residual(problem.task, network, of.x, of.labels, of.lambdas)
    held = [g[of.parents] for g in forward(problem.network, problem.x).gates]
    return multipliers.residual(problem.task, network, of.x, of.labels, of.lambdas, inherited(held))


def _factor_error(problem: Problem, alternative: Alternative) -> float:
    d = alternatives.first_layer_factor(problem)
    one, other = (_exact_polar(d @ x, alternatives.factor_rank(problem)) for x in (alternative.x, problem.x))
    return float((one - other).abs().max())


def _exact_polar(matrix: Tensor, rank: int) -> Tensor:
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] @ v[:rank]
