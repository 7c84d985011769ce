"""How near candidates come to the training images. Evaluation only: nothing here feeds back into the attack."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import uniform_filter
from torch import Tensor

from analysis.reconstruction.network import Network, label_margins, outputs

TOP = 5
"""Best training images that `_top5` figures are means over."""
VOTE = 1.1
"""Candidates within this factor of the best distance vote, as published."""
GOOD_SSIM = 0.4
"""SSIM above which a reconstruction counts as good, as published."""
WINDOW = 3
"""Pixels of the SSIM window: 8×8 images are too small for the usual 7 or 11."""


@dataclass(frozen=True)
class Target:
    """What candidates are compared with.

    Attributes:
        task: one of `network.TASKS`.
        network: the victim; margins put candidates on the margin.
        x: (n, d) training images, labels (n,), in the network's coordinates.
        mean: (d,) that makes pixels of them. shape: of an image.
    """

    task: str
    network: Network
    x: Tensor
    labels: Tensor
    mean: Tensor
    shape: tuple[int, ...]

    def pixels(self, x: Tensor) -> np.ndarray:
        """Return one image of the network's coordinates (d,) as pixels of its shape."""
        return (x + self.mean).numpy().reshape(self.shape)


@dataclass(frozen=True)
class Score:
    """Figures of one set of candidates.

    Attributes:
        nn_top5, nn_median: Euclidean distance of training images to the nearest candidate: mean of the five best,
            median of all. nn_top5_margin, nn_median_margin: after every candidate was moved along its ray onto
            the margin (a bias-free network fixes only λx).
        ncc_top5: mean of the five best normalized cross-correlations.
        ssim_top5, good, good_share: SSIM of the best buddies after the vote and a stretch to [0, 1], as
            published: mean of the five best; how many exceed 0.4; their share of the training images.
        dssim_top5: (1 − SSIM)/2 of the same.
        in_box: share of candidate pixels inside [−1, 1].
    """

    nn_top5: float
    nn_median: float
    nn_top5_margin: float
    nn_median_margin: float
    ncc_top5: float
    ssim_top5: float
    dssim_top5: float
    good: int
    good_share: float
    in_box: float


@dataclass(frozen=True)
class Matches:
    """The best reconstruction of each training image.

    Attributes:
        image: (n, d): the vote's mean of candidates, in the network's coordinates.
        ncc: (n,). ssim: (n,), −1 for those that are not best buddies. buddies: (n,) bool.
        candidate: (n,) index of the candidate of highest NCC.
    """

    image: Tensor
    ncc: Tensor
    ssim: Tensor
    buddies: Tensor
    candidate: Tensor


def score(target: Target, x: Tensor, labels: Tensor) -> tuple[Score, Matches]:
    """Compare candidates x (m, d) with labels (m,) with the training images."""
    raw, _ = nearest(target.x, x)
    scaled, _ = nearest(target.x, on_margin(target, x, labels))
    matched = matches(target, x)
    best = _top(matched.ssim)
    good = int((matched.ssim > GOOD_SSIM).sum())
    figures = Score(
        nn_top5=-_top(-raw),
        nn_median=float(raw.median()),
        nn_top5_margin=-_top(-scaled),
        nn_median_margin=float(scaled.median()),
        ncc_top5=_top(matched.ncc),
        ssim_top5=best,
        dssim_top5=(1 - best) / 2,
        good=good,
        good_share=good / len(target.x),
        in_box=float((x.abs() <= 1).double().mean()),
    )
    return figures, matched


def on_margin(target: Target, x: Tensor, labels: Tensor) -> Tensor:
    """Move candidates along their rays to the victim's least margin γ: x·γ/margin(x) where margin(x) > 0.

    Exact without a bias, where Φ is of degree 1 in x; with one, and in regression, they stay.
    """
    if target.network.bias is not None or target.task == "regression":
        return x
    least = label_margins(target.task, outputs(target.network, target.x), target.labels).min()
    own = label_margins(target.task, outputs(target.network, x), labels)
    factor = torch.where(own > 0, least / own.clamp_min(1e-300), 1.0)
    return x * factor.unsqueeze(1)


def matches(target: Target, x: Tensor) -> Matches:
    """Match candidates to training images by best buddies, vote and SSIM (after the public code of Haim et al. 2022).

    The distance is the squared difference of standardized images over their size, 2(1 − NCC). A candidate may
    serve only the training image that it is nearest to; candidates within 1.1 of the best distance vote.
    """
    similarity = correlations(target.x, x)
    distance = (2 * (1 - similarity)).clamp_min(0)
    best = distance.min(dim=1)
    voters = (distance <= VOTE * best.values.unsqueeze(1)).double()
    image = voters @ x / voters.sum(1, keepdim=True)
    own = distance.argmin(dim=0)
    buddies = own[best.indices] == torch.arange(len(target.x))
    values = [_ssim(target, i, image[i]) if buddies[i] else -1.0 for i in range(len(target.x))]
    return Matches(image, similarity.amax(1), torch.tensor(values, dtype=x.dtype), buddies, best.indices)


def stretched(image: np.ndarray) -> np.ndarray:
    """Map values to [0, 1] by their least and largest; this hides errors of scale, which NN distances show."""
    low, high = image.min(), image.max()
    return (image - low) / (high - low) if high > low else np.zeros_like(image)


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Return the structural similarity (Wang et al. 2004) of images in [0, 1], (h, w) or (channels, h, w).

    The window is uniform, 3×3.

    Means are over windows that lie inside the image; constants 0.01² and 0.03²; biased moments.
    """
    c1, c2 = 0.01**2, 0.03**2
    planes_a, planes_b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    values = []
    for p, q in zip(planes_a, planes_b):
        mp, mq, pp, qq, pq = (_window(v) for v in (p, q, p * p, q * q, p * q))
        vp, vq, cov = pp - mp * mp, qq - mq * mq, pq - mp * mq
        top = (2 * mp * mq + c1) * (2 * cov + c2)
        values.append((top / ((mp * mp + mq * mq + c1) * (vp + vq + c2))).mean())
    return float(np.mean(values))


def _window(plane: np.ndarray) -> np.ndarray:
    edge = WINDOW // 2
    return uniform_filter(plane, WINDOW)[edge:-edge, edge:-edge]


def _ssim(target: Target, index: int, image: Tensor) -> float:
    return ssim(stretched(target.pixels(target.x[index])), stretched(target.pixels(image)))


def _top(values: Tensor) -> float:
    return float(values.topk(min(TOP, len(values))).values.mean())


def nearest(of: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance of each row of `of` (n, d) to the nearest row of `among` (m, d), and its index, (n,)."""
    closest = torch.cdist(of, among, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    return closest.values, closest.indices


def correlations(of: Tensor, among: Tensor) -> Tensor:
    """Return the normalized cross-correlation of each pair over pixels, (n, m); 0 for images of one value."""
    return _standard(of) @ _standard(among).T / of.shape[1]


def hausdorff(a: Tensor, b: Tensor) -> float:
    """Return the Hausdorff distance of two sets, the largest distance of a point to the other set."""
    return float(torch.maximum(nearest(a, b)[0].max(), nearest(b, a)[0].max()))


def _standard(x: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    spread = centred.square().mean(1, keepdim=True).sqrt()
    return torch.where(spread > 0, centred / spread.clamp_min(torch.finfo(x.dtype).tiny), 0.0)
