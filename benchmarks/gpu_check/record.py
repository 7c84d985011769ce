"""The record of the GPU check: checks, tables and stages, and the JSON document that they form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from harness.errors import first_line
from harness.files import atomic

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 1
"""Version of gpu_check.json; a change that breaks a reader raises it."""


def _finite(value: Any) -> Any:
    """Return a number that JSON can express, or its name ("nan", "inf")."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


Figure = Annotated[bool | int | float | str | None, BeforeValidator(_finite)]
Status = Literal["passed", "failed", "not run"]
StageStatus = Literal["running", "done", "crashed", "timed out", "not run"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Check(_Part):
    """One claim and what was measured.

    Attributes:
        name: short, unique within its stage.
        proves: the claim, one sentence.
        status: passed, failed, or not run.
        figures: what was measured, by name; names end with their unit.
        reason: why it failed or did not run; "" for a passed check.
    """

    name: str
    proves: str
    status: Status
    figures: dict[str, Figure] = Field(default_factory=dict)
    reason: str = ""


class Table(_Part):
    """Figures without a verdict, such as times by method and size."""

    title: str
    columns: list[str]
    rows: list[list[Figure]]


class StageRecord(_Part):
    """What one stage left.

    Attributes:
        name: as in ``--stages``.
        title: what it is about.
        key: sources, device and mode that it ran with; a record with another key is not continued.
        status: running: its process has not ended, or was killed together with the one that watches it.
        limit_s: its time limit.
        seconds: what it took.
        reason: why it crashed, or did not run.
    """

    name: str
    title: str
    key: str = ""
    status: StageStatus = "not run"
    limit_s: float = 0.0
    seconds: float = 0.0
    reason: str = ""
    checks: list[Check] = Field(default_factory=list)
    tables: list[Table] = Field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the record under a temporary name, flush it and rename it."""
        atomic.write_text(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> StageRecord | None:
        """Return a stored record; None where there is none, or a damaged one."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValueError):
            return None


class Document(_Part):
    """The document gpu_check.json."""

    schema_version: int = SCHEMA_VERSION
    device: str
    mode: Literal["full", "quick"]
    environment: dict[str, Any]
    passed: int
    failed: int
    not_run: int
    seconds: float
    stages: list[StageRecord]


class StageContext:
    """What a stage measures on and reports to. Every report is on the disk when the call returns.

    Args:
        record: of the stage.
        path: of its file.
        device: "cuda" or "cpu".
        quick: sizes that take seconds on a CPU: that the stage works, not what it measures.
        folder: for temporary files; removed after the stage.
    """

    def __init__(self, record: StageRecord, path: Path, device: str, quick: bool, folder: Path) -> None:
        self.quick, self.folder = quick, folder
        self._device, self._record, self._path = device, record, path

    @property
    def device(self) -> torch.device:
        """Return the device, a GPU with its index."""
        # Only now: a stage that fails at once need not wait for torch.
        import torch

        return torch.device("cuda", 0) if self.is_cuda else torch.device(self._device)

    @property
    def is_cuda(self) -> bool:
        """Return True on a GPU; a check that needs one is "not run" elsewhere."""
        return self._device == "cuda"

    def check(
        self, name: str, proves: str, passed: bool, figures: Mapping[str, Any] | None = None, reason: str = ""
    ) -> None:
        """Report a check; `reason` says what is wrong where it failed."""
        self._add(
            name, proves, "passed" if passed else "failed", figures, "" if passed else reason or "see figures"
        )

    def not_run(self, name: str, proves: str, reason: str, figures: Mapping[str, Any] | None = None) -> None:
        """Report a check that could not run here."""
        self._add(name, proves, "not run", figures, reason)

    def check_on_cuda(
        self, name: str, proves: str, passed: bool, figures: Mapping[str, Any] | None = None, reason: str = ""
    ) -> None:
        """Report a check that only a GPU can decide; on a CPU its figures are those of the stand-in."""
        if self.is_cuda:
            self.check(name, proves, passed, figures, reason)
        else:
            self.not_run(name, proves, "needs CUDA", figures)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Report a table."""
        self._record.tables.append(
            Table(title=title, columns=list(columns), rows=[list(row) for row in rows])
        )
        self._save()

    @contextmanager
    def attempt(self, name: str, proves: str) -> Iterator[None]:
        """Report an exception inside as a failed check; the stage goes on."""
        try:
            yield
        except Exception as error:
            self._add(name, proves, "failed", None, first_line(error)[:500])

    def _add(
        self, name: str, proves: str, status: Status, figures: Mapping[str, Any] | None, reason: str
    ) -> None:
        figures = {key: _rounded(value) for key, value in (figures or {}).items()}
        self._record.checks.append(
            Check(name=name, proves=proves, status=status, figures=figures, reason=reason)
        )
        self._save()

    def _save(self) -> None:
        self._record.save(self._path)


def _rounded(value: Any) -> Any:
    """Round what a reader sees to four digits; counts stay whole."""
    return float(f"{value:.4g}") if isinstance(value, float) else value
