"""Rows of a corpus that a run has trained on and rows of its validation split, and what a model says to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from harness.config.schema import RunConfig
from harness.data import Batches, Corpus, Validation, canaries
from harness.data.tokenizer import Encoder
from harness.errors import InputError

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]
BATCH = 32
SEED = 20191
"""Of the choice of training rows: all runs of a group are measured on the same ones, as far as they have seen them."""


class Rows(NamedTuple):
    """Rows of one split.

    Attributes:
        indices: (rows,) in the split.
        ids, labels: (rows, seq_len) tokens, and the token that follows each.
        documents, last_documents: (rows,) of the corpus, in which the row begins and ends.
    """

    indices: Ids
    ids: Ids
    labels: Ids
    documents: Ids
    last_documents: Ids

    def some(self, chosen: Any) -> Rows:
        """Return the rows that an index selects."""
        return Rows(*(part[chosen] for part in self))


class CorpusView:
    """What is measured on a corpus: its rows, and where its canaries are.

    Args:
        corpus: with the tokens.
        config: of a run on it.

    Attributes:
        encoder: the tokenizer.
        inserted, held_out: canaries; empty without `data.canaries`.
        cut_copies: (canaries,) copies that no row holds whole: cut by the end of a row, or behind the last full row.

    Raises:
        InputError: rows that are padded, canaries that are not where they belong: in validation, or another number of
            copies in training, or a held-out one in either.
    """

    def __init__(self, corpus: Corpus, config: RunConfig, encoder: Encoder) -> None:
        self.corpus, self.seq_len, self.encoder = corpus, config.seq_len, encoder
        asked = config.data.canaries
        self.inserted = canaries.inserted(asked) if asked.count else []
        self.held_out = canaries.held_out(asked) if asked.count else []
        tokens = np.asarray(corpus.tokens())
        training, validation = tokens[: corpus.train_tokens], tokens[corpus.train_tokens :]
        places = _check_places(self, training, validation)
        lengths = [len(ids) for ids in encoder.encode_bare([c.text for c in self.inserted])]
        spans = [
            (found // self.seq_len, (found + n - 1) // self.seq_len) for found, n in zip(places, lengths)
        ]
        rows = (corpus.train_tokens - 1) // self.seq_len
        self.cut_copies = np.array(
            [cut_copies(found, n, self.seq_len, rows) for found, n in zip(places, lengths)], dtype=np.int64
        )
        self._with_canaries = np.unique(np.concatenate([*(np.concatenate(span) for span in spans), _NONE]))

    def training_rows(self, config: RunConfig, step: int, count: int) -> Rows:
        """Return rows without canaries that a run has seen within its first ``step`` steps, at most ``count``."""
        batches = Batches(self.corpus, self.seq_len, config.seed, "packed")
        eligible = np.zeros(batches.length, dtype=bool)
        eligible[batches.order.take(0, min(step * config.batch_size, batches.length))] = True
        eligible[self._with_canaries[self._with_canaries < batches.length]] = False
        order = np.random.default_rng(SEED).permutation(batches.length)
        return self._rows(0, order[eligible[order]][:count])

    def validation_rows(self, count: int) -> Rows:
        """Return rows at equal distances over the whole validation split, at most ``count``."""
        length = Validation(self.corpus, self.seq_len, "packed").length
        return self._rows(self.corpus.train_tokens, spread(length, count))

    def _rows(self, start: int, indices: Ids) -> Rows:
        """Return the rows of the split that begins at token ``start``."""
        first = start + indices * self.seq_len
        places = first[:, None] + np.arange(self.seq_len + 1)
        block = np.asarray(self.corpus.tokens())[places].astype(np.int64)
        bounds = np.asarray(self.corpus.boundaries())
        documents = [
            np.searchsorted(bounds, position, side="right") - 1 for position in (first, first + self.seq_len)
        ]
        return Rows(indices, block[:, :-1], block[:, 1:], *documents)


def cut_copies(places: Ids, length: int, seq_len: int, rows: int) -> int:
    """Return how many copies no row holds whole.

    Args:
        places: position of the first token of each copy in the training split.
        length: tokens of a copy.
        seq_len: of a row, whose last label is the first token of the next row.
        rows: full rows of the split.
    """
    first = places // seq_len
    last = (places + length - 2) // seq_len
    return int(((first != last) | (first >= rows)).sum())


def spread(length: int, count: int) -> Ids:
    """Return at most ``count`` different numbers below ``length``, at equal distances."""
    if count >= length:
        return np.arange(length, dtype=np.int64)
    return np.linspace(0, length - 1, count).round().astype(np.int64)


_NONE = np.empty(0, dtype=np.int64)


def occurrences(tokens: NDArray[Any], wanted: Ids) -> Ids:
    """Return the positions at which a sequence of tokens begins in another one."""
    found = np.flatnonzero(tokens[: max(0, len(tokens) - len(wanted) + 1)] == wanted[0])
    for offset, token in enumerate(wanted[1:].tolist(), 1):
        found = found[tokens[found + offset] == token]
    return found


def _check_places(view: CorpusView, training: NDArray[Any], validation: NDArray[Any]) -> list[Ids]:
    """Return where the inserted canaries are in training, and refuse a corpus that would make exposures wrong."""
    places = []
    for canary, ids in _encoded(view, view.inserted):
        places.append(occurrences(training, ids))
        for split, found, due in (
            ("training", len(places[-1]), canary.copies),
            ("validation", len(occurrences(validation, ids)), 0),
        ):
            if found != due:
                _refuse(
                    canary.name, f"is {found} times in the {split} split, which should hold it {due} times"
                )
    for canary, ids in _encoded(view, view.held_out):
        for split, tokens in (("training", training), ("validation", validation)):
            if len(occurrences(tokens, ids)):
                _refuse(
                    canary.name, f"is held out, and in the {split} split all the same: the null is leaked"
                )
    return places


def _encoded(view: CorpusView, chosen: Sequence[canaries.Canary]) -> Iterable[tuple[canaries.Canary, Ids]]:
    return zip(chosen, view.encoder.encode_bare([canary.text for canary in chosen]))


def _refuse(name: str, reason: str) -> None:
    raise InputError("data.canaries", name, reason, fix="another data.canaries.seed, and train again")


@torch.no_grad()
def token_log_probs(model: nn.Module, rows: Rows) -> Floats:
    """Return the log-probability of each label, nats: (rows, seq_len) float64, computed in the model's dtype (fp32)."""
    network: Any = model
    parts = []
    for first in range(0, len(rows.ids), BATCH):
        ids, labels = (torch.from_numpy(part[first : first + BATCH]) for part in (rows.ids, rows.labels))
        logits = network(ids, use_cache=False).logits
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        parts.append(-losses.view(labels.shape).double().numpy())
    return np.concatenate(parts)


@torch.no_grad()
def greedy_continuations(model: nn.Module, prefixes: Ids, length: int) -> Ids:
    """Return the greedy continuation of each prefix, (rows, length); end-of-text tokens do not end it.

    Args:
        model: a `transformers` causal language model.
        prefixes: (rows, tokens), without padding.
        length: tokens to generate.
    """
    from transformers import GenerationConfig

    network: Any = model
    settings = GenerationConfig(max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0)
    own, network.generation_config = network.generation_config, GenerationConfig()
    try:
        ids = torch.from_numpy(prefixes)
        new = network.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    finally:
        network.generation_config = own
    return new[:, prefixes.shape[1] :].numpy()
