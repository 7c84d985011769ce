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
from analysis.reconstruction.alternatives import Problem
from analysis.reconstruction.attack import Candidates
from analysis.reconstruction.scoring import Target, correlations, stretched

CELL = 48
GAP = 4
MARGIN = 170
MOST = 20
FONT_SIZE = 13


@dataclass(frozen=True)
class Picture:
    """A grid of images.

    Attributes:
        key: its name in files.
        title, caption: for people.
        png: bytes of the file.
    """

    key: str
    title: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Line:
    """A row of a grid: words and images (h, w) or (channels, h, w) in [0, 1]; None leaves a place empty."""

    words: str
    images: Sequence[np.ndarray | None]


def png(lines: Sequence[Line]) -> bytes:
    """The rows below each other, words at the left, every image scaled to about 48 pixels without smoothing."""
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


def of_alternatives(
    problem: Problem, radii: Sequence[float], mean: Tensor, shape: tuple[int, ...], who: str, seed: int
) -> Picture:
    """train | +αν | −βν | merged: sets that the same weights cannot tell from the training set."""
    count = min(MOST, len(problem.x))
    order = _both_classes(problem.labels, count)
    lines = [Line("training images", _shown(problem.x[order], mean, shape))]
    for radius in sorted(radii)[:2]:
        made = alternatives.null_split(problem, radius, seed)
        if made is not None:
            n = len(problem.x)
            lines.append(
                Line(f"moved by {radius:g},\northogonal to all", _shown(made.x[:n][order], mean, shape))
            )
            lines.append(Line(f"moved by {radius:g},\nthe other way", _shown(made.x[n:][order], mean, shape)))
    merged = alternatives.merge(problem)
    if merged is not None:
        number = certificate.groups(problem.network, problem.x, problem.labels)
        of_group = {int(number[p]): merged.x[i] for i, p in enumerate(merged.parents)}
        rows = [of_group.get(int(number[i])) for i in order]
        images = [None if row is None else _pixels(row, mean, shape) for row in rows]
        lines.append(Line("merged: one point\nper group", images))
    caption = (
        "Each row below the first is a part of a set that satisfies the same conditions as the training images, "
        "to rounding at an exact KKT network and up to the small part of the weights that the report names at a "
        "trained one. Every image is stretched to its own least and largest value."
    )
    return Picture(
        f"alternatives-{who}", f"Other training sets for the same weights: {who}", caption, png(lines)
    )


def of_reconstructions(
    target: Target, found: Candidates, heldout: Tensor, heldout_labels: Tensor, who: str, seed: int
) -> Picture:
    """train | nearest reconstruction | nearest of as many held-out images, best first."""
    matches = scoring.matches(target, found.x)
    order = matches.ncc.argsort(descending=True)[:MOST]
    lines = [
        Line("training images", _shown(target.x[order], target.mean, target.shape)),
        Line("nearest\nreconstruction", _shown(matches.image[order], target.mean, target.shape)),
    ]
    if len(heldout):
        generator = torch.Generator().manual_seed(seed)
        chosen = heldout[torch.randperm(len(heldout), generator=generator)[: len(found.x)]]
        best = correlations(target.x, chosen).argmax(1)
        lines.append(
            Line(
                "nearest of as many\nheld-out images", _shown(chosen[best][order], target.mean, target.shape)
            )
        )
    caption = (
        f"The best {len(order)} by correlation. K = {found.residual:.2g}. The third row is what images that were "
        "never trained on look like when they are matched in the same way. The private mean is added for the eye."
    )
    return Picture(f"reconstructions-{who}", f"Reconstructions: {who}", caption, png(lines))


def _both_classes(labels: Tensor, count: int) -> Tensor:
    values = labels.unique(sorted=True).flip(0)
    per_class = max(1, count // len(values))
    return torch.cat([(labels == v).nonzero()[:per_class, 0] for v in values])


def _shown(x: Tensor, mean: Tensor, shape: tuple[int, ...]) -> list[np.ndarray | None]:
    return [_pixels(row, mean, shape) for row in x]


def _pixels(row: Tensor, mean: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    return stretched((row + mean).numpy().reshape(shape))


def _cell(image: np.ndarray) -> Image.Image:
    values = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    made = Image.fromarray(values if values.ndim == 2 else np.moveaxis(values, 0, -1))
    return made.convert("RGB").resize((CELL, CELL), Image.Resampling.NEAREST)
