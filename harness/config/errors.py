"""The one error that a user's input can cause, and how it reads.

Every message has the same form, so that its last line alone says what to do::

    optimizer.lrr: 0.1 is wrong; did you mean optimizer.lr? allowed: lr, rank, …; fix: optimizer.lr=0.1
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """Bad input, found before anything was spent. The command line prints it as one line and exits with 2.

    Args:
        key: the configuration key, command or file that is wrong.
        value: what was given.
        reason: what is wrong with it, if "is wrong" does not say enough (for instance
            ``"is not divisible by world_size × micro_batch_size = 8"``).
        allowed: what would be accepted: the choices, or one sentence.
        suggestion: the closest accepted spelling; derived from ``allowed`` if that is a list of choices.
        fix: a command-line word or a command that mends it.
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
        self.key, self.value, self.reason = key, value, reason
        self.allowed = allowed if isinstance(allowed, str) else ", ".join(allowed := list(allowed))
        if suggestion is None and not isinstance(allowed, str) and isinstance(value, str):
            suggestion = closest(value, allowed)
        self.suggestion, self.fix = suggestion, fix
        super().__init__(str(self))

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
    """The choice that ``word`` is most likely a misspelling of, or None."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return matches[0] if matches else None
