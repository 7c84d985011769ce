"""The one error that a user's input can cause, how it reads, and the exit codes of commands.

Every message has the same form, so that its last line alone says what to do::

    optimizer.lrr: 0.1 is wrong; did you mean optimizer.lr? allowed: lr, rank, …; fix: optimizer.lr=0.1
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from enum import IntEnum
from functools import partial
from typing import Any


class ExitCode(IntEnum):
    """How a command ended."""

    DONE = 0
    CHECK_FAILED = 1
    BAD_INPUT = 2
    RUN_FAILED = 3
    RESUMABLE = 75
    KEYBOARD_INTERRUPT = 130


class InputError(Exception):
    """Bad input, found before anything was spent. The command line prints it as one line and exits with 2.

    Args:
        key: the configuration key, command or file that is wrong.
        value: what was given; kept as text unless it is a scalar of JSON, so that the error can cross processes.
        reason: what is wrong with it, if "is wrong" does not say enough (for instance
            ``"is not divisible by world_size × micro_batch_size = 8"``).
        allowed: what would be accepted: the choices, or one sentence.
        suggestion: the closest accepted spelling; derived from ``allowed`` if that is a list of choices.
        fix: an override or a command that fixes it.
    """

    def __init__(
        self,
        key: str,
        value: object,
        reason: str = "is wrong",
        *,
        allowed: Iterable[str] | str = (),
        suggestion: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.key, self.reason = str(key), str(reason)
        self.value = value if isinstance(value, str | int | float | None) else str(value)
        if not isinstance(allowed, str):
            allowed = [str(choice) for choice in allowed]
        self.allowed = allowed if isinstance(allowed, str) else ", ".join(allowed)
        if suggestion is None and not isinstance(allowed, str) and isinstance(value, str):
            suggestion = closest(value, allowed)
        self.suggestion = None if suggestion is None else str(suggestion)
        self.fix = None if fix is None else str(fix)
        super().__init__(str(self))

    def fields(self) -> dict[str, Any]:
        """Return the arguments that make this error anew, all of them scalars of JSON."""
        names = ("key", "value", "reason", "allowed", "suggestion", "fix")
        return {name: getattr(self, name) for name in names}

    def __reduce__(self) -> tuple[Callable[[], InputError], tuple[()]]:
        """Pickle the fields: an exception's own way would call the constructor with the message alone."""
        return partial(InputError, **self.fields()), ()

    def __str__(self) -> str:
        line = f"{self.key}: {self.value} {self.reason}"
        if self.suggestion:
            line += f"; did you mean {self.suggestion}?"
        if self.allowed:
            line += f"{'' if self.suggestion else ';'} allowed: {self.allowed}"
        if self.fix:
            line += f"; fix: {self.fix}"
        return " ".join(line.split())


def closest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that ``word`` is most likely a misspelling of, or None."""
    if len(word) > 100:
        return None  # no misspelling, and slow to compare
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return matches[0] if matches else None


def first_line(error: BaseException) -> str:
    """Return an exception's type and the first line of its message, for a log."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
