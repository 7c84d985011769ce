"""The catalogue's file: one short entry per optimizer, from which the page is written. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.files import atomic

FACTS = ("state bytes", "weight decay", "host syncs", "keeps gradients", "bf16 parameters")
"""Checks whose measurement is of interest although nothing is wrong."""


@dataclass(frozen=True)
class EarlierAudit:
    """Sources of the audit whose entries hold, because a later change cannot alter them.

    Attributes:
        difference: from the present audit, a clause that follows "it".
        altered: in a reason of an entry that the change may alter, which is measured again.
    """

    difference: str
    altered: str


EARLIER: Mapping[str, EarlierAudit] = {
    "5e801b90": EarlierAudit(
        "judged no cell whose weights have the bits of the reference where rounding alone could move them by an "
        "update; such a cell was refused as *not judged*, so that all other verdicts are the same in both versions",
        "not judged",
    )
}
"""Digest → version of the audit whose entries are not measured again."""

UNAVAILABLE: Mapping[str, str] = {
    "dion": "it is not in the package index",
    "emerging-optimizers 0.3.0": "it needs Python 3.12 or newer; torch and DeepSpeed are audited on 3.11",
}
"""Package that the catalogue should hold → why it does not."""


@dataclass
class Entry:
    """What is known about one optimizer; nothing yet: neither an error, nor cells, nor checks.

    Attributes:
        target: import path or preset.
        version: package and version.
        core: digest of the sources that measured it, `measure.core`.
        error: why it cannot be audited; empty: it can.
        update_class: of the update; None: not measured yet.
        notes: how its parameters are passed, where that is not plain.
        cells: label of engine and variant → verdict.
        reasons: "verdict: reason" → labels, for all that are not safe.
        passed: number of checks that passed.
        failed: name → detail of checks that failed.
        facts: name → detail of `FACTS`.
    """

    target: str
    version: str = ""
    core: str = ""
    error: str = ""
    update_class: str | None = None
    notes: list[str] = field(default_factory=list)
    cells: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    passed: int | None = None
    failed: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def is_measured(self) -> bool:
        """Return True if it was audited, or cannot be."""
        return bool(self.error or self.cells) or self.passed is not None

    def holds(self, core: str) -> bool:
        """Return True if an audit with sources of this digest would find the same."""
        if self.core == core:
            return True
        earlier = EARLIER.get(self.core)
        return earlier is not None and not any(earlier.altered in reason for reason in self.reasons)

    def take(self, report: Mapping[str, Any]) -> None:
        """Take over what a report of `optbench audit --json` says; what it lacks stays as it is.

        Args:
            report: an entry of "targets".
        """
        self.version = report.get("version") or self.version
        self.error = report.get("error") or ""
        self.update_class = report.get("class") or self.update_class
        self.notes = list(report.get("notes") or self.notes)
        if report.get("cells"):
            self._take_cells(report["cells"])
        if report.get("checks"):
            self._take_checks(report["checks"])

    def _take_cells(self, cells: list[dict[str, Any]]) -> None:
        for cell in cells:
            label = f"{cell['engine']} {cell.get('variant', '')}".strip()
            self.cells[label] = cell["verdict"]
            if cell["verdict"] != "safe":
                reason = f"{cell['verdict']}: {cell['reason']}"
                self.reasons.setdefault(reason, []).append(label)

    def _take_checks(self, checks: list[dict[str, Any]]) -> None:
        self.passed = sum(check["passed"] is True for check in checks)
        self.failed = {check["name"]: check["detail"] for check in checks if check["passed"] is False}
        self.facts = {
            check["name"]: check["detail"]
            for check in checks
            if check["name"] in FACTS
            and check["passed"] is not False
            and (check["passed"] is None or check["name"] in ("state bytes", "weight decay"))
        }


def read(path: Path) -> dict[str, Entry]:
    """Return target → entry; empty if there is no file."""
    if not path.exists():
        return {}
    return {entry["target"]: Entry(**entry) for entry in json.loads(path.read_text())["entries"]}


def write(path: Path, entries: Mapping[str, Entry]) -> None:
    """Write the file, one line per entry, so that a committed file has small diffs."""
    lines = [json.dumps(_short(asdict(entry)), ensure_ascii=False) for entry in entries.values()]
    atomic.write_text(path, '{"entries": [\n' + ",\n".join(lines) + "\n]}\n")


def _short(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if value not in ("", None, [], {})}
