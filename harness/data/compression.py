"""Open files decompressed: the codec is recognized by its magic bytes, damage and bombs end in one exception."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

BUFFER_BYTES = 2**16
PIECE_BYTES = 2**12
"""Decompressed at once: an error loses as much of what precedes it."""
# Text shrinks to a tenth, and logs that repeat themselves to a hundredth; gzip ends at a thousandth.
BOMB_RATIO = 200
BOMB_BYTES = 64 * 2**20
"""Decompressed bytes from which the ratio counts."""


class DamagedFile(Exception):
    """The bytes of a file are not what its format demands, or expand beyond measure; says what is wrong."""


class Opened(NamedTuple):
    """A file that is being read.

    Attributes:
        file: its bytes, decompressed.
        codec: that was undone (``gzip``, ``bzip2``, ``xz``, ``zstd``, ``lz4``), or None.
    """

    file: io.BufferedReader
    codec: str | None


def open_decompressed(path: Path) -> Opened:
    """Open ``path`` for reading, decompressed.

    Reading raises DamagedFile where the compressed data is damaged, cut short, or a decompression bomb.

    Raises:
        OSError: it cannot be opened.
    """
    raw = path.open("rb")
    try:
        codec = codec_of(raw.peek(16))
        if codec is None:
            return Opened(raw, None)
        name, decompress = codec
        source = _Decompressed(decompress(raw), raw, path.stat().st_size)
        return Opened(io.BufferedReader(source, BUFFER_BYTES), name)
    except BaseException:
        raw.close()
        raise


def codec_of(head: bytes) -> tuple[str, Callable[[IO[bytes]], Any]] | None:
    """Return name and opener of the codec that the first 16 bytes of a file show, or None."""
    for name, magics, decompress in _CODECS:
        if head.startswith(magics):
            return name, decompress
    # bzip2 has a digit after its magic, and then that of its first block or of its end.
    if head[:3] == b"BZh" and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return "bzip2", _bzip2
    # The older format of xz has no magic: properties, a dictionary size of 2ⁿ or 2ⁿ + 2ⁿ⁻¹, a length or -1.
    if len(head) >= 13 and head[0] == 0x5D and head[1:3] == b"\0\0":
        length = int.from_bytes(head[5:13], "little")
        if length == 2**64 - 1 or length < 2**40:
            return "xz", _xz
    return None


def check_expansion(size: int, compressed: int) -> None:
    """Raise DamagedFile if ``size`` bytes out of ``compressed`` are a decompression bomb."""
    if size > BOMB_BYTES and size > BOMB_RATIO * compressed:
        raise DamagedFile(
            f"expands to more than {BOMB_RATIO} times its {compressed:,} bytes, which no text does "
            "(a decompression bomb?)"
        )


def _bzip2(raw: IO[bytes]) -> Any:
    return _Streams(raw, bz2.BZ2Decompressor)


def _xz(raw: IO[bytes]) -> Any:
    return _Streams(raw, lzma.LZMADecompressor)


def _arrow(codec: str) -> Callable[[IO[bytes]], Any]:
    def decompress(raw: IO[bytes]) -> Any:
        import pyarrow as pa

        return pa.CompressedInputStream(raw, codec)

    return decompress


_CODECS: tuple[tuple[str, tuple[bytes, ...], Callable[[IO[bytes]], Any]], ...] = (
    ("gzip", (b"\x1f\x8b",), gzip.open),
    ("xz", (b"\xfd7zXZ\0",), _xz),
    # A stream of pzstd starts with a frame to be skipped.
    (
        "zstd",
        (b"\x28\xb5\x2f\xfd", *(bytes([n]) + b"\x2a\x4d\x18" for n in range(0x50, 0x60))),
        _arrow("zstd"),
    ),
    ("lz4", (b"\x04\x22\x4d\x18",), _arrow("lz4")),
)


class _Streams:
    """Joined contents of the streams of a file. `bz2.open` and `lzma.open` take a damaged one for the end."""

    def __init__(self, raw: IO[bytes], new: Callable[[], Any]) -> None:
        self._raw, self._new, self._decoder = raw, new, new()

    def read(self, size: int) -> bytes:
        while True:
            if self._decoder.eof:
                rest = self._decoder.unused_data.lstrip(b"\0")
                while not rest and (read := self._raw.read(BUFFER_BYTES)):
                    rest = read.lstrip(b"\0")  # xz may fill up with zeros
                if not rest:
                    return b""
                self._decoder = self._new()
            elif self._decoder.needs_input:
                rest = self._raw.read(BUFFER_BYTES)
                if not rest:
                    raise EOFError("it ends within a stream")
            else:
                rest = b""
            if data := self._decoder.decompress(rest, size):
                return data

    def close(self) -> None:
        """Nothing: the file is closed by its owner."""


class _Decompressed(io.RawIOBase):
    """Decompressed bytes, with every error of the decompressors as DamagedFile."""

    def __init__(self, stream: Any, raw: IO[bytes], compressed: int) -> None:
        self._stream, self._raw, self._compressed = stream, raw, compressed
        self._done = 0
        self._error: DamagedFile | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        filled = 0
        # The buffer is filled up, so that whoever peeks at the head sees all of it; what precedes damage is
        # delivered first, so that messages name the row.
        while filled < len(buffer) and self._error is None:
            try:
                data = self._stream.read(min(PIECE_BYTES, len(buffer) - filled))
                check_expansion(self._done + len(data), self._compressed)
            except DamagedFile as error:
                self._error = error
            # zlib.error, LZMAError, BadGzipFile, EOFError, ArrowInvalid: they share no other base.
            except Exception as error:
                reason = str(error) or type(error).__name__
                self._error = DamagedFile(
                    f"cannot be read after {self._done:,} bytes of its contents ({reason})"
                )
            else:
                if not data:
                    break
                buffer[filled : filled + len(data)] = data
                filled += len(data)
                self._done += len(data)
        if self._error is not None and not filled:
            raise self._error
        return filled

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._stream.close()
            self._raw.close()
