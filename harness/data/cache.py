"""The cache of tokenized corpora: each is built once, by one process, completely or not at all.

A corpus is in ``<cache>/<name>-<key>/``; the key is a hash of all that decides its tokens. Builders hold a file lock
(the system releases it when a process dies), write under a temporary name, flush, and rename last, so a folder under
its final name is complete. A corpus that does not match its manifest is never used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

from harness.config.schema import DataConfig
from harness.data import tokenizer
from harness.data.batches import Batches, Mode, Validation
from harness.data.build import build
from harness.data.corpus import (
    FILES,
    FORMAT,
    Corpus,
    damage,
    left_out,
    read_manifest,
    tokenizer_folders,
    write_manifest,
)
from harness.data.sources import TextSource, open_source
from harness.data.spool import Say
from harness.errors import InputError
from harness.files import locks
from harness.files.atomic import sync_folder
from harness.files.cache import Fingerprints, cache_root, file_sha256


def check(
    config: DataConfig,
    seq_len: int,
    batch_size: int,
    eval_tokens: int | None,
    model_vocab_size: int | None,
    *,
    say: Say = str,
    trust_remote_code: bool = False,
) -> Corpus:
    """Prepare the corpus, check that it suffices for the run, and return it.

    Args:
        seq_len: tokens per row.
        batch_size: sequences per optimizer step, over all processes.
        eval_tokens: tokens per evaluation; None: not known yet, `check_evaluation` is called later.
        model_vocab_size: entries of the model's embedding; None: it will be made to fit.
        say: told in one line what takes long.
        trust_remote_code: run the code that a tokenizer brings along.

    Raises:
        InputError: a missing file, package, data set or tokenizer; no text; a validation split that is more
            than half of the corpus; a batch larger than an epoch; seq_len longer than a split; eval.tokens
            larger than the validation split; a vocabulary larger than the model's.
    """
    # What the configuration alone shows is said before minutes of tokenizing.
    if config.tokenizer == "bpe" and model_vocab_size is not None and config.vocab_size > model_vocab_size:
        raise _vocabulary(config, config.vocab_size, model_vocab_size)
    corpus = prepare(config, say=say, trust_remote_code=trust_remote_code)
    if model_vocab_size is not None and corpus.used_vocab_size > model_vocab_size:
        raise _vocabulary(config, corpus.used_vocab_size, model_vocab_size)
    if not corpus.train_documents:
        raise InputError("data.max_tokens", config.max_tokens, "leaves no training document")
    if config.mode == "packed":
        for key, tokens in (("train", corpus.train_tokens), ("validation", corpus.validation_tokens)):
            if tokens <= seq_len:
                raise InputError(
                    "seq_len",
                    seq_len,
                    f"is longer than the {key} split ({tokens} tokens)",
                    allowed=f"2 to {min(corpus.train_tokens, corpus.validation_tokens) - 1}",
                )
    samples = Batches(corpus, seq_len, 0, config.mode).length
    if batch_size > samples:
        raise InputError(
            "batch_size",
            batch_size,
            f"is larger than the data ({samples} sequences of {seq_len} tokens)",
            allowed=f"1 to {samples}",
            fix=f"batch_size={samples}",
        )
    if eval_tokens is not None:
        check_evaluation(corpus, seq_len, config.mode, eval_tokens)
    return corpus


def check_evaluation(corpus: Corpus, seq_len: int, mode: Mode, eval_tokens: int) -> None:
    """Refuse an evaluation on more tokens than the validation split has in rows of ``seq_len``.

    Raises:
        InputError: eval.tokens is larger.
    """
    available = Validation(corpus, seq_len, mode).loss_tokens_available
    if eval_tokens > available:
        # Padded rows hold less than the split does: long documents are cut, and first tokens are not labels.
        enough = math.ceil(1.1 * eval_tokens * corpus.validation_tokens / max(1, available))
        raise InputError(
            "eval.tokens",
            eval_tokens,
            f"is larger than the validation split ({available} tokens in rows of {seq_len})",
            allowed=f"1 to {available}",
            fix=f"eval.tokens={available} or data.validation_tokens={enough}",
        )


def _vocabulary(config: DataConfig, size: int, model_vocab_size: int) -> InputError:
    reason = f"is larger than the model's vocabulary ({model_vocab_size})"
    fix = f"model.config.vocab_size={size}"
    if config.tokenizer == "bpe":
        return InputError("data.vocab_size", size, reason, fix=f"data.vocab_size={model_vocab_size} or {fix}")
    fix += ", or with model.path the tokenizer of that model: data.tokenizer=FOLDER"
    return InputError("data.tokenizer", f"{config.tokenizer} (ids up to {size - 1} occur)", reason, fix=fix)


def prepare(config: DataConfig, *, say: Say = str, trust_remote_code: bool = False) -> Corpus:
    """Return the corpus that ``config`` describes: opened from the cache, or built into it.

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
    root = cache_root(config.cache_dir)
    fingerprints = Fingerprints(root)
    source = open_source(config, fingerprints)
    key = _key(config, source)
    folder = root / f"{_readable(config.name)}-{key}"
    if damage(folder, fingerprints) is not None:
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
    return Corpus(folder, read_manifest(folder))


def open_corpus(folder: Path | str) -> Corpus:
    """Open a corpus that `prepare` left in ``folder``. Raises InputError if it is not there, or damaged."""
    folder = Path(folder)
    problem = damage(folder, Fingerprints(folder.parent))
    if problem is not None:
        raise InputError("data.cache_dir", folder, f"holds no complete corpus ({problem})")
    return Corpus(folder, read_manifest(folder))


def tokenizer_folder(config: DataConfig, corpus_sha256: str) -> Path | None:
    """Return the tokenizer that made the corpus with this hash, or None if the cache holds none that is intact.

    Damaged corpora of the cache are skipped.
    """
    return next(tokenizer_folders(cache_root(config.cache_dir), corpus_sha256), None)


def _key(config: DataConfig, source: TextSource) -> str:
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


def _build_once(
    config: DataConfig,
    source: TextSource,
    folder: Path,
    key: str,
    fingerprints: Fingerprints,
    say: Say,
    trust_remote_code: bool,
) -> None:
    with _locked(folder.parent / "locks" / f"{key}.lock", say):
        problem = damage(folder, fingerprints)
        if problem is None:
            return
        if folder.exists():
            say(f"the cached corpus {folder.name} is damaged ({problem}) and is built again")
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


def _build(config: DataConfig, source: TextSource, folder: Path, say: Say, trust_remote_code: bool) -> None:
    root = folder.parent
    _remove_abandoned(root, key=folder.name.rpartition("-")[2])
    temporary = root / f".building-{folder.name}-{os.getpid()}"
    temporary.mkdir()
    try:
        manifest = build(config, source, temporary, root / "tokenizers", say, trust_remote_code)
        manifest["files"] = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": file_sha256(temporary / name)}
            for name in FILES
        }
        write_manifest(temporary, manifest)
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
