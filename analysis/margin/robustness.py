"""Robustness of a language model's predictions on given tokens: signed margins of its head, and embedding radii.

With a frozen feature h the prediction of a token is a linear classifier. Its signed margin for the label y is

    min over c ≠ y of [(w_y - w_c)·h + b_y - b_c] / ‖w_y - w_c‖

in the norm dual to that of the perturbation. Positive: the exact distance of h to the nearest other decision.
Negative: h would have to move at least so far for the label to win.

A perturbation of the input embeddings gives an upper bound alone: attention is not globally Lipschitz, so nothing here
certifies the body. Radii are those of the model's own prediction, right or wrong, so that every model has one on
the same tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from analysis.margin.input_margins import Effort, attack
from harness.model.loss import IGNORED

RIVALS = 4
"""Other tokens that an embedding attack aims at: the likeliest ones. A change to any of them is a change."""
EFFORT = Effort(deepfool_steps=6, rounds=3, pgd_steps=8, segment=14)
"""Of the embedding attack: each of its evaluations is a pass through the model."""
AT_ONCE = 256
"""Tokens whose distances to all classes are computed at once."""
RESAMPLED = 2000
"""Bootstrap samples of an interval."""


class MedianInterval(NamedTuple):
    """A median and its 95 % interval; NaN ends for fewer than two windows."""

    median: float
    low: float
    high: float


def median_over_windows(values: NDArray[np.floating]) -> MedianInterval:
    """Return the median over (windows, tokens), NaN left out, and its bootstrap interval over windows."""
    median = float(np.nanmedian(values))
    if len(values) < 2:
        return MedianInterval(median, np.nan, np.nan)
    rng = np.random.default_rng(0)
    medians = [np.nanmedian(values[rng.integers(0, len(values), len(values))]) for _ in range(RESAMPLED)]
    low, high = np.quantile(medians, (0.025, 0.975))
    return MedianInterval(median, float(low), float(high))


def windows(ids: Tensor, length: int, most: int) -> Tensor:
    """Return up to `most` windows of consecutive tokens, (n, length), cut from the rows (r, s) in their order."""
    per_row = ids.shape[1] // length
    return ids[:, : per_row * length].reshape(-1, length)[:most]


@torch.no_grad()
def head_margins(model: nn.Module, ids: Tensor, labels: Tensor, norm: str = "l2") -> Tensor:
    """Return the signed margin of the head at every token, relative to the size of the token's feature.

    Args:
        model: a causal language model of transformers, in evaluation mode; any floating dtype.
        ids: (n, s) input tokens.
        labels: (n, s) the token that follows each; -100: none.
        norm: of the perturbation of the feature: "l2" or "linf".

    Returns:
        (n, s) fp64, NaN where there is no label. Margins and the feature's norm are computed in fp64 from the model's
        features.
    """
    module: Any = model
    head = module.get_output_embeddings()
    features = module.base_model(input_ids=ids).last_hidden_state
    used = labels != IGNORED
    h, bias = features[used].double(), getattr(head, "bias", None)
    margins = signed_margins(h, labels[used], head.weight, bias, norm)
    size = torch.linalg.vector_norm(h, ord=2.0 if norm == "l2" else torch.inf, dim=1)
    out = torch.full(labels.shape, torch.nan, dtype=torch.float64, device=h.device)
    out[used] = margins / size
    return out


@torch.no_grad()
def signed_margins(h: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, norm: str) -> Tensor:
    """Return the signed margin of each feature, (n,) fp64, in units of h.

    Args:
        h: (n, d).
        labels: (n,).
        weight: (c, d) of the head.
        bias: (c,), or None.
        norm: of the perturbation of h: "l2" divides by the l2 norm of w_y - w_c, "linf" by the l1 norm.
    """
    weight, h = weight.double(), h.double()
    # Without the expansion of the square, which cancels for classes of nearly equal weights.
    mode = "donot_use_mm_for_euclid_dist"
    margins = []
    for some, own in zip(h.split(AT_ONCE), labels.split(AT_ONCE)):
        scores = some @ weight.mT + (0.0 if bias is None else bias.double())
        apart = torch.cdist(weight[own], weight, p=2.0 if norm == "l2" else 1.0, compute_mode=mode)
        difference = scores.gather(1, own[:, None]) - scores
        # A class with the label's own weights differs by the bias alone, at any distance.
        unreachable = torch.where(difference >= 0.0, torch.inf, -torch.inf)
        distance = torch.where(apart > 0.0, difference / apart.clamp_min(1e-300), unreachable)
        margins.append(distance.scatter(1, own[:, None], torch.inf).amin(1))
    return torch.cat(margins) if margins else h.new_zeros(0)


def embedding_radii(
    model: nn.Module, ids: Tensor, norm: str = "l2", *, seed: int = 0, effort: Effort = EFFORT
) -> Tensor:
    """Return upper bounds of the radius at which the prediction after each window changes, (n,).

    The radius is the norm of the smallest perturbation that was found of all the embeddings of a window together, over
    the median norm of the rows of the embedding table.

    Args:
        model: a causal language model of transformers, in evaluation mode; any floating dtype.
        ids: (n, s) windows of tokens, attacked side by side, each alone.
        norm: "l2" or "linf" of the perturbation.
        seed: of the attack's random starts.
        effort: how hard the attack searches.
    """
    module: Any = model
    table = module.get_input_embeddings().weight.detach()
    inputs = table[ids]

    def logits(embeddings: Tensor) -> Tensor:
        # Only the scores at the last place are needed; the head on all of them would be most of the work.
        hidden = module.base_model(inputs_embeds=embeddings).last_hidden_state
        return module.get_output_embeddings()(hidden[:, -1])

    with torch.no_grad():
        scores = logits(inputs)
        candidates = scores.topk(min(RIVALS + 1, scores.shape[1]), dim=1).indices
    # The first candidate is the prediction.
    target = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    found = attack(
        lambda embeddings: logits(embeddings).gather(1, candidates),
        inputs,
        target,
        norm,
        effort=effort,
        seed=seed,
    )
    size = torch.linalg.vector_norm(table, ord=2.0 if norm == "l2" else torch.inf, dim=1).median()
    return found / size
