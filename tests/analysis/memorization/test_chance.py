"""The level of chance: bigram probabilities against counting, and a split whose documents differ."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.memorization import chance
from analysis.memorization.chance import Bigrams
from analysis.memorization.windows import CorpusView, Rows, spread

VOCABULARY = 20


def test_probabilities_are_those_of_plain_counts_and_sum_to_one() -> None:
    documents = [np.array([0, 1, 0, 2]), np.array([1, 0, 1])]
    model = Bigrams(documents, 4)
    # Pairs 0→1 (twice), 0→2, 1→0 (twice); none between documents. Unigrams 3, 3, 1, 0 of 7.
    expected = math.log((2 + 5 * 4 / 11) / (3 + 5))
    assert model.log_probs(np.array([0]), np.array([1]))[0] == pytest.approx(expected, rel=1e-12)
    assert model.log_probs(np.array([2]), np.array([3]))[0] == pytest.approx(math.log(1 / 11), rel=1e-12)
    for start in range(4):
        total = np.exp(model.log_probs(np.full(4, start), np.arange(4))).sum()
        assert total == pytest.approx(1.0, rel=1e-12)


def view_and_rows(noise: float) -> tuple[CorpusView, Rows, Rows]:
    """30 training and 30 validation documents of 33 tokens: t → t + 1, with more random tokens in validation."""
    rng = np.random.default_rng(0)
    rows: list[NDArray[np.int64]] = []
    for document in range(60):
        share = noise if document >= 30 else 0.2
        tokens = (np.arange(33) + rng.integers(VOCABULARY)) % VOCABULARY
        rows.append(np.where(rng.random(33) < share, rng.integers(VOCABULARY, size=33), tokens))
    tokens, bounds = np.concatenate(rows), np.arange(61) * 33
    corpus = SimpleNamespace(
        tokens=lambda: tokens, boundaries=lambda: bounds, train_documents=30, vocab_size=VOCABULARY
    )
    table = np.array(rows)
    index = np.arange(60)
    both = Rows(index, table[:, :-1], table[:, 1:], index, index)
    return cast(Any, SimpleNamespace(corpus=corpus)), both.some(slice(30)), both.some(slice(30, 60))


def test_documents_that_differ_are_separated_without_memory_and_alike_ones_are_not() -> None:
    found = chance.separation_by_chance(*view_and_rows(0.2))
    assert found is not None
    assert found.low < 0.5 < found.high
    harder = chance.separation_by_chance(*view_and_rows(0.6))
    assert harder is not None
    assert harder.auc > 0.95


def test_the_model_saw_no_row_that_it_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    view, training, validation = view_and_rows(0.2)
    fitted: list[set[int]] = []
    starts = {tuple(row): i for i, row in enumerate(training.ids.tolist())}

    class Seen(Bigrams):
        def __init__(self, documents: list[NDArray[np.int64]], vocab_size: int) -> None:
            super().__init__(documents, vocab_size)
            fitted.append({starts[tuple(document[:-1].tolist())] for document in documents})

        def log_probs(self, ids: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
            scored = {starts[tuple(row)] for row in ids.tolist() if tuple(row) in starts}
            assert not scored & fitted[-1]
            return super().log_probs(ids, labels)

    monkeypatch.setattr(chance, "Bigrams", Seen)
    assert chance.separation_by_chance(view, training, validation) is not None
    assert len(fitted) == 10


def test_rows_are_spread_over_the_whole_split() -> None:
    assert spread(5, 8).tolist() == [0, 1, 2, 3, 4]
    for length, count in ((100, 7), (101, 100), (1000, 256)):
        found = spread(length, count)
        assert len(set(found.tolist())) == count
        assert (found[0], found[-1]) == (0, length - 1)
        assert np.ptp(np.diff(found)) <= 1
