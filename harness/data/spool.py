"""The text of a corpus in one local file while its cache is being built.

A source is read once (it may be a download), but its text is needed several times: to choose the validation
documents, to train the tokenizer, to be tokenized. In memory stay 16 bytes a document.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Say = Callable[[str], object]
"""Receives one line about what is going on."""

# Long documents are tokenized in pieces of this size, cut at white space: one call keeps some 100 bytes
# a token.
PIECE_BYTES = 2**20


class ByteSpan(NamedTuple):
    """A stretch of the spool, in bytes."""

    start: int
    stop: int


class Spool:
    """Store the documents of a source, in order, each with a 64-bit hash of its text, without blank ones and
    nulls.

    Args:
        path: the file, created anew.
        documents: the source; None is a row without text.
        tell: told how much was read, after each document.

    Attributes:
        bytes: length of the text that was read.
        null_rows, blank_rows: rows that were left out, because their text is null, or empty or white space.
        exhausted: the source has ended.
    """

    def __init__(self, path: Path, documents: Iterable[str | None], tell: Say = str) -> None:
        self._documents, self._tell = iter(documents), tell
        self._file = path.open("w+b")
        self._ends = array("q")
        self._hashes = array("Q")
        self.bytes = self.null_rows = self.blank_rows = 0
        self.exhausted = False

    def __len__(self) -> int:
        return len(self._ends)

    def fill(self, until: float) -> None:
        """Read on until the spool holds ``until`` bytes or the source ends."""
        self._file.seek(self.bytes)
        while self.bytes < until and not self.exhausted:
            try:
                text = next(self._documents)
            except StopIteration:
                self.exhausted = True
                break
            if text is None:
                self.null_rows += 1
            elif not text.strip():
                self.blank_rows += 1
            else:
                # JSON can spell lone surrogates, which UTF-8 cannot: they become question marks.
                data = text.encode("utf-8", errors="replace")
                self._file.write(data)
                self.bytes += len(data)
                self._ends.append(self.bytes)
                self._tell(f"{self.bytes / 1e6:,.0f} MB of text read")
                self._hashes.append(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))
        self._file.flush()

    def span(self, document: int) -> ByteSpan:
        """Return the byte range of ``document``."""
        return ByteSpan(self._ends[document - 1] if document else 0, self._ends[document])

    def hash(self, document: int) -> int:
        """Return the 64-bit hash of the text of ``document``; equal texts have equal hashes."""
        return self._hashes[document]

    def order(self) -> NDArray[np.int64]:
        """Return distinct documents by ascending hash, the first one of equal texts: (n,) int64.

        A sample that depends on nothing but the texts: neither on a seed nor on the order of the files.
        """
        _, first = np.unique(np.frombuffer(self._hashes, dtype=np.uint64), return_index=True)
        return first.astype(np.int64)

    def cut(self, document: int, tail_bytes: int) -> ByteSpan:
        """Return the end of ``document``, about ``tail_bytes`` long.

        It starts at white space if there is some nearby, else between two characters.
        """
        start, stop = self.span(document)
        position = max(start + 1, stop - tail_bytes)
        data = self._read(ByteSpan(position, min(stop, position + 4096)))
        spaces = [i for i in (data.find(b"\n"), data.find(b" ")) if i >= 0]
        offset = min(spaces) if spaces else next((i for i, b in enumerate(data) if b & 0xC0 != 0x80), 0)
        return ByteSpan(position + offset, stop)

    def pieces(self, span: ByteSpan) -> Iterator[str]:
        """Yield the text of ``span`` in pieces of at most ``PIECE_BYTES``."""
        start = span.start
        while span.stop - start > PIECE_BYTES:
            data = self._read(ByteSpan(start, start + PIECE_BYTES))
            end = max(data.rfind(b"\n"), data.rfind(b" "))
            if end <= 0:
                end = max(i for i in range(len(data) - 4, len(data)) if data[i] & 0xC0 != 0x80)
            yield data[:end].decode("utf-8")
            start += end
        yield self._read(ByteSpan(start, span.stop)).decode("utf-8")

    def close(self) -> None:
        """Close and remove the file."""
        self._file.close()
        Path(self._file.name).unlink(missing_ok=True)

    def _read(self, span: ByteSpan) -> bytes:
        self._file.seek(span.start)
        return self._file.read(span.stop - span.start)


def throttle(say: Say, seconds: float = 10.0) -> Say:
    """Return a ``say`` that passes on at most one line in ``seconds``, and none before that time."""
    last = time.monotonic()

    def throttled(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            say(line)

    return throttled
