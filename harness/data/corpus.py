"""A tokenized corpus on disk: its files, its manifest, and views of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from harness.data.manifest import TOKENIZER_FILES, CachedFile, Count, Kind, Sha256, Strict


class _Tokenizer(Strict):
    sha256: Sha256
    vocab_size: Count
    eos_id: Count
    pad_id: Count
    appends_eos: bool


class _Manifest(Strict):
    format: Literal[2]
    sha256: Sha256
    dtype: Literal["<u2", "<u4"]
    train_tokens: Count
    validation_tokens: Count
    train_documents: Count
    validation_documents: Count
    used_vocab_size: Count
    bytes_per_token: float
    unigram_entropy: float
    tokenizer: _Tokenizer
    files: dict[str, CachedFile]
    source: dict[str, Any]


CORPUS = Kind("corpus", 2, ("tokens.bin", "documents.npy", *TOKENIZER_FILES), _Manifest)


class Corpus:
    """A tokenized corpus on disk, memory-mapped. Made by `prepare` or `open_corpus`.

    Attributes:
        folder: its folder.
        manifest: what it is: source, licence where known, counts, versions, sizes and checksums.
        sha256: identity of its tokens and document boundaries.
        tokenizer_sha256: of ``tokenizer/tokenizer.json``.
        vocab_size: entries of the tokenizer (largest id + 1).
        used_vocab_size: largest id that occurs, eos and pad included, + 1: what a model must have at least.
        eos_id, pad_id: token ids.
        appends_eos: the tokenizer itself ends texts with eos, so truncated rows end with it too.
        train_tokens, validation_tokens: tokens of the two splits; training comes first in the file.
        train_documents, validation_documents, documents: counts; ``documents`` is their sum.
        bytes_per_token: UTF-8 bytes of training text per training token, eos included.
        unigram_entropy: nats/token of the training split's token frequencies, the loss of a model
            without context.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.sha256: str = manifest["sha256"]
        self.train_tokens: int = manifest["train_tokens"]
        self.validation_tokens: int = manifest["validation_tokens"]
        self.train_documents: int = manifest["train_documents"]
        self.validation_documents: int = manifest["validation_documents"]
        self.documents = self.train_documents + self.validation_documents
        self.bytes_per_token: float = manifest["bytes_per_token"]
        self.unigram_entropy: float = manifest["unigram_entropy"]
        self.used_vocab_size: int = manifest["used_vocab_size"]
        settings = manifest["tokenizer"]
        self.tokenizer_sha256: str = settings["sha256"]
        self.vocab_size: int = settings["vocab_size"]
        self.eos_id: int = settings["eos_id"]
        self.pad_id: int = settings["pad_id"]
        self.appends_eos: bool = settings["appends_eos"]

    @property
    def left_out(self) -> str:
        """Return a phrase on rows of the source without text, for the end of a log line; empty if there are none."""
        return left_out(self.manifest["source"])

    @property
    def tokenizer_folder(self) -> Path:
        """Return the folder that ``transformers.AutoTokenizer.from_pretrained`` loads."""
        return self.folder / "tokenizer"

    def tokens(self) -> NDArray[np.uint16] | NDArray[np.uint32]:
        """Map all tokens, training then validation: 1-D read-only memory map, uint16 or uint32."""
        return np.memmap(self.folder / "tokens.bin", dtype=np.dtype(self.manifest["dtype"]), mode="r")

    def open_tokens(self) -> BinaryIO:
        """Open the file of `tokens`, for checks of its size."""
        return (self.folder / "tokens.bin").open("rb")

    def boundaries(self) -> NDArray[np.int64]:
        """Map where each document starts in `tokens`, and the end: (documents + 1,) int64 memory map."""
        return np.load(self.folder / "documents.npy", mmap_mode="r")


def left_out(source: dict[str, Any]) -> str:
    """Return the end of a line of the log for the rows without text in a manifest's ``source``."""
    null, blank = source.get("null_rows", 0), source.get("blank_rows", 0)
    return f"; rows without text left out: {null:,} null, {blank:,} blank" if null or blank else ""
