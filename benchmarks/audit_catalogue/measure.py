"""Measure the optimizers of the catalogue, each in a process that can be ended."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.verify.audit import targets
from harness.verify.audit.targets import Target, TargetError
from optimizers import presets

PACKAGES = ("torch.optim", "pytorch_optimizer", "galore_torch", "apollo_torch", "heavyball")
"""Packages whose optimizers are listed; one that cannot be imported is named on the page with the reason."""
LIMIT_S = 180
"""Time of one optimizer's checks, s, after which its process is ended."""


def names(packages: Iterable[str] = PACKAGES) -> tuple[list[str], dict[str, str]]:
    """Return the targets of all packages and our presets, and package → why it is missing; imports the packages."""
    found, missing = list(presets.names()), {}
    for package in packages:
        try:
            found += targets.members(package)
        except TargetError as error:
            missing[package] = error.reason
    return found, missing


def checks(target: str, only: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the report of one target's checks, in the form of `optbench audit --json`, without cells.

    Args:
        target: import path or preset.
        only: names of checks; None: all.
    """
    # A fork: the packages are imported once, and their imports take longer than the checks.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(target, only, theirs), daemon=True)
    process.start()
    theirs.close()
    report: dict[str, Any] | None = None
    try:
        if ours.poll(LIMIT_S):
            report = ours.recv()
    except EOFError:
        pass
    process.kill()
    process.join()
    if report is None:
        reason = f"its process ended by itself (exit code {process.exitcode})"
        if process.exitcode == -9:
            reason = f"its checks did not end within {LIMIT_S} s"
        report = {"error": reason}
    return report


def _child(target: str, only: Sequence[str] | None, pipe: Any) -> None:
    # What libraries print must not reach the terminal.
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    pipe.send(_checks(target, only))


def _checks(name: str, only: Sequence[str] | None) -> dict[str, Any]:
    import torch
    from torch import nn

    from harness.verify.audit.checks import run_checks

    class Small(nn.Module):
        """A model whose output has a gradient in every parameter."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = nn.Linear(8, 6), nn.LayerNorm(6)

        def forward(self) -> torch.Tensor:
            """Return a loss."""
            return self.norm(self.inner(torch.linspace(-1, 1, 32).view(4, 8))).square()[:, ::2].sum()

    torch.set_num_threads(1)
    report: dict[str, Any] = {"version": targets.version(name)}
    try:
        target = targets.probe(Target(name, ARGUMENTS.get(name, {})), Small)
    except TargetError as error:
        return {**report, "error": error.reason}
    notes = [note for note in [targets.FORMS[target.form]] if note]
    return {**report, "notes": notes, "checks": [check.as_dict() for check in run_checks(target, only)]}


ARGUMENTS: dict[str, dict[str, Any]] = {}
"""Arguments of constructors that have no defaults for them."""


def store() -> Path:
    """Return the path of the catalogue's file."""
    return Path(__file__).with_name("catalogue.json")
