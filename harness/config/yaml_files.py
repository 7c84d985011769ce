"""YAML files that describe something else than a run (studies, tables, companion jobs)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from harness.config.errors import InputError


def read(key: str, path: Path) -> Any:
    """What a file holds, unchecked.

    Args:
        key: whose value named the file, for the error.
        path: of the file.

    Raises:
        InputError: it is not YAML, or not text.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(key, path, f"is not YAML ({' '.join(str(error).split())})") from None
