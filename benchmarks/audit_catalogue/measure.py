"""Measure the optimizers of the catalogue in the processes of `optbench audit`, which can be ended."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.audit_catalogue.entries import Entry
from harness.errors import InputError
from harness.verify.audit import cells, session
from harness.verify.audit.session import Session
from harness.verify.audit.targets import Target, TargetError
from optimizers import presets

PACKAGES = ("torch.optim", "pytorch_optimizer", "galore_torch", "apollo_torch", "heavyball")
"""Packages whose optimizers are listed."""
ENGINES = ("single", "ddp", "fsdp2", "fsdp2 uneven", "fsdp2 columns", "zero1", "zero2", "zero3")
"""Labels of the cells of the short run: one of each way in which an optimizer gets its parameters."""
CELL_S = 60.0
"""Time limit of one cell, and of the checks of one optimizer, s."""

Say = Callable[[Entry, int, int], None]


def measure(
    known: dict[str, Entry],
    save: Callable[[], None],
    say: Say,
    *,
    packages: Sequence[str] = PACKAGES,
    labels: Sequence[str] = ENGINES,
    has_checks: bool = True,
) -> dict[str, str]:
    """Measure what the entries lack.

    Args:
        known: target → entry; new and changed ones are put in.
        save: called after each optimizer.
        say: called with each changed entry, its number and the number of all.
        packages: whose optimizers are measured, after this project's presets.
        labels: of the cells to run.
        has_checks: also run the checks of one process.

    Returns:
        Package → why it cannot be measured.
    """
    missing: dict[str, str] = {}
    session.preload(packages)
    selected = [cell for cell in cells.CELLS if cell.label in labels]
    with tempfile.TemporaryDirectory(prefix="optbench-catalogue-") as scratch:
        with Session(Path(scratch), CELL_S) as running:
            members = [Target(name) for name in presets.names()]
            for package in packages:
                try:
                    members += running.members(package)
                except InputError as error:
                    missing[package] = str(error.reason)
            for number, target in enumerate(members, 1):
                entry = known.setdefault(target.name, Entry(target.name))
                lacking = [cell for cell in selected if cell.label not in entry.cells]
                lacks_checks = has_checks and entry.passed is None
                if entry.error or not (lacking or lacks_checks):
                    continue
                try:
                    report = running.audit(running.probe(target), lacking, has_checks=lacks_checks)
                    entry.take(report.as_dict())
                except TargetError as error:
                    entry.error = error.reason
                save()
                say(entry, number, len(members))
    return missing
