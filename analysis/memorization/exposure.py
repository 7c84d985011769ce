"""Exposure of canaries: how far a secret ranks above secrets of the same form that were never trained on.

exposure = log2(N + 1) - log2(rank), with the rank by loss among N alternatives and the secret itself (Carlini et al.,
"The Secret Sharer", USENIX Security 2019, definition 3, estimated by sampling). Of a model that knows nothing, the rank
is uniform on 1 … N + 1, and the exposure 1.44 bits on average (log2 e, for large N). It is log2(N + 1) at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from harness.data import canaries as forms
from harness.data.canaries import Canary
from harness.data.tokenizer import Encoder

Floats = NDArray[np.float64]
ALTERNATIVES = forms.HELD_OUT - 1
"""Secrets that each canary's own is ranked among, so that the largest exposure is 7 bits."""
DRAWS = 100_000


class NotFinite(ValueError):
    """A model has losses that are no numbers, as after a divergence."""


class SecretScores(NamedTuple):
    """A model's view of the secrets of some canaries.

    Attributes:
        own: (canaries,) negative log-likelihood of each canary's secret after its name, nats, float64.
        others: (canaries, N) that of the alternatives after the same name.
        is_extracted: (canaries,) whether greedy decoding after the name gives the secret.
    """

    own: Floats
    others: Floats
    is_extracted: NDArray[np.bool_]


def exposures(own: Floats, others: Floats) -> Floats:
    """Return the exposure in bits, (canaries,) float64; ties count half.

    Args:
        own: (canaries,) losses of the secrets.
        others: (canaries, N) losses of the alternatives.

    Raises:
        NotFinite: a loss is NaN, which would rank first, or infinite.
    """
    if not (np.isfinite(own).all() and np.isfinite(others).all()):
        raise NotFinite("losses of canaries are not finite")
    below = (others < own[:, None]).sum(1) + 0.5 * (others == own[:, None]).sum(1)
    return np.log2(others.shape[1] + 1.0) - np.log2(1.0 + below)


def of_random_guesses(alternatives: int) -> tuple[float, float]:
    """Return mean and standard deviation of the exposure where the rank is uniform, in bits."""
    values = np.log2(alternatives + 1.0) - np.log2(np.arange(1, alternatives + 2, dtype=float))
    return float(values.mean()), float(values.std())


def band_of_random_guesses(alternatives: int, canaries: int) -> tuple[float, float]:
    """Return what the mean exposure of some canaries with uniform, independent ranks leaves once in a thousand times.

    The quantiles at 0.05 % and 99.95 % are of `DRAWS` simulated means. Canaries whose ranks are among the same secrets
    vary less, so that they leave it less often.
    """
    values = np.log2(alternatives + 1.0) - np.log2(np.arange(1, alternatives + 2, dtype=float))
    rng = np.random.default_rng(0)
    means = values[rng.integers(alternatives + 1, size=(DRAWS, canaries))].mean(1)
    low, high = np.quantile(means, [0.0005, 0.9995])
    return float(low), float(high)


def null_secrets(canary: Canary, held_out: Sequence[Canary]) -> list[str]:
    """Return the alternatives of a canary: 127 held-out secrets, without its own."""
    return [other.secret for other in held_out if other.secret != canary.secret][:ALTERNATIVES]


@torch.no_grad()
def secret_scores(
    model: nn.Module, encoder: Encoder, canaries: Sequence[Canary], held_out: Sequence[Canary]
) -> SecretScores:
    """Score the secrets of canaries and their alternatives.

    The sentences follow an end of a document. Logits and their log-softmax are in the dtype of the model (fp32), sums
    over tokens in fp64.

    Args:
        model: a `transformers` causal language model in evaluation mode.
        encoder: of the corpus.
        canaries: inserted or held out.
        held_out: whose secrets are the alternatives.
    """
    losses, extracted = [], []
    for canary in canaries:
        secrets = [canary.secret, *null_secrets(canary, held_out)]
        rows = encoder.encode_bare([forms.sentence(canary.name, secret) for secret in secrets])
        start = [encoder.eos_id, *encoder.prefix.tolist()]
        scores, is_greedy = _continuation_scores(model, start, rows)
        losses.append(scores)
        extracted.append(is_greedy)
    table = np.array(losses)
    return SecretScores(table[:, 0], table[:, 1:], np.array(extracted))


def _continuation_scores(model: Any, start: list[int], rows: list[NDArray[np.int64]]) -> tuple[Floats, bool]:
    """Return the losses of sentences behind their common start, and whether the first one is the greedy choice."""
    common = _common_length(rows)
    head = torch.tensor([[*start, *rows[0][:common].tolist()]])
    lengths = torch.tensor([len(row) - common for row in rows])
    tails = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for i, row in enumerate(rows):
        tails[i, : len(row) - common] = torch.from_numpy(row[common:])
    first = model(head, use_cache=True, logits_to_keep=1)
    cache = first.cache
    cache.batch_repeat_interleave(len(rows))
    # Padding on the right: no token that counts attends to it.
    rest = model(tails[:, :-1], cache=cache).logits
    logits = torch.cat([first.logits.expand(len(rows), -1, -1), rest], dim=1)
    log_probs = torch.log_softmax(logits, dim=-1).gather(2, tails[..., None])[..., 0]
    used = torch.arange(tails.shape[1]) < lengths[:, None]
    total = -(log_probs.double() * used).sum(1)
    is_greedy = bool(((logits[0].argmax(-1) == tails[0]) | ~used[0]).all())
    return total.numpy(), is_greedy


def _common_length(rows: Sequence[NDArray[np.int64]]) -> int:
    """Return how many first tokens all rows share; at least one token is left to each."""
    shortest = min(map(len, rows)) - 1
    table = np.array([row[:shortest] for row in rows])
    different = np.flatnonzero((table != table[0]).any(0))
    return int(different[0]) if len(different) else shortest


def largest(alternatives: int) -> float:
    """Return the largest exposure, in bits."""
    return math.log2(alternatives + 1)
