"""The cache of tokenized corpora: built once, by one process, whole or not at all.

A corpus lies in ``<cache>/<name>-<key>/``; the key is a hash of all that decides its tokens. Builders hold
a file lock (the system lets go of it when a process dies), write under a temporary name, flush, and rename
last, so that a folder under its final name is complete. What does not match its manifest is never used.
"""

from __future__ import annotations

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
from filelock import Timeout
from numpy.typing import NDArray

from harness.config.errors import InputError
from harness.config.schema import DataConfig
from harness.data import manifest as manifests
from harness.data import tokenizer
from harness.data.build import build
from harness.data.corpus import Source, open_source
from harness.data.fingerprints import Fingerprints, file_sha256
from harness.data.messages import Say
from harness.files import locks
from harness.files.atomic import sync_folder


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
    def left_out(self) -> str:
        """Rows of the source that hold no text, as the end of a line of the log; empty if there are none."""
        return left_out(self.manifest["source"])

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


def left_out(source: dict[str, Any]) -> str:
    """Return the end of a line of the log for the rows without text in a manifest's ``source``."""
    null, blank = source.get("null_rows", 0), source.get("blank_rows", 0)
    return f"; rows without text left out: {null:,} null, {blank:,} blank" if null or blank else ""


def cache_root(config: DataConfig) -> Path:
    """``data.cache_dir``, else the environment variable OPTBENCH_CACHE, else ``~/.cache/optbench``."""
    chosen = config.cache_dir or os.environ.get("OPTBENCH_CACHE") or "~/.cache/optbench"
    path = os.path.expanduser(chosen)
    if path.startswith("~"):
        # A user id without an account, as in a container; or ~name of nobody.
        raise InputError("data.cache_dir", chosen, "has no home folder", fix="data.cache_dir=FOLDER")
    return Path(path).absolute()


def prepare(config: DataConfig, *, say: Say = str, trust_remote_code: bool = False) -> Corpus:
    """The corpus that ``config`` describes: opened from the cache, or built into it.

    Safe to call from any number of processes at once: one builds, the others wait and open. A build that
    dies, however it dies, leaves nothing that would be taken for a corpus; the next call cleans up after it.

    Args:
        config: where the text comes from and how it becomes tokens.
        say: told in one line what takes long; not called where the cache is there.
        trust_remote_code: run the code that a tokenizer brings along.

    Raises:
        InputError: the source or tokenizer is missing, unreadable or empty, the validation split is more than
            half of the corpus, or the cache cannot be written.
    """
    root = cache_root(config)
    fingerprints = Fingerprints(root / "fingerprints")
    source = open_source(config, fingerprints)
    key = _key(config, source)
    folder = root / f"{_readable(config.name)}-{key}"
    if manifests.damage(folder, fingerprints) is not None:
        try:
            _build_once(config, source, folder, key, fingerprints, say, trust_remote_code)
        # Reading the source ends in errors of its own, so that this is the cache.
        except OSError as error:
            raise InputError(
                "data.cache_dir",
                root,
                f"cannot be written ({error.strerror or error})",
                allowed="a folder that can be written and has room for the text and its tokens",
                fix="data.cache_dir=FOLDER",
            ) from error
    return Corpus(folder, manifests.read(folder))


def open_corpus(folder: Path | str) -> Corpus:
    """Open a corpus that `prepare` left in ``folder``. Raises InputError if it is not there, or damaged."""
    folder = Path(folder)
    damage = manifests.damage(folder, Fingerprints(folder.parent / "fingerprints"))
    if damage is not None:
        raise InputError("data.cache_dir", folder, f"holds no complete corpus ({damage})")
    return Corpus(folder, manifests.read(folder))


def tokenizer_folder(config: DataConfig, corpus_sha256: str) -> Path | None:
    """Return the tokenizer that made the corpus with this hash, or None if the cache holds none that is intact.

    Damaged corpora of the cache are skipped.
    """
    return next(manifests.tokenizer_folders(cache_root(config), corpus_sha256), None)


def _key(config: DataConfig, source: Source) -> str:
    parts = {
        "format": manifests.FORMAT,
        "source": source.identity,
        "tokenizer": tokenizer.identity(config.tokenizer, config.vocab_size),
        "max_tokens": config.max_tokens,
        "validation_tokens": config.validation_tokens,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _readable(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "_", name)[:40] or "corpus"


def _build_once(
    config: DataConfig,
    source: Source,
    folder: Path,
    key: str,
    fingerprints: Fingerprints,
    say: Say,
    trust_remote_code: bool,
) -> None:
    with _locked(folder.parent / "locks" / f"{key}.lock", say):
        damage = manifests.damage(folder, fingerprints)
        if damage is None:
            return
        if folder.exists():
            say(f"the cached corpus {folder.name} is damaged ({damage}) and is built again")
        _build(config, source, folder, say, trust_remote_code)


@contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = locks.acquire(path, key="data.cache_dir", timeout=0)
    except Timeout:
        say("waiting for another process that prepares the same corpus")
        lock = locks.acquire(path, key="data.cache_dir")
    try:
        yield
    finally:
        lock.release()


def _build(config: DataConfig, source: Source, folder: Path, say: Say, trust_remote_code: bool) -> None:
    root = folder.parent
    _remove_abandoned(root, key=folder.name.rpartition("-")[2])
    temporary = root / f".building-{folder.name}-{os.getpid()}"
    temporary.mkdir()
    try:
        manifest = build(config, source, temporary, root / "tokenizers", say, trust_remote_code)
        manifest["files"] = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": file_sha256(temporary / name)}
            for name in manifests.FILES
        }
        manifests.write(temporary, manifest)
        sync_folder(temporary)
        if folder.exists():
            folder.rename(root / f".building-{folder.name}-{os.getpid()}-damaged")
        temporary.rename(folder)
        sync_folder(root)
    finally:
        for left in root.glob(f".building-{folder.name}-*"):
            _remove(left)
    say(
        f"{manifest['train_tokens']:,} training tokens in {manifest['train_documents']:,} documents, "
        f"{manifest['validation_tokens']:,} for validation{left_out(manifest['source'])}"
    )


def _remove_abandoned(root: Path, key: str) -> None:
    """Remove what builds left that died, of this corpus and of others, whose text may fill a disk.

    Args:
        key: of the corpus whose lock this process holds; a lock that can be taken has no living builder.
    """
    for path in root.glob(".building-*"):
        match = re.fullmatch(r"\.building-.*-([0-9a-f]{24})-\d+(-damaged)?", path.name)
        if match is None:
            continue
        if match[1] == key:
            _remove(path)
            continue
        try:
            lock = locks.acquire(root / "locks" / f"{match[1]}.lock", key="data.cache_dir", timeout=0)
        except (Timeout, OSError):
            continue
        _remove(path)
        lock.release()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
