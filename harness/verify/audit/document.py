"""What an audit found: targets, cells and checks, and their JSON. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["safe", "wrong", "crashes", "refused"]
UpdateClass = Literal["elementwise", "rowwise", "matrix", "global", "nondeterministic"]

VERDICTS: Mapping[str, str] = {
    "safe": "the engine trains what the optimizer computes on whole parameters in one process",
    "wrong": "it trains something else, without an error",
    "crashes": "an operation fails, a process dies, or a step does not end",
    "refused": "the optimizer or the engine says that it does not support this, before any weight changes; or no error "
    "would show (not judged)",
}
"""Verdict → its meaning."""

CLASSES: Mapping[str, str] = {
    "elementwise": "the update of an element depends on the gradients of this element alone",
    "rowwise": "the update of a row (or column) depends on the gradients of this row (or column) alone",
    "matrix": "the update of an element depends on its whole matrix, or on the shape of its parameter",
    "global": "the update of a parameter depends on other parameters, or on their order",
    "nondeterministic": "the update draws random numbers, or differs between equal runs",
}
"""Class of an update → its meaning. The first one that holds is reported, from the bottom to the top."""

CONTROL = "control: "
"""Begins the targets of controls."""
FIRST_STEP = "first step"
"""Name of the check that stands for all where an optimizer takes no step in time, or none at all."""
RESUME_ACROSS = "resume at another world size"
"""Name of the check on two ranks."""


@dataclass(frozen=True)
class CellReport:
    """An optimizer on one engine.

    Attributes:
        engine: of `optbench train`: single, ddp, fsdp2, hsdp, zero0, zero1, zero2, zero3.
        world_size: processes.
        variant: what is special: "" for nothing, else "uneven", "empty", "columns", "split", "accumulation", …
        verdict: one of `VERDICTS`.
        replay_error: largest ‖ΔW - ΔW_ref‖_F/‖ΔW_ref‖_F of a parameter after the last step; None: there is none.
        noise_floor: the same figure between twin runs that differ by one ulp, of the same parameter.
        first_step: first step whose weights differ, or that failed, from 1; None: none does.
        parameter: that differs most in that step; None: none does.
        reason: of the verdict, one sentence; may be empty for "safe".
        control: the defect that was put in on purpose; None: none.
    """

    engine: str
    world_size: int
    verdict: Verdict
    replay_error: float | None = None
    first_step: int | None = None
    parameter: str | None = None
    reason: str = ""
    variant: str = ""
    noise_floor: float | None = None
    control: str | None = None

    @property
    def label(self) -> str:
        """Return the engine with its variant, as tables show it."""
        return f"{self.engine} {self.variant}".strip()

    def as_dict(self) -> dict[str, Any]:
        """Return the cell's entry in the JSON document."""
        return {
            "engine": self.engine,
            "variant": self.variant,
            "world_size": self.world_size,
            "verdict": self.verdict,
            "replay_error": _finite(self.replay_error),
            "noise_floor": _finite(self.noise_floor),
            "first_step": self.first_step,
            "parameter": self.parameter,
            "reason": self.reason,
            **({"control": self.control} if self.control else {}),
        }


@dataclass(frozen=True)
class Check:
    """One check of an optimizer in one process.

    Attributes:
        name: short, with spaces.
        passed: None: says nothing about right and wrong, or does not apply.
        detail: what was measured, one sentence.
        reproduction: lines of Python that show a failure; empty: none.
    """

    name: str
    passed: bool | None
    detail: str = ""
    reproduction: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the check's entry in the JSON document."""
        return {"name": self.name, "passed": self.passed, "detail": self.detail}


@dataclass(frozen=True)
class TargetReport:
    """An optimizer with everything that was found out about it.

    Attributes:
        target: as typed.
        update_class: one of `CLASSES`; None: could not be measured.
        explanation: how the class was measured, one sentence.
        cells: one per engine and variant.
        checks: in one process.
        version: of its package, "pytorch_optimizer 4.1.0"; empty: unknown.
        notes: how the optimizer was used, where that is not plain (`Target.form`).
        error: why it cannot be audited; then there are neither cells nor checks.
        not_run: labels of cells, and "checks" (or "checks from NAME on"), for which there was no time.
        seconds: that the audit of this target took, s; None: not measured.
    """

    target: str
    update_class: UpdateClass | None = None
    explanation: str = ""
    cells: tuple[CellReport, ...] = ()
    checks: tuple[Check, ...] = ()
    version: str = ""
    notes: tuple[str, ...] = ()
    error: str = ""
    not_run: tuple[str, ...] = ()
    seconds: float | None = field(default=None, compare=False)

    @property
    def passed(self) -> bool:
        """Return True if everything ran, no cell is wrong or crashes, no check failed, every control was detected."""
        return not (self.error or self.not_run or self.failed)

    @property
    def failed(self) -> bool:
        """Return True if a cell is wrong or crashes, a check failed, or a control was not detected."""
        cells = all(is_good(cell) for cell in self.cells)
        return not cells or any(check.passed is False for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Return the target's entry in the JSON document."""
        return {
            "target": self.target,
            "class": self.update_class,
            "explanation": self.explanation,
            "version": self.version,
            "notes": list(self.notes),
            "error": self.error or None,
            "passed": self.passed,
            "not_run": list(self.not_run),
            "cells": [cell.as_dict() for cell in self.cells],
            "checks": [check.as_dict() for check in self.checks],
        }


def is_good(cell: CellReport) -> bool:
    """Return True for a cell that is safe or refused; for a control, for one that is wrong."""
    return cell.verdict == "wrong" if cell.control else cell.verdict in ("safe", "refused")


def _finite(value: float | None) -> float | None:
    """Return None instead of an infinite or NaN value, which JSON does not have."""
    return None if value is None or not math.isfinite(value) else value
