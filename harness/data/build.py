"""From a source to the files of a cached corpus: the one place where text becomes tokens.

Files of a corpus (`cache.py` adds the manifest and puts them in place):

    tokens.bin      uint16 or uint32: the training documents in the order of the source, then the validation
                    documents; each ends with eos
    documents.npy   int64 (documents + 1): where each document starts in tokens.bin, and the end
    tokenizer/      loads with transformers.AutoTokenizer
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.config.schema import DataConfig
from harness.data import canaries
from harness.data.sources import TextSource
from harness.data.split import Tokens, ValidationText, split
from harness.data.spool import ByteSpan, Say, Spool, throttle
from harness.data.tokenizer import Encoder, load, train_bpe
from harness.errors import InputError

# Text from which bytes per token are estimated where max_tokens limits how much is read.
HEAD_BYTES = 16 * 2**20
# Text tokenized in one call.
BATCH_BYTES = 8 * 2**20


def build(
    config: DataConfig,
    source: TextSource,
    folder: Path,
    shared: Path,
    say: Say,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write the files of a corpus into ``folder``; return the manifest without checksums.

    Args:
        folder: empty.
        shared: where trained tokenizers are kept for other corpora.
        say: told in one line what is going on.
        trust_remote_code: run the code that a tokenizer brings along.

    Raises:
        InputError: no text, a validation split that is more than half of the corpus, or canaries that are more
            than a quarter of it.
    """
    if config.max_tokens is not None and config.validation_tokens > config.max_tokens // 2:
        raise InputError(
            "data.validation_tokens",
            config.validation_tokens,
            f"is more than half of data.max_tokens={config.max_tokens}",
            fix=f"data.validation_tokens={max(1, config.max_tokens // 10)}",
        )
    spool = Spool(folder / "text.spool", source.documents(), throttle(say))
    try:
        say(f"reading {source.facts['name']}")
        given = None if config.tokenizer == "bpe" else load(config.tokenizer, trust_remote_code)
        _read(spool, config, given)
        if not len(spool):
            rows = spool.null_rows + spool.blank_rows
            counts = (
                f": of {rows:,} rows {spool.null_rows:,} are null and {spool.blank_rows:,} blank"
                if rows
                else ""
            )
            raise InputError(
                *_origin(config), f"holds no text{counts}", allowed="at least one document that is not blank"
            )
        encoder, validation = split(spool, config, given, shared, say)
        say("tokenizing")
        training = _training(spool, encoder, validation, config.max_tokens)
        if config.canaries.count:
            training = canaries.insert(training, config.canaries, encoder, folder / "documents.spool")
        facts = _write(folder, encoder, training, validation.tokens, throttle(say))
        # What was read, tail left out by max_tokens included or not, is known only now.
        facts["source"] = source.facts | {"documents_read": len(spool), "bytes_read": spool.bytes}
        facts["source"] |= {"null_rows": spool.null_rows, "blank_rows": spool.blank_rows}
        facts["source"]["complete"] = spool.exhausted
    finally:
        spool.close()
    if config.canaries.count:
        facts["canaries"] = canaries.manifest(config.canaries)
    facts["tokenizer"] = {
        "name": config.tokenizer,
        "sha256": encoder.save(folder / "tokenizer"),
        "vocab_size": encoder.vocab_size,
        "eos_id": encoder.eos_id,
        "pad_id": encoder.pad_id,
        "appends_eos": encoder.appends_eos,
    }
    facts["versions"] = {
        name: importlib.metadata.version(name) for name in ("tokenizers", "numpy", "datasets")
    }
    return facts


def _origin(config: DataConfig) -> tuple[str, object]:
    if config.source == "package":
        return "data.package", config.package
    return ("data.dataset", config.dataset) if config.source == "datasets" else ("data.files", config.files)


def _read(spool: Spool, config: DataConfig, given: Encoder | None) -> None:
    if config.max_tokens is None:
        return spool.fill(float("inf"))
    spool.fill(min(HEAD_BYTES, 16 * config.max_tokens))
    if not len(spool):
        return None
    documents = [list(spool.pieces(spool.span(i))) for i in range(len(spool))]
    encoder = given or train_bpe((piece for document in documents for piece in document), config.vocab_size)
    tokens = sum(len(ids) for ids in encoder.encode(documents))
    # An estimate is enough: `_training` reads on where it was too low, and stops where it was too high.
    return spool.fill(config.max_tokens * spool.bytes / max(1, tokens))


def _training(
    spool: Spool, encoder: Encoder, validation: ValidationText, max_tokens: int | None
) -> Iterator[tuple[Tokens, int]]:
    """Yield (tokens, bytes of text) of the training documents in source order, until ``max_tokens`` with
    validation is reached."""
    budget = float("inf") if max_tokens is None else max_tokens - sum(map(len, validation.tokens))
    for document, size, tokens in _encoded(spool, encoder, validation, endless=max_tokens is not None):
        if budget <= 0:
            return
        if document in validation.cut and len(tokens):
            # The head lost its continuation to the validation split; with what is left of that it ends here.
            _, rest, rest_bytes = validation.cut[document]
            tokens, size = np.concatenate([tokens[:-1], rest, tokens[-1:]]), size + rest_bytes
        if len(tokens):
            budget -= len(tokens)
            yield tokens, size


def _encoded(
    spool: Spool, encoder: Encoder, validation: ValidationText, endless: bool
) -> Iterator[tuple[int, int, Tokens]]:
    """Yield (document, bytes of text, tokens) of all text except validation; with ``endless``, continue with
    the source after the spool."""
    done = 0
    while True:
        batch: list[tuple[int, ByteSpan]] = []
        size = 0
        while done < len(spool) and size < BATCH_BYTES:
            span = _training_span(spool, validation, done)
            if span is not None:
                batch.append((done, span))
                size += span.stop - span.start
            done += 1
        tokens = encoder.encode([list(spool.pieces(span)) for _, span in batch])
        yield from ((document, span.stop - span.start, ids) for (document, span), ids in zip(batch, tokens))
        if done == len(spool):
            if spool.exhausted or not endless:
                return
            spool.fill(spool.bytes + BATCH_BYTES)


def _training_span(spool: Spool, validation: ValidationText, document: int) -> ByteSpan | None:
    if document in validation.cut:
        return validation.cut[document].head
    return None if spool.hash(document) in validation.hashes else spool.span(document)


def _write(
    folder: Path,
    encoder: Encoder,
    training: Iterable[tuple[Tokens, int]],
    validation: list[Tokens],
    tell: Say,
) -> dict[str, Any]:
    dtype = np.dtype("<u2") if encoder.vocab_size <= 2**16 else np.dtype("<u4")
    counts = np.zeros(encoder.vocab_size, dtype=np.int64)
    starts, train_bytes = [0], 0
    digest = hashlib.sha256()
    largest = max(encoder.eos_id, encoder.pad_id)
    with (folder / "tokens.bin").open("wb") as file:

        def write(tokens: Tokens) -> None:
            nonlocal largest
            data = tokens.astype(dtype).tobytes()
            file.write(data)
            digest.update(data)
            starts.append(starts[-1] + len(tokens))
            largest = max(largest, int(tokens.max()))

        for tokens, size in training:
            write(tokens)
            train_bytes += size
            tell(f"{starts[-1]:,} tokens written")
            np.add.at(counts, tokens, 1)
        train_documents, train_tokens = len(starts) - 1, starts[-1]
        for tokens in validation:
            write(tokens)
        file.flush()
        os.fsync(file.fileno())
    boundaries = np.array(starts, dtype="<i8")
    with (folder / "documents.npy").open("wb") as file:
        # Not into the file itself: of a full disk `numpy.save` says nothing that names it as one.
        content = io.BytesIO()
        np.save(content, boundaries)
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    digest.update(boundaries.tobytes() + f"|{dtype.str}|{train_documents}".encode())
    return {
        "sha256": digest.hexdigest(),
        "dtype": dtype.str,
        "train_tokens": train_tokens,
        "validation_tokens": starts[-1] - train_tokens,
        "train_documents": train_documents,
        "validation_documents": len(validation),
        "used_vocab_size": largest + 1,
        "bytes_per_token": train_bytes / max(1, train_tokens),
        "unigram_entropy": entropy(counts),
    }


def entropy(counts: NDArray[np.int64]) -> float:
    """Return the entropy −Σ p ln p of the distribution that ``counts`` estimate, in nats; 0 for no counts."""
    p = counts[counts > 0] / max(1, counts.sum())
    return float(abs((p * np.log(p)).sum()))
