"""Audit targets in pools of rank processes, one target after the other. Torch-free.

The code of a target runs in these processes only: what crashes, hangs or prints there ends or fills one of them.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from harness.errors import InputError
from harness.verify.audit.cells import EngineCell
from harness.verify.audit.controls import Control
from harness.verify.audit.document import CONTROL, FIRST_STEP, RESUME_ACROSS, CellReport, Check, TargetReport
from harness.verify.audit.targets import FORMS, Target, TargetError, version
from harness.verify.pool import RankLost, RankPool, RanksFailed

PRELOAD = ("harness.verify.audit.quiet", "harness.verify.audit.preload")
"""What the rank processes inherit."""
PACKAGES = "OPTBENCH_AUDIT_PACKAGES"
RANKS = "harness.verify.audit.ranks"
CELL_S = 60.0
"""Time limit of a cell, and of the import of a target with its first steps, s."""
GRACE_S = 3.0
"""Time that the other ranks get once one has failed, s."""
CHECKS = "harness.verify.audit.checks"
CHECKS_LABEL = "checks"
CHECK_SHARE = 0.75
"""Time limit of a check over that of a cell."""
RESUME = "harness.verify.audit.checks_ranks:resume_across"

Say = Callable[[TargetReport, int, int], None]
"""Receives each report with the number of reports so far and of targets in all."""


class Ranks(Protocol):
    """What `cell_report` needs of a `RankPool`."""

    def run(self, target: str, *args: Any, what: str, timeout_s: float) -> list[Any]:
        """Call a function on every rank."""
        ...

    def close(self, kill: bool = False) -> None:
        """End the processes."""
        ...


class Session:
    """The pools of an audit: one process that knows the reference, and groups of two and four ranks.

    Args:
        folder: scratch folder.
        cell_s: time limit of a cell, s.
        deadline: `time.monotonic` after which no cell and no check begins; None: none.
    """

    def __init__(self, folder: Path, cell_s: float = CELL_S, deadline: float | None = None) -> None:
        self._folder, self._cell_s, self._deadline = folder, cell_s, deadline
        self._pools: dict[int, RankPool] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind:
            # Nobody waits for what the ranks compute.
            for pool in self._pools.values():
                pool.close(kill=True)
        self._stack.close()

    @property
    def is_late(self) -> bool:
        """Return True after the deadline."""
        return self._deadline is not None and time.monotonic() > self._deadline

    def pool(self, world_size: int) -> RankPool:
        """Return the pool of this many ranks, started when it is first needed."""
        if world_size not in self._pools:
            folder = self._folder / f"ranks{world_size}"
            pool = RankPool(world_size, folder, f"{RANKS}:start", preload=PRELOAD, grace_s=GRACE_S)
            self._pools[world_size] = self._stack.enter_context(closing(pool))
        return self._pools[world_size]

    def members(self, package: str) -> list[Target]:
        """Return the optimizers of a package.

        Raises:
            InputError: it cannot be imported, or has none.
        """
        found = self._alone("members", package, what=f"importing {package}")
        if isinstance(found, TargetError):
            raise InputError("--all", package, found.reason, fix=found.fix or None)
        return [Target(name) for name in found]

    def probe(self, target: Target) -> Target:
        """Return a target with the form in which it takes parameters.

        Raises:
            TargetError: it cannot be audited.
        """
        found = self._alone("probe", target, what=f"the first steps of {target.label}")
        if isinstance(found, TargetError):
            raise found
        return found

    def _alone(self, function: str, argument: object, what: str) -> Any:
        try:
            return self.pool(1).run(f"{RANKS}:{function}", argument, what=what, timeout_s=self._cell_s)[0]
        except RankLost as error:
            return TargetError(f"{_lost(error)} on import or in its first steps")
        except RanksFailed as error:
            return TargetError(f"fails: {str(error).strip().splitlines()[-1]}")

    def audit(self, target: Target, cells: Sequence[EngineCell], *, has_checks: bool = True) -> TargetReport:
        """Audit one target on the cells.

        Args:
            target: as `probe` returned it.
            cells: to run.
            has_checks: also run the checks of one process.
        """
        if self.is_late:
            labels = [cell.label for cell in cells]
            return TargetReport(target.label, not_run=(*labels, *([CHECKS_LABEL] if has_checks else [])))
        began = time.monotonic()
        one = self.pool(1)
        one.run("harness.verify.audit.judge:forget")
        try:
            measured = one.run(f"{RANKS}:measure_class", target, what=target.label, timeout_s=self._cell_s)[0]
        except (RankLost, RanksFailed) as error:
            measured = TargetError(f"its class cannot be measured: {_reason(error)}")
        if isinstance(measured, TargetError):
            return TargetReport(target.label, error=measured.reason, version=version(target.name))
        reports: list[CellReport] = []
        not_run: list[str] = []
        for cell in cells:
            if self.is_late:
                not_run.append(cell.label)
            else:
                reports.append(self._cell(cell, target, measured))
        checks, missing = self._checks(target) if has_checks else ([], "")
        if missing:
            not_run.append(missing)
        return TargetReport(
            target.label,
            measured.name,
            measured.explanation,
            tuple(reports),
            tuple(checks),
            version(target.name),
            tuple(filter(None, [FORMS[target.form]])),
            not_run=tuple(not_run),
            seconds=time.monotonic() - began,
        )

    def controls(self, selected: Sequence[Control]) -> list[TargetReport]:
        """Return one report per control: each must be wrong."""
        reports = []
        for control in selected:
            label = f"{CONTROL}{control.name}"
            if self.is_late:
                reports.append(TargetReport(label, not_run=(control.cell.label,)))
                continue
            self.pool(1).run("harness.verify.audit.judge:forget")
            measured = self.pool(1).run(f"{RANKS}:measure_class", control.target)[0]
            cell = self._cell(control.cell, control.target, measured, control.loop_defect)
            cells = (replace(cell, control=control.name),)
            reports.append(TargetReport(label, measured.name, cells=cells))
        return reports

    def _cell(
        self, cell: EngineCell, target: Target, measured: Any, loop_defect: str | None = None
    ) -> CellReport:
        def judge(*arguments: object) -> CellReport:
            one = self.pool(1)
            what = f"the reference for {cell.label}"
            return one.run(f"{RANKS}:judge_cell", *arguments, what=what, timeout_s=self._cell_s)[0]

        path = self._folder / "trajectory.pt"
        return cell_report(
            self.pool(cell.world_size), cell, target, measured, path, judge, self._cell_s, loop_defect
        )

    def _checks(self, target: Target) -> tuple[list[Check], str]:
        """Return the checks that ran, and the label of those for which there was no time; "" if all ran.

        Each is a call of its own, so that one that hangs or ends its process costs no other.
        """
        if self.is_late:
            return [], CHECKS_LABEL
        # A rank then says itself what did not end; only a call into C++ that hangs ends the rank.
        limit_s = CHECK_SHARE * self._cell_s
        names = self._check(FIRST_STEP, 1, f"{CHECKS}:first_step", target, limit_s)
        if isinstance(names, Check):
            return [names], CHECKS_LABEL if names.passed is None else ""
        found: list[Check] = []
        for name in names:
            if self.is_late:
                return found, f"{CHECKS_LABEL} from {name} on"
            found.append(self._check(name, 1, f"{CHECKS}:run_check", target, name, limit_s))
        if self.is_late:
            return found, f"{CHECKS_LABEL} from {RESUME_ACROSS} on"
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            found.append(self._check(RESUME_ACROSS, 2, RESUME, target, folder))
        return found, ""

    def _check(self, name: str, world_size: int, function: str, *arguments: object) -> Any:
        """Return what rank 0 answers, or a failed check."""
        try:
            return self.pool(world_size).run(function, *arguments, what=name, timeout_s=self._cell_s)[0]
        except (RankLost, RanksFailed) as error:
            return Check(name, False, _reason(error))


def preload(names: Sequence[str]) -> None:
    """Let every rank process start with the packages of targets imported; call it before the first process starts.

    Args:
        names: import paths. Only installed packages are imported early: a module of the user's may crash or hang.
    """
    installed = metadata.packages_distributions()
    packages = dict.fromkeys(name.partition(".")[0] for name in names)
    os.environ[PACKAGES] = ",".join(package for package in packages if package in installed)


def cell_report(
    pool: Ranks,
    cell: EngineCell,
    target: Target,
    measured: Any,
    path: Path,
    judge: Callable[..., CellReport],
    limit_s: float = CELL_S,
    loop_defect: str | None = None,
) -> CellReport:
    """Run a cell on a pool of its ranks and return the verdict.

    Args:
        pool: has as many ranks as the cell.
        cell: which.
        target: the optimizer.
        measured: its `classify.Class`.
        path: file for the trajectory.
        judge: `ranks.judge_cell`, or a call of it in another process.
        limit_s: time limit, s.
        loop_defect: put in on purpose.
    """
    what = f"{target.label} on {cell.label}"
    try:
        equal = pool.run(
            f"{RANKS}:run_cell",
            cell,
            target,
            measured.steps,
            path,
            loop_defect,
            what=what,
            timeout_s=limit_s,
        )
        return judge(cell, target, measured.steps, path, measured, all(equal))
    except RankLost as error:
        return _failed(cell, None, _lost(error), is_refusal=False)
    except RanksFailed as error:
        if not _is_failure(error):
            # What was left behind may break the next cell.
            pool.close(kill=True)
            return _failed(cell, None, _reason(error), is_refusal=False)
        failure = json.loads(str(error).strip().splitlines()[-1].partition(": ")[2])
        return _failed(cell, failure["step"], failure["message"], is_refusal=failure["is_refusal"])


def _failed(cell: EngineCell, step: int | None, message: str, *, is_refusal: bool) -> CellReport:
    """Return the report of a cell that did not run to its end; step 0: it could not be set up."""
    return CellReport(
        cell.engine,
        cell.world_size,
        "refused" if is_refusal else "crashes",
        first_step=step or None,
        reason=f"before the first step: {message}" if step == 0 else message,
        variant=cell.variant,
    )


def _is_failure(error: RanksFailed) -> bool:
    return ".CellFailed: {" in str(error).strip().splitlines()[-1]


def _lost(error: RankLost) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0].partition(" in ")[0]
    if "no answer" in first:
        return f"gives no answer ({first})"
    # What C++ says before it aborts.
    what = next((line.partition("what():")[2].strip() for line in reversed(lines) if "what():" in line), "")
    return f"ends the process ({first}{': ' if what else ''}{what[:150]})"


def _reason(error: Exception) -> str:
    if isinstance(error, RankLost):
        return _lost(error)
    return str(error).strip().splitlines()[-1][:300]
