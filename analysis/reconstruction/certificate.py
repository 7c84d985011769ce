"""How near a checkpoint is to a KKT point, in which geometry, and how much freedom it leaves to an attacker."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from analysis.reconstruction import multipliers
from analysis.reconstruction.geometry import NORMS, Geometry, best_alignment
from analysis.reconstruction.network import Network, all_margins, forward, outputs, patterns
from harness.errors import InputError

DIRECTIONS = 16
"""Random directions that a split radius is the median over."""
DEAD = 1e-12
"""Absolute pixel value up to which a pixel counts as 0."""
_ROUNDING = 1e-14


@dataclass(frozen=True)
class KktCertificate:
    """One row of the table `certificate`. The network is scaled to a least margin of 1 before all but `margin_min`.

    Attributes:
        margin_min: least margin of the checkpoint as it is. margin_max: largest margin over the least.
        normalized_margin: margin_min/‖θ‖^L.
        residual: ε = ‖θ − Σ λᵢcᵢ∇Φ‖/‖θ‖ with the network's gates and the best λ ≥ 0; for ReLU networks it stays
            high however long one trains, because images sit on kinks.
        residual_clarke, residual_clarke_upper, clarke_violation, kinks, pairs: see `multipliers.ClarkeFit`;
            None beyond two layers, and where the fit would take over 1 GiB.
        slackness: max λ(margin − 1)/Σλ: 0 where only margins of 1 have a multiplier; with several classes an image
            has one for each other class.
        squared_norm: ‖θ‖². identity_error: |‖θ‖² − L·Σλ·margin|/‖θ‖²: Euler's identity at stationarity.
        lambda_sum, support: Σλ, and how many λ exceed 1e-9 of the largest.
        alignment_l2 … alignment_hybrid: best a found over λ ≥ 0 (`geometry`).
        outside, update_outside, update_dead: share of W₁, of W₁ − W₁(0), and of its dead-pixel columns
            outside span{xᵢ} (None without the initial weights).
        rank, null_dimension, dead_pixels: of the images.
        split_radius: median over images of the largest pattern-preserving null-space split.
        groups, largest_group: (label, pattern) groups.
    """

    margin_min: float
    margin_max: float
    normalized_margin: float
    residual: float
    residual_clarke: float | None
    residual_clarke_upper: float | None
    clarke_violation: float | None
    kinks: int | None
    pairs: int | None
    slackness: float
    squared_norm: float
    identity_error: float
    lambda_sum: float
    support: int
    alignment_l2: float
    alignment_spectral: float
    alignment_linf: float
    alignment_hybrid: float
    outside: float
    update_outside: float | None
    update_dead: float | None
    rank: int
    null_dimension: int
    dead_pixels: int
    split_radius: float | None
    groups: int
    largest_group: int


def separated(task: str, network: Network, x: Tensor, labels: Tensor, name: str) -> float:
    """Return the least margin; refuse one that is not above 0, for which no theorem says anything.

    Raises:
        InputError: the network does not separate the images, or its weights are not finite.
    """
    if not all(bool(torch.isfinite(p).all()) for p in network.parameters):
        raise InputError(name, "weights", "are not all finite: nothing can be certified", fix="a smaller lr")
    margin = multipliers.least_margin(task, network, x, labels)
    if not margin > 0:
        raise InputError(
            name,
            f"least margin {margin:.3g}",
            "does not separate its training images, so no certificate is claimed",
            fix="more steps, a larger width, or a larger init_scale",
        )
    return margin


def certify(
    task: str,
    network: Network,
    x: Tensor,
    labels: Tensor,
    hybrid: Geometry,
    initial: Network | None = None,
    seed: int = 0,
    name: str = "checkpoint",
) -> KktCertificate:
    """Return the certificate of one checkpoint.

    Args:
        x: (n, d) float64 training images. labels: (n,).
        hybrid: the norm of the optimizer that trained it.
        initial: the network before training.
        seed: of the random null-space directions.
        name: for the error.

    Raises:
        InputError: see `separated`.
    """
    margin = separated(task, network, x, labels, name)
    unit = network.scaled(margin ** (-1 / network.depth))
    fit = multipliers.fit(task, unit, x, labels)
    values = all_margins(task, outputs(unit, x), labels)
    total = float(fit.lambdas.abs().sum())
    clarke = multipliers.clarke(unit, x, labels) if task == "binary" else None
    span = data_span(x)
    aligned = {
        norm: best_alignment(
            task, unit, x, labels, hybrid if norm == "hybrid" else Geometry(norm), fit.lambdas
        )
        for norm in NORMS
    }
    radii = split_radii(unit, x, span.outside, seed)
    sizes = Counter(_group_keys(unit, x, labels)).values()
    change = network.weights[0] - initial.weights[0] if initial is not None else None
    return KktCertificate(
        margin_min=margin,
        margin_max=float(values.amin(1).max()),
        normalized_margin=margin / network.squared_norm ** (network.depth / 2),
        residual=fit.residual,
        residual_clarke=clarke.residual if clarke else None,
        residual_clarke_upper=clarke.upper if clarke else None,
        clarke_violation=clarke.violation if clarke else None,
        kinks=clarke.kinks if clarke else None,
        pairs=clarke.pairs if clarke else None,
        slackness=float((fit.lambdas * (values - 1)).abs().max()) / max(total, 1e-300),
        squared_norm=unit.squared_norm,
        identity_error=abs(unit.squared_norm - unit.depth * float((fit.lambdas * values).sum()))
        / unit.squared_norm,
        lambda_sum=float(fit.lambdas.sum()),
        support=int((fit.lambdas.abs() > 1e-9 * fit.lambdas.abs().max()).sum()),
        alignment_l2=aligned["l2"],
        alignment_spectral=aligned["spectral"],
        alignment_linf=aligned["linf"],
        alignment_hybrid=aligned["hybrid"],
        outside=outside_share(network.weights[0], span),
        update_outside=outside_share(change, span) if change is not None else None,
        update_dead=_dead_share(change, span.dead) if change is not None else None,
        rank=span.rank,
        null_dimension=span.outside.shape[0],
        dead_pixels=int(span.dead.sum()),
        split_radius=_finite(float(radii.median())),
        groups=len(sizes),
        largest_group=max(sizes),
    )


def groups(network: Network, x: Tensor, labels: Tensor) -> Tensor:
    """Return the number of each image's (label, activation pattern) group in order of appearance, (n,)."""
    numbers: dict[bytes, int] = {}
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in _group_keys(network, x, labels)])


def _group_keys(network: Network, x: Tensor, labels: Tensor) -> list[bytes]:
    gates = torch.cat([labels.unsqueeze(-1).to(x.dtype), *patterns(network, x)], dim=1)
    return [row.numpy().tobytes() for row in gates]


def _dead_share(change: Tensor, dead: Tensor) -> float:
    size = change.norm()
    return float(change[:, dead].norm() / size) if size > 0 else 0.0


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None


@dataclass(frozen=True)
class Span:
    """Orthonormal bases of span{xᵢ} (r, d) and of its complement (d − r, d), and the dead pixels.

    Attributes:
        inside, outside: rows are basis vectors.
        dead: (d,) bool: coordinates that are 0 in every image.
    """

    inside: Tensor
    outside: Tensor
    dead: Tensor

    @property
    def rank(self) -> int:
        """Dimension of the span."""
        return self.inside.shape[0]


def data_span(x: Tensor) -> Span:
    """Return the span of the rows of x (n, d); its rank counts singular values above max(n, d)·eps·σ₁."""
    _, sigma, v = torch.linalg.svd(x, full_matrices=True)
    cut = sigma[0] * max(x.shape) * torch.finfo(x.dtype).eps
    rank = int((sigma > cut).sum())
    return Span(v[:rank], v[rank:], x.abs().amax(0) <= DEAD)


def outside_share(weight: Tensor, span: Span) -> float:
    """Return ‖W P_⊥‖/‖W‖ for W (h, d): 0 where every row is a combination of images."""
    size = weight.norm()
    return float((weight @ span.outside.T).norm() / size) if size > 0 else 0.0


def project_out(network: Network, basis: Tensor) -> Network:
    """Return the network without the part of its first layer along the orthonormal rows of `basis` (k, d)."""
    first = network.weights[0]
    return network.with_first(first - first @ basis.T @ basis)


def split_radii(network: Network, x: Tensor, basis: Tensor, seed: int) -> Tensor:
    """Return how far each image can move along directions of `basis` before a gate of layer 1 changes, (n,).

    min over neurons of |h_j|/|w_j·ν|, kinked pairs left out (there the gate is free), the median over
    `DIRECTIONS` random unit directions ν. Infinite where ν is orthogonal to every neuron.

    Args:
        network: scaled to a least margin of 1.
        basis: (k, d) orthonormal rows.
    """
    if not basis.shape[0]:
        return torch.zeros(len(x), dtype=x.dtype)
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(DIRECTIONS, basis.shape[0], generator=generator, dtype=x.dtype)
    directions = mixed / mixed.norm(dim=1, keepdim=True) @ basis
    h = forward(network, x).hidden[0].abs()
    room = h.masked_fill(h < multipliers.KINK, torch.inf)
    weight = network.weights[0]
    moved = (directions @ weight.T).abs()
    # What is rounding of an orthogonal direction is 0, and the radius infinite.
    moved = moved.masked_fill(moved <= _ROUNDING * weight.norm(dim=1), 0.0)
    # 0/0 cannot occur: kinked pairs are infinite.
    return (room.unsqueeze(1) / moved.unsqueeze(0)).amin(-1).median(dim=1).values
