"""What the rank processes of an audit do: probe a target, run a cell, judge it against the reference."""

from __future__ import annotations

import gc
import json
import linecache
import os
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.verify.audit import targets
from harness.verify.audit.cells import LATE_STEPS, EngineCell
from harness.verify.audit.classify import Class, classify
from harness.verify.audit.document import CellReport
from harness.verify.audit.engines import AuditedRun, NotSupported, running
from harness.verify.audit.given_model import Given, GivenModel, given
from harness.verify.audit.judge import Trajectory, judge
from harness.verify.audit.loop_defects import CHANGES
from harness.verify.audit.targets import Target, TargetError

HARNESS = Path(__file__).parents[2]


class CellFailed(Exception):
    """A cell raised an exception; the message is the JSON of a `Failure`."""


@dataclass(frozen=True)
class Failure:
    """How a cell ended early.

    Attributes:
        step: that failed, from 1; 0: the optimizer or the engine could not be set up.
        message: type and first line of the exception.
        is_refusal: a ``raise`` of the optimizer's or the engine's own says so, before a weight changed.
    """

    step: int
    message: str
    is_refusal: bool


def start(rank: int, folder: Path) -> None:
    """Prepare a rank process."""
    # What is imported is no garbage: ZeRO-3 collects in each of its initializations.
    gc.collect()
    gc.freeze()
    # ZeRO-3 formats every parameter for a log that nobody reads.
    torch.set_printoptions(threshold=4, edgeitems=1)


def members(package: str) -> list[str] | TargetError:
    """Return the targets of a package, or why there are none."""
    try:
        return targets.members(package)
    except TargetError as error:
        return error


def probe(target: Target) -> Target | TargetError:
    """Return a target with the form that it takes, or why it cannot be audited."""
    data = _given("even", False, LATE_STEPS)

    def loss(model: nn.Module) -> Tensor:
        return model(data.gradients[0])

    try:
        with torch.compiler.set_stance("force_eager"):
            return targets.probe(target, lambda: GivenModel(data.start), loss)
    except TargetError as error:
        return error


def measure_class(target: Target) -> Class | TargetError:
    """Return the class of a target's update, or why it has none."""
    try:
        with torch.compiler.set_stance("force_eager"):
            return classify(target, _given("even", False, LATE_STEPS))
    except TargetError as error:
        return error


def run_cell(
    cell: EngineCell, target: Target, steps: int, path: Path, loop_defect: str | None = None
) -> bool:
    """Run a cell on this rank (a collective); rank 0 writes its trajectory for `judge_cell`.

    Args:
        cell: which.
        target: the optimizer.
        steps: number of them.
        path: of the trajectory.
        loop_defect: key of `loop_defects.CHANGES`, put in on purpose.

    Returns:
        True if the ranks' replicas of the weights are equal.

    Raises:
        CellFailed: the optimizer or the engine raised an exception.
    """
    data = given_of(cell, steps)
    step = 0
    try:
        # torch.compile would cost more than a whole audit and computes the same.
        with torch.compiler.set_stance("force_eager"), running(cell, target, data) as run:
            if loop_defect:
                CHANGES[loop_defect](run)
            for step in range(1, steps + 1):
                run.train_step(step - 1)
            received, made = run.whole(run.received), run.whole(run.made)
            equal = _replicas_equal(run)
            if run.rank == 0:
                torch.save({"received": received, "made": made}, path)
    except (Exception, SystemExit) as error:
        changed = step > 1
        raise CellFailed(json.dumps(vars(failure(error, step, changed)))) from error
    return equal


def judge_cell(
    cell: EngineCell, target: Target, steps: int, path: Path, measured: Class, replicas_equal: bool
) -> CellReport:
    """Judge the trajectory that `run_cell` wrote."""
    loaded = torch.load(path)
    trajectory = Trajectory(loaded["received"], loaded["made"], replicas_equal)
    with torch.compiler.set_stance("force_eager"):
        return judge(cell, target, given_of(cell, steps), trajectory, measured)


def failure(error: BaseException, step: int, changed: bool) -> Failure:
    """Describe an exception, and tell a refusal from a crash.

    Args:
        error: that a cell raised.
        step: from 1; 0: before the first one.
        changed: earlier steps have changed weights.
    """
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    if isinstance(error, NotSupported | TargetError):
        return Failure(step, str(error), True)
    return Failure(step, message, not changed and _is_raised_on_purpose(error.__traceback__))


def _is_raised_on_purpose(trace: TracebackType | None) -> bool:
    """Return True if a ``raise`` or ``assert`` of an optimizer or an engine ended it, not an operation on tensors."""
    frames = traceback.extract_tb(trace)
    if not frames:
        return False
    last = frames[-1]
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    if not line.startswith(("raise ", "assert ")):
        return False
    torch_home = os.path.dirname(torch.__file__)
    allowed = (os.path.join(torch_home, "optim"), os.path.join(torch_home, "distributed", "optim"))
    return not last.filename.startswith(torch_home) or last.filename.startswith(allowed)


def given_of(cell: EngineCell, steps: int) -> Given:
    """Return the weights and gradients of a cell."""
    return _given(cell.sizes, cell.dtype != "fp32", steps)


def _given(sizes: Any, is_coarse: bool, steps: int) -> Given:
    key = sizes, is_coarse
    if key not in _GIVEN:
        _GIVEN[key] = given(sizes, is_coarse=is_coarse, steps=LATE_STEPS)
    whole = _GIVEN[key]
    return replace(whole, gradients=whole.gradients[:steps], offsets=whole.offsets[:steps])


_GIVEN: dict[tuple[str, bool], Given] = {}


def _replicas_equal(run: AuditedRun) -> bool:
    """Compare the working weights of ranks that hold the same ones (a collective)."""
    held = run.replica()
    if run.cell.world_size == 1:
        return True
    digests: list[Any] = [None] * run.cell.world_size
    own = None if held is None else (held[1], held[0].numpy().tobytes())
    dist.all_gather_object(digests, own)
    return len({digest for digest in digests if digest is not None}) == len(
        {digest[0] for digest in digests if digest is not None}
    )
