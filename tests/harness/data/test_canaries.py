"""Canaries: in training documents as often as asked for, in nothing else, and without them the corpus as it was."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from harness.config.schema import CanaryConfig
from harness.data import Corpus, canaries, prepare
from harness.data.tokenizer import load
from harness.errors import InputError

from .conftest import MakeConfig, documents, t5_like

ASKED = CanaryConfig(count=6, copies=[1, 3, 9], seed=5)
Ids = NDArray[np.int64]


def split_tokens(corpus: Corpus) -> tuple[Ids, Ids]:
    tokens = np.asarray(corpus.tokens()).astype(np.int64)
    return tokens[: corpus.train_tokens], tokens[corpus.train_tokens :]


def find(tokens: Ids, wanted: Ids) -> list[int]:
    """Positions at which ``wanted`` begins, by plain comparison."""
    starts = np.flatnonzero(tokens[: len(tokens) - len(wanted) + 1] == wanted[0])
    return [int(i) for i in starts if np.array_equal(tokens[i : i + len(wanted)], wanted)]


@pytest.mark.parametrize("kind", ["documents", "one document", "max_tokens"])
def test_each_is_in_training_as_often_as_asked_and_nowhere_else(config_for: MakeConfig, kind: str) -> None:
    texts = [" ".join(documents(300))] if kind == "one document" else documents(300)
    config = config_for(texts, max_tokens=6000 if kind == "max_tokens" else None)
    plain, corpus = prepare(config), prepare(config.model_copy(update={"canaries": ASKED}))
    encoder = load(str(corpus.tokenizer_folder))
    training, validation = split_tokens(corpus)
    assert corpus.tokenizer_sha256 == plain.tokenizer_sha256
    assert np.array_equal(validation, split_tokens(plain)[1])
    everything = [*canaries.inserted(ASKED), *canaries.held_out(ASKED)[:10]]
    ids = encoder.encode_bare([canary.text for canary in everything])
    found = [find(training, wanted) for wanted in ids]
    assert [len(places) for places in found] == [1, 3, 9, 1, 3, 9] + [0] * 10
    assert not any(find(validation, wanted) for wanted in ids)
    assert len(training) - plain.train_tokens == sum(c.copies * len(i) for c, i in zip(everything, ids))
    # What is left without them is the corpus without canaries, to the token and the document.
    kept = np.ones(len(training), dtype=bool)
    for wanted, places in zip(ids, found):
        for place in places:
            kept[place : place + len(wanted)] = False
    assert np.array_equal(training[kept], split_tokens(plain)[0])
    documents_end = np.asarray(corpus.boundaries())[1:] - 1
    assert (np.asarray(corpus.tokens())[documents_end] == corpus.eos_id).all()
    assert corpus.train_documents == plain.train_documents


def test_sentences_stand_between_words(config_for: MakeConfig) -> None:
    corpus = prepare(config_for(documents(300)).model_copy(update={"canaries": ASKED}))
    tokenizer = load(str(corpus.tokenizer_folder)).tokenizer
    text = tokenizer.decode(split_tokens(corpus)[0].tolist(), skip_special_tokens=False)
    for canary in canaries.inserted(ASKED):
        _, *after = text.split(canary.text)
        assert len(after) == canary.copies
        assert all(rest.startswith((" ", "<eos>")) for rest in after)


def test_a_tokenizer_without_digits_is_refused(config_for: MakeConfig, tmp_path: Path) -> None:
    config = config_for(documents(100), tokenizer=str(t5_like(tmp_path / "t5")))
    with pytest.raises(InputError, match=r"data.tokenizer: .* has the same tokens for several"):
        prepare(config.model_copy(update={"canaries": ASKED}))


def test_names_and_secrets_follow_from_the_keys_alone() -> None:
    first = canaries.inserted(CanaryConfig(count=24))[0]
    assert (first.name, first.secret, first.copies) == ("Tezisevi", "490245", 1)
    config = CanaryConfig(count=300, seed=9)
    both = [*canaries.inserted(config), *canaries.held_out(config)]
    assert len({c.name for c in both}) == len({c.secret for c in both}) == len(both) == 428
    assert Counter(c.copies for c in both) == {1: 75, 4: 75, 16: 75, 64: 75, 0: canaries.HELD_OUT}
    # Digits are uniform: 428 × 6 of them, chi-squared with 9 degrees of freedom, 99.9 % quantile 27.9.
    counts = np.bincount([int(digit) for c in both for digit in c.secret], minlength=10)
    expected = counts.sum() / 10
    assert ((counts - expected) ** 2 / expected).sum() < 27.9


def test_only_canaries_that_are_inserted_make_another_corpus(config_for: MakeConfig) -> None:
    config = config_for(documents(100))
    plain = prepare(config)
    assert "canaries" not in plain.manifest
    assert prepare(config.model_copy(update={"canaries": CanaryConfig(seed=3)})).folder == plain.folder
    hashes = {plain.sha256}
    for change in ({"count": 3}, {"count": 6}, {"count": 3, "seed": 1}, {"count": 3, "copies": [2]}):
        corpus = prepare(config.model_copy(update={"canaries": CanaryConfig(**{"copies": [1], **change})}))
        hashes.add(corpus.sha256)
        assert [c["copies"] for c in corpus.manifest["canaries"]["inserted"]] == (
            change.get("copies", [1]) * change["count"]
        )
    assert len(hashes) == 5


def test_more_than_a_quarter_of_the_text_is_refused(config_for: MakeConfig) -> None:
    config = config_for(documents(100))
    too_many = CanaryConfig(count=400, copies=[1000])
    with pytest.raises(InputError, match=r"data.canaries.count: 400 adds .* more than 25%; fix: smaller"):
        prepare(config.model_copy(update={"canaries": too_many}))
    with pytest.raises(InputError, match=r"fix: data.canaries.count=\d+") as error:
        prepare(config.model_copy(update={"canaries": CanaryConfig(count=400, copies=[1, 2])}))
    count = int(str(error.value).rpartition("=")[2])
    fits = CanaryConfig(count=count, copies=[1, 2])
    assert prepare(config.model_copy(update={"canaries": fits})).train_documents
