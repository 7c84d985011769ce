"""What a user hears while data is prepared: a line now and then, and each failure once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Say = Callable[[str], object]

_LOUD = ("huggingface_hub", "datasets", "transformers", "fsspec")


@contextmanager
def quiet() -> Iterator[None]:
    """Let the Hugging Face libraries report errors only: they announce each of five retries, and the caller
    tells in the end what went wrong."""
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
    """Yield a list that collects what ``logger`` and those below it would print, which is not printed."""
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


def seldom(say: Say, seconds: float = 10.0) -> Say:
    """``say`` for progress: passes on at most one line in ``seconds``, and none before that time."""
    last = time.monotonic()

    def tell(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            say(line)

    return tell
