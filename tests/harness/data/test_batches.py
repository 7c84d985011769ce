"""Rows: packed blocks are the token stream, padded rows are what the papers' code makes of a document."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harness.data import Batches, Corpus, Validation, prepare

from .conftest import MakeConfig, documents, t5_like


@pytest.fixture
def corpus(config_for: MakeConfig) -> Corpus:
    return prepare(config_for(documents(120)))


@pytest.mark.parametrize("seq_len", [2, 7, 64])
def test_packed_blocks_reproduce_the_token_stream(corpus: Corpus, seq_len: int) -> None:
    batches = Batches(corpus, seq_len, seed=0, mode="packed")
    stream = np.fromfile(corpus.folder / "tokens.bin", dtype="<u2")[: corpus.train_tokens].astype(np.int64)
    assert batches.length == (len(stream) - 1) // seq_len
    ids, labels = batches.rows(0, batches.length)
    assert ids.dtype == labels.dtype == np.int64
    assert ids.shape == labels.shape == (batches.length, seq_len)
    assert ids.flags.c_contiguous
    assert labels.flags.c_contiguous
    blocks = np.argsort(batches.order.take(0, batches.length))
    used = batches.length * seq_len
    assert np.array_equal(ids[blocks].ravel(), stream[:used])
    # Shifted by one, across block boundaries too: every token but the first is predicted exactly once.
    assert np.array_equal(labels[blocks].ravel(), stream[1 : used + 1])
    assert batches.loss_tokens(3, 5) == 5 * seq_len


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_the_global_batch_does_not_depend_on_how_it_is_cut(corpus: Corpus, mode: str) -> None:
    batch = 24
    whole = Batches(corpus, 32, 5, mode)  # type: ignore[arg-type]
    for step in (0, 1, 7, 40):  # 40 · 24 samples are several epochs of 120 documents
        ids, labels = whole.rows(step * batch, batch)
        for world_size, micro in ((1, 8), (2, 4), (3, 2), (4, 6)):
            share = batch // world_size
            pieces = []
            for rank in range(world_size):
                mine = Batches(corpus, 32, 5, mode)  # type: ignore[arg-type]
                first = step * batch + rank * share
                pieces += [mine.rows(first + offset, micro) for offset in range(0, share, micro)]
            assert np.array_equal(np.concatenate([p[0] for p in pieces]), ids)
            assert np.array_equal(np.concatenate([p[1] for p in pieces]), labels)
            assert sum(int((p[1] != -100).sum()) for p in pieces) == whole.loss_tokens(step * batch, batch)


def test_padded_rows_in_closed_form(corpus: Corpus) -> None:
    seq_len = 120
    batches = Batches(corpus, seq_len, seed=0, mode="padded")
    assert batches.length == corpus.train_documents
    tokens, starts = corpus.tokens(), corpus.boundaries()
    ids, labels = batches.rows(0, batches.length)
    lengths = []
    for n in range(batches.length):
        document = batches.order(n)
        text = tokens[starts[document] : starts[document + 1]].tolist()[:seq_len]
        fill = seq_len - len(text)
        assert ids[n].tolist() == text + [corpus.pad_id] * fill
        assert labels[n].tolist() == text[1:] + [-100] * (fill + 1)
        assert batches.loss_tokens(n, 1) == len(text) - 1
        lengths.append(len(text))
    assert min(lengths) < seq_len == max(lengths)  # both kinds of rows occurred
    assert batches.loss_tokens(0, batches.length) == (labels != -100).sum() == sum(lengths) - len(lengths)


def test_eos_carries_loss_and_pads_do_not_though_they_are_one_token(
    config_for: MakeConfig, tmp_path: Path
) -> None:
    folder = t5_like(tmp_path / "t5")
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"pad_token": "<pad>"', '"pad_token": "</s>"'))
    corpus = prepare(config_for(documents(60), tokenizer=str(folder)))
    assert corpus.pad_id == corpus.eos_id
    ids, labels = Batches(corpus, 200, 0, "padded").rows(0, 20)
    assert ((labels == corpus.eos_id).sum(axis=1) == 1).all()
    assert (ids[:, -1] == corpus.pad_id).all()
    # Negative control: masking by value, as many scripts do, would lose the end of every document.
    assert (np.where(labels == corpus.pad_id, -100, labels) != -100).sum() == (labels != -100).sum() - 20


@pytest.mark.parametrize("seq_len", [16, 48, 300])
def test_padded_rows_are_those_of_the_papers_code(
    config_for: MakeConfig, tmp_path: Path, seq_len: int
) -> None:
    """The GaLore script's own call as the oracle: max_length, truncation, padding; pads are −100."""
    from transformers import AutoTokenizer

    texts = documents(60)
    corpus = prepare(config_for(texts, tokenizer=str(t5_like(tmp_path / "t5"))))
    oracle = AutoTokenizer.from_pretrained(corpus.tokenizer_folder)
    rows = oracle(texts, max_length=seq_len, truncation=True, padding="max_length")["input_ids"]
    expected = {tuple(row) for row in rows}
    for split in (Batches(corpus, seq_len, 0, "padded"), Validation(corpus, seq_len, "padded")):
        ids, labels = (
            split.rows(0, split.length) if isinstance(split, Batches) else split.batch(0, split.length)
        )
        assert {tuple(row) for row in ids.tolist()} <= expected
        # The model shifts: the label of position t is what the script calls label t + 1.
        script = np.where(ids == oracle.pad_token_id, -100, ids)
        assert np.array_equal(labels[:, :-1], script[:, 1:])
        assert (labels[:, -1] == -100).all()


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_validation_rows_are_fixed(config_for: MakeConfig, mode: str) -> None:
    corpus = prepare(config_for(documents(400), validation_tokens=2000))
    validation = Validation(corpus, 32, mode)  # type: ignore[arg-type]
    _, labels = validation.batch(0, validation.length)
    per_row = (labels != -100).sum(axis=1)
    assert validation.loss_tokens_available == per_row.sum() == validation.loss_tokens(0, validation.length)
    for budget in (1, 31, 32, 33, 400):
        count = validation.count(budget)
        assert per_row[:count].sum() >= budget > per_row[: count - 1].sum()
    parts = [validation.batch(first, 1)[1] for first in range(validation.length)]
    assert np.array_equal(np.concatenate(parts), labels)
    with pytest.raises(IndexError):
        validation.batch(validation.length, 1)
    with pytest.raises(ValueError, match="holds"):
        validation.count(validation.loss_tokens_available + 1)


def test_the_whole_budget_asked_for_is_there(config_for: MakeConfig) -> None:
    """eval.tokens = data.validation_tokens, a multiple of seq_len: the last label needs one token more."""
    corpus = prepare(config_for(documents(400), validation_tokens=1024))
    assert Validation(corpus, 64, "packed").count(1024) == 16


def test_a_wide_vocabulary_takes_four_bytes(corpus: Corpus, tmp_path: Path) -> None:
    wide = Corpus(tmp_path, {**corpus.manifest, "dtype": "<u4"})
    (corpus.tokens().astype("<u4") + 70_000).tofile(tmp_path / "tokens.bin")
    (tmp_path / "documents.npy").write_bytes((corpus.folder / "documents.npy").read_bytes())
    for mode in ("packed", "padded"):
        ours, theirs = (Batches(c, 20, 0, mode).rows(0, 10)[1] for c in (corpus, wide))  # type: ignore[arg-type]
        assert np.array_equal(np.where(ours == -100, -100, ours + 70_000), theirs)
