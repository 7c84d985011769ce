"""What a score separates without any memory: the membership AUC of a bigram model that saw neither group of rows.

Training and validation rows are of different documents, which may differ in how easy they are. A score of a model that
was trained on neither shows that difference; an AUC of a trained model is to be read against it, not against 0.5.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from analysis.memorization.membership import Separation, separation
from analysis.memorization.windows import CorpusView, Rows

Floats = NDArray[np.float64]
FOLDS = 10
MOST_TOKENS = 500_000
"""Of the training documents that a bigram model is fitted on."""
PRIOR = 5.0
"""Weight of the unigram distribution in that of a token's successors, as a number of observations (Dirichlet)."""
SEED = 20192


class Bigrams:
    """Counts of pairs of tokens, smoothed by unigrams (add-one).

    Args:
        documents: token ids.
        vocab_size: number of tokens.
    """

    def __init__(self, documents: list[NDArray[np.int64]], vocab_size: int) -> None:
        self._size = vocab_size
        tokens = np.concatenate(documents)
        counts = np.bincount(tokens, minlength=vocab_size)
        self._unigram = (counts + 1.0) / (len(tokens) + vocab_size)
        pairs = np.concatenate([document[:-1] * vocab_size + document[1:] for document in documents])
        self._pairs, self._counts = np.unique(pairs, return_counts=True)
        self._starts = np.bincount(pairs // vocab_size, minlength=vocab_size)

    def log_probs(self, ids: NDArray[np.int64], labels: NDArray[np.int64]) -> Floats:
        """Return the log-probability of each label after the token before it, nats, float64."""
        wanted = ids * self._size + labels
        at = np.minimum(np.searchsorted(self._pairs, wanted), len(self._pairs) - 1)
        seen = np.where(self._pairs[at] == wanted, self._counts[at], 0)
        return np.log((seen + PRIOR * self._unigram[labels]) / (self._starts[ids] + PRIOR))


def separation_by_chance(view: CorpusView, training: Rows, validation: Rows) -> Separation | None:
    """Return how well the loss of a bigram model that saw neither group separates the rows.

    Documents are split into `FOLDS` at random. Rows of both splits are scored by the model of their document's fold,
    fitted on training documents of the other folds, without those that one of its rows reaches into.

    Returns:
        None where no other documents are left to fit on.
    """
    bounds = np.asarray(view.corpus.boundaries())
    tokens = np.asarray(view.corpus.tokens())
    rng = np.random.default_rng(SEED)
    folds = rng.permutation(len(bounds) - 1) % FOLDS
    order = rng.permutation(view.corpus.train_documents)
    scores = [np.empty(len(rows.ids)) for rows in (training, validation)]
    for fold in range(FOLDS):
        chosen = [folds[rows.documents] == fold for rows in (training, validation)]
        if not any(part.any() for part in chosen):
            continue
        touched = np.zeros(len(bounds), dtype=bool)
        for row in np.flatnonzero(chosen[0]):
            touched[training.documents[row] : training.last_documents[row] + 1] = True
        others = order[(folds[order] != fold) & ~touched[order]]
        sizes = np.cumsum(bounds[others + 1] - bounds[others])
        others = others[: int(np.searchsorted(sizes, MOST_TOKENS)) + 1]
        documents = [tokens[bounds[i] : bounds[i + 1]].astype(np.int64) for i in others]
        if sum(len(document) > 1 for document in documents) == 0:
            return None
        model = Bigrams(documents, view.corpus.vocab_size)
        for part, rows, kept in zip(scores, (training, validation), chosen):
            part[kept] = model.log_probs(rows.ids[kept], rows.labels[kept]).mean(1)
    members, others = scores
    return separation(members, others, training.documents, validation.documents)
