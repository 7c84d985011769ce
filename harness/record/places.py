"""Where things lie on a machine, and secrets, cut out of what leaves it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from harness.record.redaction import redact_secrets

# An absolute path inside a text: it begins after no letter, so that val/loss, and/or and https://… are none.
_PATH = re.compile(r"(?<![\w./~-])~?(?:/[^\s/'\",;:()\[\]{}<>|=]+)+/?")


def without_places(value: Any) -> Any:
    """Nested dicts and lists with every absolute path, also inside a text, cut to its last part; without secrets."""
    return _cut(redact_secrets(value))


def _cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cut(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_cut(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if Path(value).is_absolute() and "\n" not in value:
        return Path(value).name
    return _PATH.sub(lambda found: Path(found[0]).name, value)
