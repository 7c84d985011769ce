"""A check that needs ranks: does a sharded checkpoint resume in one process?"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from harness.verify.audit.checks import holder
from harness.verify.audit.document import RESUME_ACROSS as NAME
from harness.verify.audit.document import Check
from harness.verify.audit.subject import (
    ROUNDING,
    NotRunnable,
    Subject,
    SubjectRun,
    describe,
    difference,
    gradients_of,
    parameter,
)
from harness.verify.audit.targets import Target

SHORT = 3
"""Steps on all ranks, and steps in one process after that."""


def resume_across(target: Target, folder: str) -> Check | None:
    """Train on FSDP2 shards, save with torch's distributed checkpoint, resume on whole parameters (a collective).

    Args:
        target: that can be built.
        folder: empty, shared by the ranks.

    Returns:
        The check on rank 0, None on the others.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            shapes = Subject(lambda named: target.build(named, holder(named))).shapes
        except NotRunnable as error:
            return _on_first(Check(NAME, None, str(error)))
        try:
            sharded = _sharded(target, shapes)
            _steps(sharded, SHORT)
            whole = {
                name: p.full_tensor() if isinstance(p, DTensor) else p.clone()
                for name, p in sharded.model.named_parameters()
            }
        except Exception as error:
            return _on_first(Check(NAME, None, f"does not run on FSDP2 shards: {describe(error)}"))
        try:
            state = get_optimizer_state_dict(sharded.model, sharded.optimizer)
            save({"optimizer": state}, checkpoint_id=folder)
        except Exception as error:
            return _on_first(
                Check(NAME, False, f"torch's distributed checkpoint refuses it: {describe(error)}")
            )
        return _on_first(_resumed(target, folder, whole)) if dist.get_rank() == 0 else None


class _Sharded:
    """A model on FSDP2 shards with its optimizer."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer


def _sharded(target: Target, shapes: dict[str, tuple[int, ...]]) -> _Sharded:
    model = holder([(name, parameter(name, shape)) for name, shape in shapes.items()])
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return _Sharded(model, target.build(list(model.named_parameters()), model))


def _steps(sharded: _Sharded, steps: int) -> None:
    for step in range(steps):
        named = list(sharded.model.named_parameters())
        gradients = gradients_of(step, named)
        for name, p in named:
            assert isinstance(p, DTensor)
            p.grad = distribute_tensor(gradients[name], p.device_mesh, p.placements)
        torch.manual_seed(step)
        sharded.optimizer.step()


def _resumed(target: Target, folder: str, whole: dict[str, torch.Tensor]) -> Check:
    """Load the checkpoint into a new optimizer over whole weights, and compare the next steps with one process."""
    subject = Subject(lambda named: target.build(named, holder(named)))
    interrupted = subject.after(SHORT)
    reference = subject.after(2 * SHORT)
    named = [(name, nn.Parameter(w.detach().clone())) for name, w in whole.items()]
    before = SubjectRun(named, interrupted.optimizer, subject.uses_closure, start=interrupted.start)
    before.start = interrupted.start
    error, name = difference(before, interrupted)
    if error > ROUNDING:
        return Check(NAME, None, f"already differs on FSDP2 shards (ΔW of {name} by {error:.1e})")
    run = subject.over(named)
    model = holder(named)
    try:
        state = get_optimizer_state_dict(model, run.optimizer)
        load({"optimizer": state}, checkpoint_id=Path(folder), no_dist=True)
        set_optimizer_state_dict(model, run.optimizer, state)
    except Exception as failure:
        return Check(NAME, False, f"cannot be loaded in one process: {describe(failure)}")
    run.t, run.start = SHORT, interrupted.start
    for p, w in zip((p for _, p in named), whole.values(), strict=True):
        # torch creates missing state by a step with a rate of 0.
        p.data.copy_(w)
    for _ in range(SHORT):
        run.step()
    error, name = difference(run, reference)
    if error > ROUNDING:
        return Check(
            NAME,
            False,
            f"ΔW of {name} differs by {error:.1e} after a checkpoint of {dist.get_world_size()} ranks",
        )
    return Check(NAME, True, f"a checkpoint of {dist.get_world_size()} FSDP2 ranks resumes in one process")


def _on_first(check: Check) -> Check | None:
    return check if dist.get_rank() == 0 else None
