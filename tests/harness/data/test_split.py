"""The validation split: never trained on, unseen by the tokenizer, the same for every seed and file order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from harness.data import Corpus, prepare
from harness.data import build as building
from harness.data import split as splitting
from harness.errors import InputError

from .conftest import MakeConfig, documents, write_jsonl


def texts_of(corpus: Corpus, validation: bool) -> list[str]:
    """The documents of a split, decoded by the tokenizer in the cache."""
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_folder / "tokenizer.json"))
    tokens, starts = corpus.tokens(), corpus.boundaries()
    numbers = range(corpus.train_documents, corpus.documents) if validation else range(corpus.train_documents)
    return [tokenizer.decode(tokens[starts[i] : starts[i + 1]].tolist()) for i in numbers]


def test_every_document_is_in_one_split_and_whole(config_for: MakeConfig) -> None:
    texts = documents(300)
    corpus = prepare(config_for(texts))
    training, validation = texts_of(corpus, False), texts_of(corpus, True)
    assert sorted(training + validation) == sorted(texts)
    assert training == [t for t in texts if t not in set(validation)]  # in the order of the source
    assert not set(training) & set(validation)
    longest = int((corpus.boundaries()[1:] - corpus.boundaries()[:-1]).max())
    assert 501 <= corpus.validation_tokens <= 501 + longest
    assert corpus.tokens()[corpus.boundaries()[1:] - 1].tolist() == [corpus.eos_id] * 300


def test_the_split_does_not_depend_on_the_order_of_the_source(config_for: MakeConfig, tmp_path: Path) -> None:
    texts = documents(300)
    one = prepare(config_for(texts))
    write_jsonl(tmp_path / "b.jsonl", texts[::-1])
    two = prepare(config_for(texts, files=[str(tmp_path / "b.jsonl")]))
    assert one.folder != two.folder
    # The tokenizer is trained on the same documents in another order, which may break ties another way; the
    # documents set aside are the same as long as their number is.
    first, second = set(texts_of(one, True)), set(texts_of(two, True))
    assert first <= second or second <= first


def test_copies_of_a_validation_document_are_not_trained_on(config_for: MakeConfig) -> None:
    texts = documents(150)
    corpus = prepare(config_for([*texts, *texts, *texts]))
    validation = texts_of(corpus, True)
    assert len(set(validation)) == len(validation) > 0
    assert not set(validation) & set(texts_of(corpus, False))
    assert len(texts_of(corpus, False)) == 3 * (150 - len(validation))


@pytest.mark.parametrize("copies", [1, 2])
def test_a_single_document_gives_its_tail(config_for: MakeConfig, copies: int) -> None:
    text = " ".join(documents(200))
    corpus = prepare(config_for([text] * copies))
    assert (corpus.train_documents, corpus.validation_documents) == (1, 1)
    (head,), (tail,) = texts_of(corpus, False), texts_of(corpus, True)
    assert head + tail == text
    assert corpus.validation_tokens == 501  # tokens wanted and one more for the last label


def test_a_few_long_documents(config_for: MakeConfig) -> None:
    texts = [" ".join(documents(80, seed=s)) for s in range(3)]
    corpus = prepare(config_for(texts))
    training, (tail,) = texts_of(corpus, False), texts_of(corpus, True)
    assert len(training) == 3
    cut = next(t for t in texts if t.endswith(tail))
    assert sorted(training) == sorted([*(t for t in texts if t != cut), cut[: -len(tail)]])
    assert corpus.validation_tokens == 501


def test_the_tokenizer_does_not_see_the_validation_text(
    config_for: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    cached = splitting.cached_bpe

    def spy(texts, again, vocab_size, cache):  # type: ignore[no-untyped-def]
        seen.extend(texts)
        return cached(iter(seen), again, vocab_size, cache)

    monkeypatch.setattr(splitting, "cached_bpe", spy)
    texts = documents(300)
    corpus = prepare(config_for(texts))
    assert not set(seen) & set(texts_of(corpus, True))
    assert len(seen) > 200
    single = prepare(config_for([" ".join(texts)]))
    assert texts_of(single, True)[0] not in seen[-1]


def test_a_reserve_that_is_too_small_grows(config_for: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = documents(300)
    expected = texts_of(prepare(config_for(texts)), True)
    # Long repetitive words: more bytes per token than the first reserve expects.
    monkeypatch.setattr(splitting, "RESERVE_BYTES_PER_TOKEN", 1)
    corpus = prepare(config_for(texts, cache_dir=f"{config_for(texts).cache_dir}-2"))
    assert corpus.validation_tokens >= 501
    assert set(texts_of(corpus, True)) & set(expected)


def test_a_sample_of_a_large_corpus_trains_the_tokenizer(
    config_for: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splitting, "BPE_TRAINING_BYTES", 20_000)
    monkeypatch.setattr(building, "BATCH_BYTES", 5_000)
    texts = documents(500)
    corpus = prepare(config_for(texts))
    assert sorted(texts_of(corpus, False) + texts_of(corpus, True)) == sorted(texts)


def test_long_documents_are_tokenized_in_pieces(
    config_for: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.data.spool.PIECE_BYTES", 64)
    texts = [*documents(80), "東京" * 200]  # no white space: cut between characters
    corpus = prepare(config_for(texts))
    assert sorted(texts_of(corpus, False) + texts_of(corpus, True)) == sorted(texts)


def test_facts_in_closed_form(config_for: MakeConfig) -> None:
    corpus = prepare(config_for(documents(300)))
    train = corpus.tokens()[: corpus.train_tokens]
    p = np.bincount(train) / len(train)
    p = p[p > 0]
    # Sums of 400 terms in fp64.
    assert corpus.unigram_entropy == pytest.approx(-(p * np.log(p)).sum(), rel=1e-12)
    size = sum(len(t.encode()) for t in texts_of(corpus, False))
    assert corpus.bytes_per_token == pytest.approx(size / corpus.train_tokens)
    assert corpus.used_vocab_size == corpus.tokens().max() + 1
    assert building.entropy(np.array([4, 0, 4])) == pytest.approx(np.log(2))
    assert building.entropy(np.array([0, 7])) == 0


def test_too_little_text_for_the_split(config_for: MakeConfig) -> None:
    with pytest.raises(InputError, match=r"data.validation_tokens: 50000 is more than half of the corpus"):
        prepare(config_for(documents(50), validation_tokens=50_000))
    with pytest.raises(InputError, match=r"is more than half of data.max_tokens=900"):
        prepare(config_for(documents(50), max_tokens=900))
    with pytest.raises(InputError, match=r"data.files: .* holds no text"):
        prepare(config_for(["", " "]))
