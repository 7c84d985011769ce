"""What can be wrong between the data and the rest of the run, found before any process starts."""

from __future__ import annotations

import math

from harness.config.errors import InputError
from harness.config.schema import DataConfig
from harness.data.batches import Batches, Validation
from harness.data.cache import Corpus, prepare
from harness.data.messages import Say


def check(
    config: DataConfig,
    seq_len: int,
    batch_size: int,
    eval_tokens: int,
    model_vocab_size: int | None,
    *,
    say: Say = str,
    trust_remote_code: bool = False,
) -> Corpus:
    """Prepare the corpus and check that the run can be fed from it; returns it.

    Args:
        seq_len: tokens per row.
        batch_size: sequences per optimizer step, over all processes.
        eval_tokens: tokens per evaluation.
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
    available = Validation(corpus, seq_len, config.mode).loss_tokens_available
    if eval_tokens > available:
        # Padded rows hold less than the split does: long documents are cut, and first tokens are no labels.
        enough = math.ceil(1.1 * eval_tokens * corpus.validation_tokens / max(1, available))
        raise InputError(
            "eval.tokens",
            eval_tokens,
            f"is larger than the validation split ({available} tokens in rows of {seq_len})",
            allowed=f"1 to {available}",
            fix=f"eval.tokens={available} or data.validation_tokens={enough}",
        )
    return corpus


def _vocabulary(config: DataConfig, size: int, model_vocab_size: int) -> InputError:
    reason = f"is larger than the model's vocabulary ({model_vocab_size})"
    fix = f"model.config.vocab_size={size}"
    if config.tokenizer == "bpe":
        return InputError("data.vocab_size", size, reason, fix=f"data.vocab_size={model_vocab_size} or {fix}")
    fix += ", or with model.path the tokenizer of that model: data.tokenizer=FOLDER"
    return InputError("data.tokenizer", f"{config.tokenizer} (ids up to {size - 1} occur)", reason, fix=fix)
