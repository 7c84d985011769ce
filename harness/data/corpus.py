"""A tokenized corpus on disk: its files, and its manifest, read with the suspicion that a shared folder deserves."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.files import atomic
from harness.files.cache import Fingerprints

FORMAT = 2
NAME = "manifest.json"
FILES = ("tokens.bin", "documents.npy", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")
_MAX_BYTES = 64 * 2**20
_TOKENIZER_FILES = FILES[2:]

_Count = Annotated[int, Field(ge=0)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Tokenizer(_Strict):
    sha256: _Sha256
    vocab_size: _Count
    eos_id: _Count
    pad_id: _Count
    appends_eos: bool


class _File(_Strict):
    bytes: _Count
    sha256: _Sha256


class _Manifest(_Strict):
    """What a corpus is read by; all else in the manifest is for people."""

    format: Literal[2]
    sha256: _Sha256
    dtype: Literal["<u2", "<u4"]
    train_tokens: _Count
    validation_tokens: _Count
    train_documents: _Count
    validation_documents: _Count
    used_vocab_size: _Count
    bytes_per_token: float
    unigram_entropy: float
    tokenizer: _Tokenizer
    files: dict[str, _File]
    source: dict[str, Any]


class DamagedManifest(Exception):
    """A manifest that is missing or not what was written; says what is wrong in one phrase."""


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write ``manifest`` with its format and a checksum of its own, once all files of the corpus are written."""
    manifest = {**manifest, "format": FORMAT}
    atomic.write_json(folder / NAME, {**manifest, "manifest_sha256": _checksum(manifest)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of the corpus in ``folder``, checked.

    Raises:
        DamagedManifest: it is missing, cannot be read, or is not what `write_manifest` wrote.
    """
    manifest = _load(folder / NAME)
    if manifest.get("format") != FORMAT:
        raise DamagedManifest(f"format {str(manifest.get('format'))[:40]}")
    if manifest.get("manifest_sha256") != _checksum(manifest):
        raise DamagedManifest(f"{NAME} has another checksum")
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DamagedManifest(f"{NAME} cannot be read: {place}: {first['msg']}") from error
    return manifest


def damage(folder: Path, fingerprints: Fingerprints) -> str | None:
    """Return what is wrong with the cached corpus in ``folder`` in one phrase, or None."""
    try:
        return _files_damage(folder, read_manifest(folder)["files"], FILES, fingerprints)
    except DamagedManifest as error:
        return str(error)


def tokenizer_folders(root: Path, corpus_sha256: str) -> Iterator[Path]:
    """Yield the intact tokenizer folders of the corpora below ``root`` that have this hash, in any format.

    Corpora whose manifest or tokenizer is damaged are skipped, because the cache may be shared with other users.
    """
    try:
        folders = sorted(path.parent for path in root.glob(f"*/{NAME}"))
    except OSError:
        return
    for folder in folders:
        try:
            manifest = _load(folder / NAME)
            found = manifest.get("sha256") == corpus_sha256
            if found and not _files_damage(folder, manifest["files"], _TOKENIZER_FILES, Fingerprints(root)):
                yield folder / "tokenizer"
        except (DamagedManifest, KeyError, TypeError):
            continue


def _load(path: Path) -> dict[str, Any]:
    try:
        # Not blocking, in case it is a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
                raise DamagedManifest(f"{NAME} is not a file of at most {_MAX_BYTES // 2**20} MiB")
            manifest = json.loads(file.read())
    except FileNotFoundError as error:
        raise DamagedManifest(f"{NAME} is missing") from error
    # JSON's parser raises RecursionError for lists in lists in lists.
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedManifest(f"{NAME} cannot be read: {type(error).__name__}") from error
    if not isinstance(manifest, dict):
        raise DamagedManifest(f"{NAME} cannot be read: it is not an object")
    return manifest


def _checksum(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files_damage(
    folder: Path, recorded: Mapping[str, Any], names: tuple[str, ...], fingerprints: Fingerprints
) -> str | None:
    for name in names:
        try:
            if name not in recorded:
                return f"{name} is not listed"
            status = (folder / name).stat()
            if not stat.S_ISREG(status.st_mode):
                return f"{name} is not a file"
            if status.st_size != recorded[name]["bytes"]:
                return f"{name} has another size"
            if fingerprints.sha256(folder / name) != recorded[name]["sha256"]:
                return f"{name} has another checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


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
