"""Recognize file formats and codecs by their first bytes, whatever the name of the file says, and open them.

Files are opened decompressed; damaged files and decompression bombs raise `DamagedFile`.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

HEAD_BYTES = 1024
"""Bytes from the start of a file that `recognize` wants."""


class Format(NamedTuple):
    """A format that is not the one that the configuration names.

    Attributes:
        name: with its article, as in "is a zip archive".
        fix: what to type; ``{file}`` is the path.
    """

    name: str
    fix: str


_UNPACK = "unpack it and name the files inside: COMMAND"
_EXPORT = "export the text column as JSON lines or Parquet"
_CONVERT = "iconv -f ENCODING -t UTF-8 {file} > NEW_FILE"
_TABLE: tuple[tuple[int, bytes, Format], ...] = (
    (0, b"PK\x03\x04", Format("a zip archive", _UNPACK.replace("COMMAND", "unzip {file}"))),
    (0, b"PK\x05\x06", Format("an empty zip archive", "another file")),
    (0, b"PK\x07\x08", Format("a part of a zip archive", "join its parts, then unzip")),
    (0, b"7z\xbc\xaf\x27\x1c", Format("a 7z archive", _UNPACK.replace("COMMAND", "7z x {file}"))),
    (0, b"Rar!\x1a\x07", Format("a RAR archive", _UNPACK.replace("COMMAND", "unrar x {file}"))),
    (257, b"ustar", Format("a tar archive", _UNPACK.replace("COMMAND", "tar -xf {file}"))),
    (0, b"!<arch>\n", Format("an ar archive", _UNPACK.replace("COMMAND", "ar x {file}"))),
    (0, b"070701", Format("a cpio archive", _UNPACK.replace("COMMAND", "cpio -id < {file}"))),
    (0, b"PAR1", Format("a Parquet file", "data=parquet data.files=[{file}]")),
    (0, b"PARE", Format("an encrypted Parquet file", "decrypt it")),
    (0, b"ARROW1", Format("an Arrow file", "put it in a folder: data.source=datasets data.dataset=FOLDER")),
    (0, b"\xff\xff\xff\xff", Format("an Arrow stream", _EXPORT)),
    (0, b"FEA1", Format("a Feather file", _EXPORT)),
    (0, b"ORC", Format("an ORC file", _EXPORT)),
    (0, b"Obj\x01", Format("an Avro file", _EXPORT)),
    (0, b"\x89HDF\r\n\x1a\n", Format("an HDF5 file", _EXPORT)),
    (0, b"SQLite format 3\0", Format("an SQLite database", _EXPORT)),
    (0, b"\x93NUMPY", Format("a NumPy array", _EXPORT)),
    *((0, bytes([0x80, n]), Format("a Python pickle", _EXPORT)) for n in range(2, 6)),
    (0, b"%PDF-", Format("a PDF document", "extract its text: pdftotext {file}")),
    (0, b"%!PS", Format("a PostScript document", "extract its text: ps2ascii {file}")),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", Format("an older Office document", "save it as text")),
    (0, b"{\\rtf", Format("a rich-text document", "save it as plain text")),
    (0, b"\x89PNG\r\n", Format("a PNG image", "another file")),
    (0, b"\xff\xd8\xff", Format("a JPEG image", "another file")),
    (0, b"GIF8", Format("a GIF image", "another file")),
    (0, b"RIFF", Format("a RIFF file (audio, video or image)", "another file")),
    (0, b"OggS", Format("an Ogg file", "another file")),
    (0, b"\x7fELF", Format("a program (ELF)", "another file")),
    (0, b"version https://git-lfs.github.com/spec/", Format("a Git LFS pointer", "git lfs pull")),
    (0, b"\x1f\x9d", Format("compressed by compress (.Z)", _UNPACK.replace("COMMAND", "uncompress {file}"))),
    (0, b"\x1f\xa0", Format("compressed by compress (.Z)", _UNPACK.replace("COMMAND", "gzip -d {file}"))),
    (0, b"LZIP", Format("compressed by lzip", _UNPACK.replace("COMMAND", "lzip -d {file}"))),
    (0, b"\x89LZO\x00", Format("compressed by lzop", _UNPACK.replace("COMMAND", "lzop -d {file}"))),
    (
        0,
        b"\x02\x21\x4c\x18",
        Format("compressed by lz4 (old)", _UNPACK.replace("COMMAND", "lz4 -d {file}")),
    ),
    (0, b"\xff\x06\x00\x00sNaPpY", Format("compressed by snappy", "decompress it")),
    *((0, bytes([0x78, n]), Format("compressed by zlib", "decompress it")) for n in (0x9C, 0xDA)),
    # Compression inside compression: the outer layer is undone, the inner one is named.
    (0, b"\x1f\x8b", Format("compressed by gzip", "gzip -d {file}")),
    (0, b"BZh", Format("compressed by bzip2", "bzip2 -d {file}")),
    (0, b"\xfd7zXZ\0", Format("compressed by xz", "xz -d {file}")),
    (0, b"\x28\xb5\x2f\xfd", Format("compressed by zstd", "zstd -d {file}")),
    (0, b"\x04\x22\x4d\x18", Format("compressed by lz4", "lz4 -d {file}")),
    # UTF-32 first: its little-endian mark starts with that of UTF-16.
    (0, b"\xff\xfe\0\0", Format("UTF-32 text", _CONVERT.replace("ENCODING", "UTF-32"))),
    (0, b"\0\0\xfe\xff", Format("UTF-32 text", _CONVERT.replace("ENCODING", "UTF-32"))),
    (0, b"\xff\xfe", Format("UTF-16 text", _CONVERT.replace("ENCODING", "UTF-16"))),
    (0, b"\xfe\xff", Format("UTF-16 text", _CONVERT.replace("ENCODING", "UTF-16"))),
)
_PRINTABLE = bytes(range(0x20, 0x100)) + b"\t\n\r\f\x1b"


def recognize(head: bytes) -> Format | None:
    """Return the format that the first bytes of a file show, or None for what may be UTF-8 text.

    Args:
        head: the first ``HEAD_BYTES`` of the file, fewer if it is shorter.
    """
    for offset, magic, known in _TABLE:
        if head.startswith(magic, offset):
            # "BZh" and "ORC" may also start a sentence.
            if magic.isalnum() and not is_binary(head):
                continue
            return known
    if head and not head.strip(b"\0"):
        return Format("a file of zero bytes", "another copy of it")
    return _wide_text(head)


def is_binary(data: bytes) -> bool:
    """Return True for bytes that are no text in any 8-bit encoding: over 2 % of them are control characters."""
    return len(data.translate(None, _PRINTABLE)) > len(data) // 50


def _wide_text(head: bytes) -> Format | None:
    """Detect UTF-16 or UTF-32 without a byte-order mark: in Latin text all bytes but one of each unit are zero."""
    units = len(head) // 4
    if not units:
        return None
    zero = [place for place in range(4) if head[place::4][:units].count(0) > 0.7 * units]
    names = {(1, 2, 3): "UTF-32LE", (0, 1, 2): "UTF-32BE", (1, 3): "UTF-16LE", (0, 2): "UTF-16BE"}
    name = names.get(tuple(zero))
    return Format(f"{name} text", _CONVERT.replace("ENCODING", name)) if name else None


BUFFER_BYTES = 2**16
PIECE_BYTES = 2**12
"""Bytes decompressed at once: an error loses as much of what precedes it."""
# Text shrinks to a tenth, and logs that repeat themselves to a hundredth; gzip ends at a thousandth.
BOMB_RATIO = 200
BOMB_BYTES = 64 * 2**20
"""Decompressed bytes from which the ratio counts."""


class DamagedFile(Exception):
    """The bytes of a file violate its format or expand too far; the message says what is wrong."""


class Opened(NamedTuple):
    """A file that is open for reading.

    Attributes:
        file: its bytes, decompressed.
        codec: name of its compression (``gzip``, ``bzip2``, ``xz``, ``zstd``, ``lz4``), or None.
    """

    file: io.BufferedReader
    codec: str | None


def open_decompressed(path: Path) -> Opened:
    """Open ``path`` for reading, decompressed.

    Reading raises DamagedFile if the compressed data is damaged, cut short, or a decompression bomb.

    Raises:
        OSError: the file cannot be opened.
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
    """Raise DamagedFile if ``size`` bytes from ``compressed`` bytes are a decompression bomb."""
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
    """The joined contents of a file's streams; `bz2.open` and `lzma.open` take a damaged stream for the end."""

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
        """Do nothing: the file is closed by its owner."""


class _Decompressed(io.RawIOBase):
    """A stream of decompressed bytes that raises every error of the decompressors as DamagedFile."""

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
