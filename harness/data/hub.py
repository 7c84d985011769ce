"""Documents from anything that `datasets.load_dataset` accepts, a hub name or a local folder, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.config.errors import InputError
from harness.config.schema import DataConfig
from harness.data.fingerprints import Fingerprints
from harness.data.messages import quiet


def describe(config: DataConfig, fingerprints: Fingerprints) -> tuple[dict[str, Any], dict[str, Any]]:
    """(identity, facts) of a data set, without touching the network.

    A local folder is identified by the contents of its files. A name on the hub is identified by the name:
    what was read is then fixed by the cache, and told apart by the hash of the corpus.

    Raises:
        InputError: no name; a hub name without ``max_tokens``, whose stream may never end.
    """
    if not config.dataset:
        raise InputError(
            "data.dataset",
            config.dataset,
            "names no data set for data.source=datasets",
            fix="data.dataset=allenai/c4",
        )
    identity: dict[str, Any] = {"subset": config.subset, "split": config.split, "field": config.field}
    facts: dict[str, Any] = {"name": config.name, "subset": config.subset, "split": config.split}
    folder = Path(config.dataset).expanduser()
    if folder.is_dir():
        paths = sorted(p for p in folder.rglob("*") if p.is_file() and not _hidden(p.relative_to(folder)))
        if not paths:
            raise InputError("data.dataset", config.dataset, "is an empty folder")
        identity["files"] = fingerprints.of_files(paths, base=folder)
        return identity, facts | {"files": len(paths)}
    if config.dataset.startswith(("/", ".", "~")):
        raise InputError("data.dataset", config.dataset, "is not a folder")
    if config.max_tokens is None:
        raise InputError(
            "data.max_tokens",
            None,
            f"is needed to stream {config.dataset}",
            fix="data.max_tokens=100_000_000",
        )
    identity["dataset"] = config.dataset
    return identity, facts | {"dataset": config.dataset}


def stream(config: DataConfig) -> Iterator[str]:
    """Documents of the data set in its own order, read as they are asked for.

    Raises:
        InputError: out of reach, no such subset, split or field, a value that is not text. One line, which
            names the way to work without a network.
    """
    import datasets

    assert config.dataset is not None
    folder = Path(config.dataset).expanduser()
    name = str(folder) if folder.is_dir() else config.dataset
    try:
        with quiet():
            for row in datasets.load_dataset(name, config.subset, split=config.split, streaming=True):
                yield _text(row, config)
    except InputError:
        raise
    # The library and the file systems below it raise whatever their transport raised (a dozen classes, some
    # of them private): for the user all of them say the same.
    except Exception as error:
        raise _unreachable(config, error, folder.is_dir()) from error


def _text(row: Any, config: DataConfig) -> str:
    if config.field not in row:
        raise InputError("data.field", config.field, f"is no column of {config.dataset}", allowed=list(row))
    value = row[config.field]
    if not isinstance(value, str):
        raise InputError(
            "data.field", config.field, f"holds {type(value).__name__}, not text, in {config.dataset}"
        )
    return value


def _unreachable(config: DataConfig, error: Exception, local: bool) -> InputError:
    lines = str(error).splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
    if local:
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
