"""Grids of images as PNG: training images, others that explain the same weights, and reconstructions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from analysis.reconstruction import alternatives, certificate, scoring
from analysis.reconstruction.alternatives import KktPoint
from analysis.reconstruction.attack import Candidates
from analysis.reconstruction.scoring import Target, correlations, stretched

CELL = 48
GAP = 4
MARGIN = 170
MOST = 20
FONT_SIZE = 13


@dataclass(frozen=True)
class ImageGrid:
    """A grid of images.

    Attributes:
        key: its name in files.
        title, caption: of the report.
        png: bytes of the file.
    """

    key: str
    title: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class ImageRow:
    """A row of a grid: words and images (h, w) or (channels, h, w) in [0, 1]; None leaves a place empty."""

    words: str
    images: Sequence[np.ndarray | None]


def png(lines: Sequence[ImageRow]) -> bytes:
    """Draw the rows below each other with their text at the left, every image at 48 pixels without smoothing."""
    width = MARGIN + max(len(line.images) for line in lines) * (CELL + GAP)
    canvas = Image.new("RGB", (width, len(lines) * (CELL + GAP) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(FONT_SIZE)
    for r, line in enumerate(lines):
        top = GAP + r * (CELL + GAP)
        draw.multiline_text((4, top + 4), line.words, fill="black", font=font, spacing=2)
        for c, image in enumerate(line.images):
            if image is not None:
                canvas.paste(_cell(image), (MARGIN + c * (CELL + GAP), top))
    buffer = io.BytesIO()
    canvas.quantize(128).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def draw_alternatives(
    point: KktPoint, radii: Sequence[float], target: Target, label: str, seed: int
) -> ImageGrid:
    """Draw sets that the same weights cannot tell from the training set: train, +αν, −βν, merged."""
    order = _both_classes(point.labels, min(MOST, len(point.x)))
    lines = [ImageRow("training images", _shown(target, point.x[order]))]
    for radius in sorted(radii)[:2]:
        moved = alternatives.null_split(point, radius, seed)
        if moved is not None:
            there, back = moved.x.chunk(2)
            lines.append(ImageRow(f"moved by {radius:g},\northogonal to all", _shown(target, there[order])))
            lines.append(ImageRow(f"moved by {radius:g},\nthe other way", _shown(target, back[order])))
    merged = alternatives.merge(point)
    if merged is not None:
        number = certificate.groups(point.network, point.x, point.labels)
        of_group = {int(number[p]): merged.x[i] for i, p in enumerate(merged.parents)}
        points = [of_group.get(int(number[i])) for i in order]
        images = [None if x is None else stretched(target.pixels(x)) for x in points]
        lines.append(ImageRow("merged: one point\nper group", images))
    caption = (
        "Each row below the first is a part of a set that satisfies the same conditions as the training images, "
        "to rounding at an exact KKT network and up to the small part of the weights that the report names at a "
        "trained one. Every image is stretched to its own least and largest value."
    )
    title = f"Other training sets for the same weights: {label}"
    return ImageGrid(f"alternatives-{label}", title, caption, png(lines))


def draw_reconstructions(
    target: Target, candidates: Candidates, heldout: Tensor, label: str, seed: int
) -> ImageGrid:
    """Draw training images, their nearest reconstructions and the nearest of as many held-out images, best first."""
    matches = scoring.matches(target, candidates.x)
    order = matches.ncc.argsort(descending=True)[:MOST]
    lines = [
        ImageRow("training images", _shown(target, target.x[order])),
        ImageRow("nearest\nreconstruction", _shown(target, matches.image[order])),
    ]
    if len(heldout):
        generator = torch.Generator().manual_seed(seed)
        drawn = heldout[torch.randperm(len(heldout), generator=generator)[: len(candidates.x)]]
        nearest = drawn[correlations(target.x, drawn).argmax(1)]
        lines.append(ImageRow("nearest of as many\nheld-out images", _shown(target, nearest[order])))
    caption = (
        f"The best {len(order)} by correlation. K = {candidates.residual:.2g}. The third row is what images that were "
        "never trained on look like when they are matched in the same way. The private mean is added for the eye."
    )
    return ImageGrid(f"reconstructions-{label}", f"Reconstructions: {label}", caption, png(lines))


def _both_classes(labels: Tensor, count: int) -> Tensor:
    values = labels.unique(sorted=True).flip(0)
    per_class = max(1, count // len(values))
    return torch.cat([(labels == v).nonzero()[:per_class, 0] for v in values])


def _shown(target: Target, x: Tensor) -> list[np.ndarray | None]:
    return [stretched(target.pixels(row)) for row in x]


def _cell(image: np.ndarray) -> Image.Image:
    values = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    picture = Image.fromarray(values if values.ndim == 2 else np.moveaxis(values, 0, -1))
    return picture.convert("RGB").resize((CELL, CELL), Image.Resampling.NEAREST)
