"""The cache of tokenized corpora: built once, by one process, whole or not at all.

A corpus lies in ``<cache>/<name>-<key>/``; the key is a hash of all that decides its tokens. Builders hold
a file lock (the system lets go of it when a process dies), write under a temporary name, flush, and rename
last, so that a folder under its final name is complete. What does not match its manifest is never used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from harness.config.errors import InputError
from harness.config.schema import DataConfig
from harness.data import tokenizer
from harness.data.build import build
from harness.data.corpus import Source, open_source
from harness.data.fingerprints import Fingerprints, file_sha256
from harness.data.messages import Say
from harness.record import atomic
from harness.record.atomic import sync_folder

FORMAT = 1
_CANNOT_WRITE = (
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
)
"""What the system says where a folder cannot be written or is full."""
_FILES = ("tokens.bin", "documents.npy", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")


class Corpus:
    """A tokenized corpus on disk, memory-mapped. Made by `prepare` or `open_corpus`.

    Attributes:
        folder: where it lies.
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
    def tokenizer_folder(self) -> Path:
        """Loads with ``transformers.AutoTokenizer.from_pretrained``."""
        return self.folder / "tokenizer"

    def tokens(self) -> NDArray[np.uint16] | NDArray[np.uint32]:
        """All tokens, training then validation: 1-D read-only memory map, uint16 or uint32."""
        return np.memmap(self.folder / "tokens.bin", dtype=np.dtype(self.manifest["dtype"]), mode="r")

    def open_tokens(self) -> BinaryIO:
        """The file of `tokens`, for whoever watches over its size."""
        return (self.folder / "tokens.bin").open("rb")

    def boundaries(self) -> NDArray[np.int64]:
        """Where each document starts in `tokens`, and the end: (documents + 1,) int64 memory map."""
        return np.load(self.folder / "documents.npy", mmap_mode="r")


def cache_root(config: DataConfig) -> Path:
    """``data.cache_dir``, else the environment variable OPTBENCH_CACHE, else ``~/.cache/optbench``."""
    chosen = config.cache_dir or os.environ.get("OPTBENCH_CACHE") or Path.home() / ".cache" / "optbench"
    return Path(chosen).expanduser().absolute()


def prepare(config: DataConfig, *, say: Say = str) -> Corpus:
    """The corpus that ``config`` describes: opened from the cache, or built into it.

    Safe to call from any number of processes at once: one builds, the others wait and open. A build that
    dies, however it dies, leaves nothing that would be taken for a corpus; the next call cleans up after it.

    Args:
        config: where the text comes from and how it becomes tokens.
        say: told in one line what takes long; not called where the cache is there.

    Raises:
        InputError: the source or tokenizer is missing, unreadable or empty, the validation split is more than
            half of the corpus, or the cache cannot be written.
    """
    root = cache_root(config)
    fingerprints = Fingerprints(root / "fingerprints")
    source = open_source(config, fingerprints)
    key = _key(config, source)
    folder = root / f"{_readable(config.name)}-{key}"
    if _damage(folder, fingerprints) is None:
        return _open(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / "locks" / f"{key}.lock", say):
            damage = _damage(folder, fingerprints)
            if damage is not None:
                if folder.exists():
                    say(f"the cached corpus {folder.name} is damaged ({damage}) and is built again")
                _build(config, source, folder, say)
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise InputError(
            "data.cache_dir", root, f"cannot be written ({error.strerror})", fix="data.cache_dir=FOLDER"
        ) from error
    return _open(folder)


def open_corpus(folder: Path | str) -> Corpus:
    """Open a corpus that `prepare` left in ``folder``. Raises InputError if it is not there, or damaged."""
    folder = Path(folder)
    damage = _damage(folder, Fingerprints(folder.parent / "fingerprints"))
    if damage is not None:
        raise InputError("data.cache_dir", folder, f"holds no complete corpus ({damage})")
    return _open(folder)


def _key(config: DataConfig, source: Source) -> str:
    parts = {
        "format": FORMAT,
        "source": source.identity,
        "tokenizer": tokenizer.identity(config.tokenizer, config.vocab_size),
        "max_tokens": config.max_tokens,
        "validation_tokens": config.validation_tokens,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _readable(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "_", name)[:40] or "corpus"


@contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("waiting for another process that prepares the same corpus")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(config: DataConfig, source: Source, folder: Path, say: Say) -> None:
    root = folder.parent
    # Under the lock, so whatever carries this key under a temporary name was left by a process that died.
    for stale in root.glob(f".building-{folder.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = root / f".building-{folder.name}-{os.getpid()}"
    temporary.mkdir()
    try:
        manifest = build(config, source, temporary, root / "tokenizers", say)
        manifest["format"] = FORMAT
        manifest["files"] = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": file_sha256(temporary / name)}
            for name in _FILES
        }
        atomic.write_json(temporary / "manifest.json", manifest)
        sync_folder(temporary)
        if folder.exists():
            folder.rename(root / f".building-{folder.name}-{os.getpid()}-damaged")
        temporary.rename(folder)
        sync_folder(root)
    finally:
        for left in root.glob(f".building-{folder.name}-*"):
            shutil.rmtree(left, ignore_errors=True)
    say(
        f"{manifest['train_tokens']:,} training tokens in {manifest['train_documents']:,} documents, "
        f"{manifest['validation_tokens']:,} for validation"
    )


def _damage(folder: Path, fingerprints: Fingerprints) -> str | None:
    """What is wrong with a cached corpus in one phrase, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}"
        for name in _FILES:
            recorded = manifest["files"][name]
            if (folder / name).stat().st_size != recorded["bytes"]:
                return f"{name} has another size"
            if fingerprints.sha256(folder / name) != recorded["sha256"]:
                return f"{name} has another checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read: {type(error).__name__}"
    return None


def _open(folder: Path) -> Corpus:
    return Corpus(folder, json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
