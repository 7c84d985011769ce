"""The trained BPE, Hugging Face tokenizers, and what they leave in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from harness.data import prepare
from harness.data import tokenizer as tok
from harness.errors import InputError

from .conftest import MakeConfig, documents, t5_like


def test_bpe_is_deterministic_to_the_byte() -> None:
    texts = documents(200)
    first, second = (tok.train_bpe(texts, 400).tokenizer.to_str() for _ in range(2))
    assert first == second
    assert first != tok.train_bpe(texts[1:], 400).tokenizer.to_str()


def test_bpe_loses_nothing() -> None:
    encoder = tok.train_bpe(documents(50), 400)
    text = "Zürich 東京 \x00 \t\r\n  two  spaces <eos> <pad> 🙂"
    ids = encoder.encode([[text]])[0].tolist()
    assert ids[-1] == encoder.eos_id == 0
    assert encoder.pad_id == 1
    # The words "<eos>" and "<pad>" in a text are not the special tokens.
    assert not {encoder.eos_id, encoder.pad_id} & set(ids[:-1])
    assert encoder.tokenizer.decode(ids[:-1], skip_special_tokens=False) == text


def test_pieces_of_a_document_are_joined() -> None:
    encoder = tok.train_bpe(documents(50), 400)
    whole, joined = encoder.encode([["one two three"], ["one two", " three"]])
    assert whole.tolist() == joined.tolist()


def test_bpe_is_trained_once_for_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = documents(50)
    trained = []
    train = tok.train_bpe
    monkeypatch.setattr(tok, "train_bpe", lambda t, v: trained.append(v) or train(t, v))

    def get(texts: list[str], size: int) -> str:
        return tok.cached_bpe(iter(texts), iter(texts), size, tmp_path).tokenizer.to_str()

    first = get(texts, 400)
    assert get(texts, 400) == first
    assert trained == [400]
    get(texts, 300)
    get(texts[1:], 400)
    assert trained == [400, 300, 400]
    for path in tmp_path.iterdir():
        path.write_text(path.read_text().replace("merges", "mergez", 1))
    assert get(texts, 400) == first  # a damaged file is not used
    assert trained == [400, 300, 400, 400]


def test_auto_tokenizer_loads_the_cached_folder(config_for: MakeConfig) -> None:
    from transformers import AutoTokenizer

    corpus = prepare(config_for(documents(60)))
    loaded = AutoTokenizer.from_pretrained(corpus.tokenizer_folder)
    ids = corpus.tokens()[: corpus.boundaries()[1]].tolist()
    text = loaded.decode(ids[:-1])
    assert text == documents(60)[0]
    assert loaded(text)["input_ids"] == ids[:-1]
    assert (loaded.eos_token_id, loaded.pad_token_id) == (corpus.eos_id, corpus.pad_id)


def test_hugging_face_folder_and_file(tmp_path: Path) -> None:
    folder = t5_like(tmp_path / "t5")
    for name in (folder, folder / "tokenizer.json"):
        encoder = tok.load(str(name))
        assert (encoder.eos_id, encoder.pad_id, encoder.appends_eos, encoder.prefix_length) == (1, 0, True, 0)
        assert encoder.encode([["of no words"]])[0][-1] == 1


def test_special_tokens_before_and_after_a_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "[UNK]": 2, "a": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = tok.load(str(tmp_path))
    assert encoder.encode([["a a", " a"], [" "]])[0].tolist() == [0, 3, 3, 3, 1]
    assert encoder.encode([[" "]])[0].tolist() == []
    assert (encoder.prefix_length, encoder.appends_eos, encoder.pad_id) == (1, False, 1)


def test_bad_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.tokenizer: ./nowhere does not exist"):
        tok.identity("./nowhere", 300)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="has no token that ends a document"):
        tok.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="could not be loaded"):
        tok.load(str(tmp_path))
    with pytest.raises(InputError) as error:
        tok.load("t5-base")
    assert "data.tokenizer=FOLDER" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_local_tokenizer_counts_by_content(tmp_path: Path) -> None:
    folder = t5_like(tmp_path / "t5")
    before = tok.identity(str(folder), 300)
    (folder / "model.safetensors").write_bytes(b"weights are no part of a tokenizer")
    assert tok.identity(str(folder), 300) == before
    (folder / "tokenizer_config.json").write_text("{}")
    assert tok.identity(str(folder), 300) != before
