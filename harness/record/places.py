"""Where things lie on a machine, cut out of what leaves it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# An absolute path inside a text: it begins after no letter, so that val/loss, and/or and https://… are none.
_PATH = re.compile(r"(?<![\w./~-])~?(?:/[^\s/'\",;:()\[\]{}<>|=]+)+/?")


def without_places(value: Any) -> Any:
    """Nested dicts and lists with every absolute path, also inside a text, cut to its last part."""
    if isinstance(value, dict):
        return {key: without_places(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if Path(value).is_absolute() and "\n" not in value:
        return Path(value).name
    return _PATH.sub(lambda found: Path(found[0]).name, value)
