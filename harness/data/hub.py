"""Documents from anything that `datasets.load_dataset` accepts, a hub name or a local folder, streamed."""

from __future__ import annotations

import glob
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.config.schema import DataConfig
from harness.data.row_files import Wanted, check_columns
from harness.errors import InputError
from harness.files import paths
from harness.files.cache import Fingerprints

_LOUD = ("huggingface_hub", "datasets", "transformers", "fsspec")


def describe(config: DataConfig, fingerprints: Fingerprints) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (identity, facts) of the documents of a data set without network access.

    Raises:
        InputError: as `describe_contents`; a hub name without ``max_tokens``, whose stream may never end.
    """
    identity, facts = describe_contents(config, fingerprints)
    if "dataset" in identity and config.max_tokens is None:
        raise InputError(
            "data.max_tokens",
            None,
            f"is needed to stream {config.dataset}",
            fix="data.max_tokens=100_000_000",
        )
    identity |= {"split": config.split, "field": config.field}
    return identity, facts | {"split": config.split}


def describe_contents(
    config: DataConfig, fingerprints: Fingerprints
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (identity, facts) of a data set, all splits, without network access.

    A local folder is identified by the contents of its files. A name on the hub is identified by the name:
    what was read is then fixed by the cache, and told apart by the hash of the corpus.

    Raises:
        InputError: no name, or a path that is no folder.
    """
    if not config.dataset:
        raise InputError(
            "data.dataset",
            config.dataset,
            "names no data set for data.source=datasets",
            fix="data.dataset=allenai/c4",
        )
    identity: dict[str, Any] = {"subset": config.subset}
    facts: dict[str, Any] = {"name": config.name, "subset": config.subset}
    folder = _folder(config.dataset)
    if folder is not None:
        files = _files(folder)
        try:
            identity["files"] = fingerprints.of_files(files, base=folder)
        except OSError as error:
            reason = f"cannot be read ({error.strerror or error})"
            raise InputError("data.dataset", error.filename, reason) from error
        return identity, facts | {"files": len(files)}
    if os.path.isfile(config.dataset):
        fix = f"data=jsonl {paths.listed('data.files', config.dataset)}"
        raise InputError(
            "data.dataset", config.dataset, "is a file, and a data set is a folder or a name", fix=fix
        )
    if config.dataset.startswith(("/", ".", "~")):
        raise InputError("data.dataset", config.dataset, "is not a folder")
    identity["dataset"] = config.dataset
    return identity, facts | {"dataset": config.dataset}


def stream(config: DataConfig) -> Iterator[str | None]:
    """Yield the documents of the data set in its own order, on demand; None for a row without text.

    Raises:
        InputError: as `rows`, or a value that is not text.
    """
    for row in rows(config, config.split, {config.field: "data.field"}):
        value = row[config.field]
        if value is not None and not isinstance(value, str):
            reason = f"holds {type(value).__name__}, not text, in {config.dataset}"
            raise InputError("data.field", config.field, reason, allowed="text or null")
        yield value


def rows(
    config: DataConfig, split: str, wanted: Wanted | None, classes: dict[str, list[str]] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split of the data set in its own order, on demand.

    `datasets` 4 and later run no loading script of a data set, so nothing here has to be trusted. A class is its
    name, and the class -1, by which public test sets hide their labels, is None.

    Args:
        wanted: columns to yield; None: all.
        classes: takes the classes of each column that holds some, in the order of the data set.

    Raises:
        InputError: out of reach, no such subset, split or column. One line, which names the way to work without a
            network.
    """
    import datasets

    assert config.dataset is not None
    folder = _folder(config.dataset)
    count = 0
    log: list[str] = []
    try:
        with quiet(), captured("datasets") as log, _without_pattern(folder) as link:
            name = config.dataset if link is None else str(link)
            found = datasets.load_dataset(name, config.subset, split=split, streaming=True)
            named = {
                column: feature.names
                for column, feature in (found.features or {}).items()
                if isinstance(feature, datasets.ClassLabel)
            }
            if classes is not None:
                classes.update(named)
            for row in found:
                if not count:
                    check_columns(config.dataset, list(row), wanted or {})
                values = {column: row.get(column) for column in (row if wanted is None else wanted)}
                for column in named.keys() & values.keys():
                    index = values[column]
                    if isinstance(index, int):
                        values[column] = named[column][index] if index >= 0 else None
                yield values
                count += 1
    except (InputError, GeneratorExit):
        raise
    # The library and the file systems below it raise whatever their transport raised (a dozen classes, some
    # of them private): for the user all of them say the same.
    except Exception as error:
        raise _unreachable(config, error, folder, count, log) from error


def _folder(name: str) -> Path | None:
    path = os.path.expanduser(name)
    return Path(path) if os.path.isdir(path) else None


@contextmanager
def _without_pattern(folder: Path | None) -> Iterator[Path | None]:
    """Yield ``folder``, or a copy made of links if its path holds ``[``, ``*`` or ``?``.

    `datasets` resolves the path and then takes it for a pattern, so that ``a[1]`` would read the folder ``a1``.
    """
    if folder is None or not glob.has_magic(str(folder.resolve())):
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        for path in _files(folder):
            link = Path(copy) / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.absolute())
        yield Path(copy)


def _files(folder: Path) -> list[Path]:
    """List the files of a data set, without hidden ones. A pipe among them would make `datasets` wait forever."""
    found = []
    for path in sorted(folder.rglob("*")):
        kind = paths.kind(path)
        if _hidden(path.relative_to(folder)) or kind == "is a folder":
            continue
        if kind is not None:
            raise InputError("data.dataset", path, kind, allowed="files and folders")
        found.append(path)
    if not found:
        raise InputError("data.dataset", folder, "is an empty folder")
    return found


def _unreachable(
    config: DataConfig, error: Exception, folder: Path | None, rows: int, log: list[str]
) -> InputError:
    lines = str(error).splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
    if rows:
        reason += f", after {rows:,} rows"
    if folder is not None:
        # The exception names no file, and what `datasets` logs with it does.
        files = [match[1] for line in log if (match := re.search(r" file '(.+?)' with", line))]
        names = [Path(file).name for file in files] or [path.name for path in _files(folder)]
        if len(set(names)) == 1:
            reason += f", in {names[0]}"
        return InputError("data.dataset", config.dataset, f"could not be read ({reason})")
    return InputError(
        "data.dataset",
        config.dataset,
        f"could not be read to the end ({reason})",
        fix="check data.dataset, data.subset and data.split; without a network give a local folder, "
        "data.dataset=FOLDER, or copy a prepared cache, data.cache_dir=FOLDER",
    )


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


@contextmanager
def quiet() -> Iterator[None]:
    """Let the Hugging Face libraries log errors only: they announce each retry, and the caller reports the end."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextmanager
def captured(logger: str) -> Iterator[list[str]]:
    """Yield a list that collects what ``logger`` and those below it log, instead of printing it."""
    lines: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        lines.append(record.getMessage())
        return False

    handlers = logging.getLogger(logger).handlers
    for handler in handlers:
        handler.addFilter(collect)
    try:
        yield lines
    finally:
        for handler in handlers:
            handler.removeFilter(collect)
