"""How near candidates come to the training images. Evaluation only: nothing here feeds back into the attack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import correlate1d, uniform_filter
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
ROUNDING = 1e-9
"""Of pixels, by subtracting and adding the mean and the offset in fp64."""


@dataclass(frozen=True)
class Target:
    """What candidates are compared with.

    Attributes:
        task: one of `network.TASKS`.
        network: the victim; margins put candidates on the margin.
        x: (n, d) training images, labels (n,), in the network's coordinates.
        mean, offset: x + mean − offset are pixels, mean (d,). shape: of an image.
    """

    task: str
    network: Network
    x: Tensor
    labels: Tensor
    mean: Tensor
    shape: tuple[int, ...]
    offset: float = 0.0

    @property
    def has_pixels(self) -> bool:
        """Whether the training images are pixels in [0, 1], which published SSIM presupposes."""
        pixels = self.x + self.mean - self.offset
        return bool(((pixels >= -ROUNDING) & (pixels <= 1 + ROUNDING)).all())

    def pixels(self, x: Tensor) -> np.ndarray:
        """Return one image of the network's coordinates (d,) as pixels of its shape."""
        return (x + self.mean - self.offset).numpy().reshape(self.shape)


@dataclass(frozen=True)
class Score:
    """Figures of one set of candidates.

    Attributes:
        nn_top5, nn_median: Euclidean distance of training images to the nearest candidate: mean of the five best,
            median of all. nn_top5_margin, nn_median_margin: after every candidate was moved along its ray onto
            the margin (a bias-free network fixes only λx).
        ncc_top5: mean of the five best normalized cross-correlations.
        buddies_published, ssim_top5_published, good_published: images with a candidate of their own; mean of the five
            best SSIM; images whose SSIM exceeds 0.4. See `matches` for what is published. None for SSIM of training
            images that are not pixels in [0, 1] (points of a sphere, a batch of one's own).
        buddies_mutual, ssim_top5_mutual, good_mutual: the same with `mutual_matches`.
        hits_10, hits_25, hits_50: share of training images with a candidate within 10, 25, 50 % of the image's norm,
            the candidate on the margin.
        in_box: share of candidate pixels inside [−1, 1].
    """

    nn_top5: float
    nn_median: float
    nn_top5_margin: float
    nn_median_margin: float
    ncc_top5: float
    buddies_published: int
    ssim_top5_published: float | None
    good_published: int | None
    buddies_mutual: int
    ssim_top5_mutual: float
    good_mutual: int
    hits_10: float
    hits_25: float
    hits_50: float
    in_box: float


@dataclass(frozen=True)
class Matches:
    """The best reconstruction of each training image.

    Attributes:
        image: (n, d): the vote's mean of candidates, in the network's coordinates.
        ncc: (n,) of the best candidate of all. ssim: (n,), −1 for images without a candidate of their own.
        buddies: (n,) bool: which images have one.
        candidate: (n,) index of the candidate that is matched.
    """

    image: Tensor
    ncc: Tensor
    ssim: Tensor
    buddies: Tensor
    candidate: Tensor


def score(target: Target, x: Tensor, labels: Tensor) -> tuple[Score, Matches]:
    """Compare candidates x (m, d) with labels (m,) with the training images; the matches are the published ones."""
    raw, _ = nearest(target.x, x)
    scaled, _ = nearest(target.x, on_margin(target, x, labels))
    published, mutual = matches(target, x), mutual_matches(target, x)
    relative = scaled / target.x.norm(dim=1)
    figures = Score(
        nn_top5=-_top(-raw),
        nn_median=float(raw.median()),
        nn_top5_margin=-_top(-scaled),
        nn_median_margin=float(scaled.median()),
        ncc_top5=_top(published.ncc),
        buddies_published=int(published.buddies.sum()),
        ssim_top5_published=_top(published.ssim) if target.has_pixels else None,
        good_published=int((published.ssim > GOOD_SSIM).sum()) if target.has_pixels else None,
        buddies_mutual=int(mutual.buddies.sum()),
        ssim_top5_mutual=_top(mutual.ssim),
        good_mutual=int((mutual.ssim > GOOD_SSIM).sum()),
        hits_10=_share(relative, 0.1),
        hits_25=_share(relative, 0.25),
        hits_50=_share(relative, 0.5),
        in_box=float((x.abs() <= 1).double().mean()),
    )
    return figures, published


def on_margin(target: Target, x: Tensor, labels: Tensor) -> Tensor:
    """Move candidates along their rays to the victim's least margin γ: x·γ/margin(x) where margin(x) > 0.

    Exact without a bias, where Φ is of degree 1 in x; with one, they stay.
    """
    if target.network.bias is not None:
        return x
    least = label_margins(target.task, outputs(target.network, target.x), target.labels).min()
    own = label_margins(target.task, outputs(target.network, x), labels)
    factor = torch.where(own > 0, least / own.clamp_min(1e-300), 1.0)
    return x * factor.unsqueeze(1)


def matches(target: Target, x: Tensor) -> Matches:
    """Match candidates to training images by best buddies, vote and SSIM as Haim et al. 2022 publish it.

    The distance is the squared difference of standardized images over their size, 2(1 − NCC). A candidate belongs to
    the training image that it is nearest to. Among its own candidates an image takes the best, and all within 1.1 of
    its distance vote. SSIM: Gaussian window of 3 pixels, the reconstruction stretched to [0, 1], the truth as it is.
    The public code searches CIFAR-10 at half size; here the search is at full size. An image without a candidate of
    its own gets −1, where the public code compares an arbitrary one.
    """
    similarity = correlations(target.x, x)
    distance = (2 * (1 - similarity)).clamp_min(0)
    belongs = distance.argmin(dim=0) == torch.arange(len(target.x)).unsqueeze(1)
    own = distance.masked_fill(~belongs, torch.inf)
    best = own.min(dim=1)
    buddies = best.values.isfinite()
    voters = (own <= VOTE * best.values.unsqueeze(1)) & belongs
    return _matched(target, x, similarity, voters, buddies, best.indices, ssim_published)


def mutual_matches(target: Target, x: Tensor) -> Matches:
    """Match more strictly: the candidate that is best of *all* must be nearest to this image, and all candidates vote.

    SSIM: uniform 3 × 3 window inside the image, both images stretched to [0, 1], so that scale and offset do not count.
    """
    similarity = correlations(target.x, x)
    distance = (2 * (1 - similarity)).clamp_min(0)
    best = distance.min(dim=1)
    voters = distance <= VOTE * best.values.unsqueeze(1)
    buddies = distance.argmin(dim=0)[best.indices] == torch.arange(len(target.x))
    return _matched(target, x, similarity, voters, buddies, best.indices, _stretched_ssim)


def _matched(
    target: Target,
    x: Tensor,
    similarity: Tensor,
    voters: Tensor,
    buddies: Tensor,
    candidate: Tensor,
    compare: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Matches:
    weight = voters.to(x.dtype)
    # An image without voters is drawn as its best candidate of all.
    lone = ~voters.any(1)
    weight[lone, similarity.argmax(1)[lone]] = 1.0
    image = weight @ x / weight.sum(1, keepdim=True)
    values = np.full(len(target.x), -1.0)
    if bool(buddies.any()) and min(target.shape[-2:]) >= WINDOW:
        rows = buddies.nonzero()[:, 0].tolist()
        made, truth = (np.stack([target.pixels(of[i]) for i in rows]) for of in (image, target.x))
        values[rows] = compare(made, truth)
    return Matches(image, similarity.amax(1), torch.from_numpy(values).to(x.dtype), buddies, candidate)


def stretched(image: np.ndarray) -> np.ndarray:
    """Map values to [0, 1] by their least and largest; this hides errors of scale, which NN distances show."""
    low, high = image.min(), image.max()
    return (image - low) / (high - low) if high > low else np.zeros_like(image)


def ssim_published(reconstructions: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Return the SSIM of the public code, (n,): reconstructions alone are stretched, Gaussian window of 3, σ = 1.5.

    As kornia's: borders reflected, the mean over all pixels and channels. Images are (n, h, w) or (n, channels, h, w).
    """
    weights = np.exp(-0.5 * (np.arange(-1.0, 2.0) / 1.5) ** 2)
    weights /= weights.sum()

    def window(planes: np.ndarray) -> np.ndarray:
        rows = correlate1d(planes, weights, axis=-1, mode="mirror")
        return correlate1d(rows, weights, axis=-2, mode="mirror")

    return _ssim(_all_stretched(reconstructions), truths, window)


def _stretched_ssim(reconstructions: np.ndarray, truths: np.ndarray) -> np.ndarray:
    return ssim(_all_stretched(reconstructions), _all_stretched(truths))


def _all_stretched(images: np.ndarray) -> np.ndarray:
    return np.stack([stretched(image) for image in images])


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the structural similarity (Wang et al. 2004), (n,), of images in [0, 1] with a uniform 3 × 3 window.

    Means are over windows that lie inside the image. Images are (n, h, w) or (n, channels, h, w).
    """
    edge = WINDOW // 2

    def window(planes: np.ndarray) -> np.ndarray:
        return uniform_filter(planes, WINDOW, axes=(-2, -1))[..., edge:-edge, edge:-edge]

    return _ssim(a, b, window)


def _ssim(a: np.ndarray, b: np.ndarray, window: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return the mean SSIM over windows and channels, (n,), in fp64; constants 0.01², 0.03²; biased moments."""
    c1, c2 = 0.01**2, 0.03**2
    mp, mq, pp, qq, pq = (window(v) for v in (a, b, a * a, b * b, a * b))
    vp, vq, cov = pp - mp * mp, qq - mq * mq, pq - mp * mq
    top = (2 * mp * mq + c1) * (2 * cov + c2)
    return (top / ((mp * mp + mq * mq + c1) * (vp + vq + c2))).reshape(len(a), -1).mean(1)


def _share(distances: Tensor, limit: float) -> float:
    return float((distances <= limit).double().mean())


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
