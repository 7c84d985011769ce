"""The cache of tokenized corpora, and what a run asks of its corpus."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from harness.config.schema import DataConfig
from harness.data import tokenizer
from harness.data.batches import Batches, Mode, Validation
from harness.data.build import build
from harness.data.cached_folder import open_or_build
from harness.data.corpus import CORPUS, Corpus, left_out
from harness.data.manifest import damage, read_manifest, tokenizer_folders
from harness.data.sources import open_source
from harness.data.spool import Say
from harness.errors import InputError
from harness.files.cache import Fingerprints, cache_root


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
    check_vocabulary(config, None, model_vocab_size)
    corpus = prepare(config, say=say, trust_remote_code=trust_remote_code)
    check_vocabulary(config, corpus.used_vocab_size, model_vocab_size)
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


def check_vocabulary(config: DataConfig, used: int | None, model_vocab_size: int | None) -> None:
    """Raise InputError if the model's vocabulary does not cover the ids that occur.

    Args:
        used: largest id that occurs + 1; None: the data are not tokenized yet, and the configuration alone is checked.
        model_vocab_size: entries of the model's embedding; None: it will be made to fit.
    """
    trained = config.vocab_size if config.tokenizer == "bpe" else None
    size = trained if used is None else used
    if size is not None and model_vocab_size is not None and size > model_vocab_size:
        raise _vocabulary(config, size, model_vocab_size)


def _vocabulary(config: DataConfig, size: int, model_vocab_size: int) -> InputError:
    reason = f"is larger than the model's vocabulary ({model_vocab_size})"
    fix = f"model.config.vocab_size={size}"
    if config.tokenizer == "bpe":
        return InputError("data.vocab_size", size, reason, fix=f"data.vocab_size={model_vocab_size} or {fix}")
    fix += ", or with model.path the tokenizer of that model: data.tokenizer=FOLDER"
    return InputError("data.tokenizer", f"{config.tokenizer} (ids up to {size - 1} occur)", reason, fix=fix)


def prepare(config: DataConfig, *, say: Say = str, trust_remote_code: bool = False) -> Corpus:
    """Return the corpus that ``config`` describes: opened from the cache, or built into it.

    Safe to call from any number of processes at once, as `cached_folder.open_or_build`.

    Args:
        config: where the text comes from and how it becomes tokens.
        say: told in one line what takes long; not called where the cache is there.
        trust_remote_code: run the code that a tokenizer brings along.

    Raises:
        InputError: the source or tokenizer is missing, unreadable or empty, the validation split is more than
            half of the corpus, or the cache cannot be written.
    """
    root = cache_root(config.cache_dir)
    source = open_source(config, Fingerprints(root))
    parts = {
        "source": source.identity,
        "tokenizer": tokenizer.identity(config.tokenizer, config.vocab_size),
        "max_tokens": config.max_tokens,
        "validation_tokens": config.validation_tokens,
    }
    if config.canaries.count:
        # Only then, so that every other corpus keeps its folder.
        parts["canaries"] = config.canaries.model_dump()

    def build_corpus(folder: Path) -> dict[str, Any]:
        return build(config, source, folder, root / "tokenizers", say, trust_remote_code)

    return Corpus(*open_or_build(root, config.name, parts, CORPUS, build_corpus, _summary, say))


def open_corpus(folder: Path | str) -> Corpus:
    """Open a corpus that `prepare` left in ``folder``. Raises InputError if it is not there, or damaged."""
    folder = Path(folder)
    problem = damage(folder, CORPUS, Fingerprints(folder.parent))
    if problem is not None:
        raise InputError("data.cache_dir", folder, f"holds no complete corpus ({problem})")
    return Corpus(folder, read_manifest(folder, CORPUS))


def tokenizer_folder(config: DataConfig, corpus_sha256: str) -> Path | None:
    """Return the tokenizer that made what is cached with this hash, or None if the cache holds none that is intact.

    Damaged folders of the cache are skipped.
    """
    return next(tokenizer_folders(cache_root(config.cache_dir), corpus_sha256), None)


def _summary(manifest: dict[str, Any]) -> str:
    return (
        f"{manifest['train_tokens']:,} training tokens in {manifest['train_documents']:,} documents, "
        f"{manifest['validation_tokens']:,} for validation{left_out(manifest['source'])}"
    )
