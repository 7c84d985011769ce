"""Which text is validation, and the tokenizer that must not see it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from harness.config.schema import DataConfig
from harness.data.spool import ByteSpan, Say, Spool
from harness.data.tokenizer import Encoder, cached_bpe
from harness.errors import InputError

Tokens = NDArray[np.int64]

# Text held for validation while the number of tokens in it is not known yet, in bytes a token wanted.
RESERVE_BYTES_PER_TOKEN = 8
# More text than this does not change the merges that matter; it would only take longer (some 8 MB/s).
BPE_TRAINING_BYTES = 512 * 2**20


class DocumentCut(NamedTuple):
    """A training document whose end is validation text."""

    head: ByteSpan
    rest: Tokens
    """What of the text behind the head is not needed for validation, and stays in training."""
    rest_bytes: int


class ValidationText(NamedTuple):
    """What is kept for validation, and what it means for the documents around it."""

    tokens: list[Tokens]
    """The validation documents."""
    hashes: frozenset[int]
    """Hashes of the documents that it is from: other copies of them are left out of training."""
    cut: dict[int, DocumentCut]
    """Documents of which only the end is in it."""


def split(
    spool: Spool, config: DataConfig, given: Encoder | None, shared: Path, say: Say
) -> tuple[Encoder, ValidationText]:
    """Choose the tokenizer and the validation documents.

    The tokenizer must not see the validation text, and how many documents make up the tokens wanted is known
    only with a tokenizer. So a reserve of more text than needed is kept from the tokenizer; the documents
    of it that are not needed go back to training.
    """
    wanted = config.validation_tokens + 1  # the label of the last token needs one more
    half = spool.bytes // 2
    reserve_bytes = min(half, RESERVE_BYTES_PER_TOKEN * wanted)
    while True:
        reserve = _reserve(spool, reserve_bytes)
        encoder = given
        if encoder is None:
            say(f"training a tokenizer of {config.vocab_size} entries")
            encoder = cached_bpe(
                _tokenizer_text(spool, reserve), _tokenizer_text(spool, reserve), config.vocab_size, shared
            )
        validation, found = _take(spool, encoder, reserve, wanted)
        if found >= wanted:
            return encoder, validation
        if reserve_bytes >= half:
            raise InputError(
                "data.validation_tokens",
                config.validation_tokens,
                f"is more than half of the corpus ({found} tokens in half of it)",
                fix=f"data.validation_tokens={max(1, found // 4)}",
            )
        reserve_bytes = min(half, 4 * reserve_bytes)


def _reserve(spool: Spool, size: int) -> dict[int, ByteSpan]:
    """Return documents by ascending hash until they make ``size`` bytes.

    Of a document that would be a large part of that (always so for a single document), only the end is used,
    at most half of it.
    """
    reserve: dict[int, ByteSpan] = {}
    total = 0
    for document in map(int, spool.order()):
        if total >= size:
            break
        span = spool.span(document)
        length = span.stop - span.start
        if length > size // RESERVE_BYTES_PER_TOKEN:
            span = spool.cut(document, max(1, min(size - total, length // 2)))
        reserve[document] = span
        total += span.stop - span.start
    return reserve


def _tokenizer_text(spool: Spool, reserve: dict[int, ByteSpan]) -> Iterator[str]:
    """Yield the text that the tokenizer is trained on: all but the reserve and its copies; of a large corpus
    a sample by hash."""
    hashes = {spool.hash(document) for document in reserve}
    share = min(1.0, BPE_TRAINING_BYTES / spool.bytes)
    # The reserve has the lowest hashes, so that the sample is taken from the other end.
    lowest = int((1.0 - share) * 2**64)
    for document in range(len(spool)):
        span = spool.span(document)
        if document in reserve and reserve[document].start > span.start:
            yield from spool.pieces(ByteSpan(span.start, reserve[document].start))
        elif spool.hash(document) not in hashes and spool.hash(document) >= lowest:
            yield from spool.pieces(span)


def _take(
    spool: Spool, encoder: Encoder, reserve: dict[int, ByteSpan], wanted: int
) -> tuple[ValidationText, int]:
    """Return the first documents of the reserve that make ``wanted`` tokens, and the number of tokens found."""
    taken: list[Tokens] = []
    hashes: set[int] = set()
    cut: dict[int, DocumentCut] = {}
    found = 0
    for document, span in reserve.items():
        if found >= wanted:
            break
        start = spool.span(document).start
        tokens = encoder.encode([list(spool.pieces(span))])[0]
        if span.start > start:
            spare = max(0, len(tokens) - (wanted - found))
            rest_bytes = (span.stop - span.start) * spare // max(1, len(tokens))
            cut[document] = DocumentCut(
                ByteSpan(start, span.start), tokens[encoder.prefix_length : spare], rest_bytes
            )
            tokens = tokens[spare:]
        hashes.add(spool.hash(document))
        if len(tokens):
            taken.append(tokens)
        found += len(tokens)
    return ValidationText(taken, frozenset(hashes), cut), found
