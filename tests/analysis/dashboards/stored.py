"""What a W&B server keeps of a run and of an artifact."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

ENTITY = "team"


@dataclass
class StoredRun:
    """One run as the server has it."""

    name: str
    project: str
    display_name: str = ""
    group: str | None = None
    job_type: str | None = None
    host: str | None = None
    program: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    """File of the stream → line number → line."""
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None
    upserts: int = 0

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of the history in the order of their lines."""
        found = self.lines.get("wandb-history.jsonl", {})
        return [json.loads(found[number]) for number in sorted(found)]

    @property
    def summary(self) -> dict[str, Any]:
        """The latest summary."""
        found = self.lines.get("wandb-summary.json", {})
        return json.loads(found[max(found)]) if found else {}

    @property
    def values(self) -> dict[str, Any]:
        """The configuration without W&B's own wrapping."""
        return {key: entry["value"] for key, entry in self.config.items() if key != "_wandb"}

    @property
    def state(self) -> str:
        return "running" if self.exit_code is None else "failed" if self.exit_code else "finished"


@dataclass
class Artifact:
    """One version of an artifact: its files by path, once its manifest came."""

    name: str
    kind: str
    run: str
    manifest: dict[str, Any] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False
