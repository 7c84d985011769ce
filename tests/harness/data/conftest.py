"""Corpora small enough to be tokenized in a test, and no network."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from harness.config.schema import DataConfig

MakeConfig = Callable[..., DataConfig]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("the network is blocked in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter: pytest closes its own to all but one, at each start of another pytest."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def documents(count: int, words: int = 40, seed: int = 0) -> list[str]:
    """Distinct documents of random words; the length varies by a factor of four."""
    rng = np.random.default_rng(seed)
    vocabulary = ["".join(rng.choice(list("abcdefghij"), size=rng.integers(2, 8))) for _ in range(300)]
    sizes = rng.integers(words // 2, 2 * words, size=count)
    return [f"{i}: " + " ".join(rng.choice(vocabulary, size=n)) + "." for i, n in enumerate(sizes)]


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")


def t5_like(folder: Path) -> Path:
    """A unigram tokenizer that ends each text with </s>, as T5's does; the texts' own words as pieces."""
    words = sorted({word for text in documents(60) for word in text.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *(("▁" + w, -5.0) for w in words)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def config_for(tmp_path: Path) -> MakeConfig:
    """config_for(texts, **fields): JSON lines of ``texts``, with a cache of its own."""

    def make(texts: list[str], **fields: Any) -> DataConfig:
        path = tmp_path / "texts.jsonl"
        write_jsonl(path, texts)
        given: dict[str, Any] = {
            "name": "test",
            "source": "jsonl",
            "files": [str(path)],
            "vocab_size": 400,
            "validation_tokens": 500,
            "cache_dir": str(tmp_path / "cache"),
        }
        return DataConfig(**{**given, **fields})

    return make
