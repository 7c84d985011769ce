"""Measure the optimizers of the catalogue in the processes of `optbench audit`, which can be ended."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.audit_catalogue.entries import Entry
from benchmarks.audit_catalogue.special import audited
from harness.errors import InputError
from harness.verify.audit import cells, session
from harness.verify.audit.session import Session
from harness.verify.audit.targets import Target, TargetError, version
from optimizers import presets

HOME = "optbench"
"""Stands for this project's presets among the packages."""
PACKAGES = ("torch.optim", HOME, "galore_torch", "pytorch_optimizer", "apollo_torch", "heavyball")
"""Packages whose optimizers are listed, in the order in which they are measured."""
_CORE = (
    "cells",
    "checks*",
    "classify",
    "engines",
    "given_model",
    "judge",
    "oracle",
    "ranks",
    "subject",
    "targets",
)
"""Modules of the audit that decide what is found, as file patterns."""
ENGINES = ("single", "ddp", "fsdp2", "fsdp2 uneven", "fsdp2 columns", "zero1", "zero2", "zero3")
"""Labels of the cells of the short run: one of each way in which an optimizer gets its parameters."""
CELL_S = 60.0
"""Time limit of one cell, and of the checks of one optimizer, s, on an idle machine."""

Say = Callable[[Entry, int, int], None]


def core() -> str:
    """Return a digest of the sources that decide what is found; `Entry.holds` says which entries it leaves valid."""
    folder = Path(cells.__file__).parent
    files = sorted(file for pattern in _CORE for file in folder.glob(f"{pattern}.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def measure(
    known: dict[str, Entry],
    save: Callable[[], None],
    say: Say,
    *,
    packages: Sequence[str] = PACKAGES,
    labels: Sequence[str] = ENGINES,
    has_checks: bool = True,
    cell_s: float = CELL_S,
) -> dict[str, str]:
    """Measure what the entries lack, and again those that do not hold under the present sources.

    Args:
        known: target → entry; new and changed ones are put in. What there is no time for stays there, empty.
        save: called after each optimizer.
        say: called with each changed entry, its number and the number of all.
        packages: whose optimizers are measured.
        labels: of the cells to run.
        has_checks: also run the checks of one process.
        cell_s: time limit, as `CELL_S`.

    Returns:
        Package → why it cannot be measured.
    """
    missing: dict[str, str] = {}
    session.preload([package for package in packages if package != HOME])
    selected = [cell for cell in cells.CELLS if cell.label in labels]
    now = core()
    with tempfile.TemporaryDirectory(prefix="optbench-catalogue-") as scratch:
        with Session(Path(scratch), cell_s) as running:
            members: list[Target] = []
            for package in packages:
                try:
                    members += _members(running, package)
                except InputError as error:
                    missing[package] = str(error.reason)
            for target in members:
                known.setdefault(target.name, Entry(target.name))
            for number, target in enumerate(members, 1):
                entry = known[target.name]
                if not entry.holds(now):
                    entry = Entry(target.name, core=now)
                lacking = [cell for cell in selected if cell.label not in entry.cells]
                lacks_checks = has_checks and entry.passed is None
                if entry.error or not (lacking or lacks_checks):
                    continue
                try:
                    report = running.audit(running.probe(audited(target)), lacking, has_checks=lacks_checks)
                    entry.take(report.as_dict())
                except TargetError as error:
                    entry.error = error.reason
                entry.version = entry.version or version(target.name)
                known[target.name] = entry
                save()
                say(entry, number, len(members))
    return missing


def _members(running: Session, package: str) -> list[Target]:
    if package == HOME:
        return [Target(name) for name in presets.names()]
    return running.members(package)
