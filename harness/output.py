"""JSON documents that commands print with ``--json``. Standard library only."""

from __future__ import annotations

import json

JSON_SCHEMA_VERSION = 1
"""Version of every document on standard output; a change that breaks a reader raises it."""


def json_document(**content: object) -> str:
    """Return the one JSON document that a command prints with ``--json``, with its ``schema_version``.

    Raises:
        ValueError: a number that JSON cannot express (NaN, infinity).
    """
    document = {"schema_version": JSON_SCHEMA_VERSION, **content}
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    # A file name may hold half of a surrogate pair, which UTF-8 cannot encode.
    return text.encode("utf-8", "replace").decode("utf-8")
