"""Defects of other implementations, put in on purpose: a certificate that stays green under one proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from harness.loop import Run
from harness.verify.cells import MAX_NORM
from harness.verify.step_recorder import StepRecorder
from optimizers.interfaces import MatrixRef
from optimizers.layouts.batches import make_batch_states
from optimizers.layouts.layout import Bucket, LocalBucket, Unsharded
from optimizers.layouts.replicated import ReplicaCollectives
from optimizers.layouts.sharded import ShardedLayout
from optimizers.linalg import dwh
from optimizers.linalg import subspace as sketches
from optimizers.rule import Rule


@dataclass
class Defect:
    """Code that makes a run wrong on purpose.

    Attributes:
        around: context that is entered before the run is assembled and left after training.
        change: called with the assembled run and its recorder.
    """

    around: Callable[[], AbstractContextManager[object]] = nullcontext
    change: Callable[[Run, StepRecorder], None] = lambda run, recorder: None


@contextmanager
def _shard_local() -> Iterator[None]:
    """Orthogonalize on every rank only the rows that it holds."""

    def buckets(
        self: ShardedLayout, matrices: Sequence[MatrixRef], rule: Rule, options: Mapping[str, Any]
    ) -> list[Bucket]:
        def shapes(matrix: MatrixRef) -> dict[str, tuple[int, ...]]:
            return rule.state(matrix.view.shape, options)

        return [LocalBucket(rule, make_batch_states(matrices, options, shapes), Unsharded())]

    with patch.object(ShardedLayout, "buckets", buckets):
        yield


def _clip_updates(run: Run, recorder: StepRecorder) -> None:
    """Clip the update instead of the gradient, as DeepSpeed's default does with its Muon."""
    step = run.engine.step
    parameters = [p for p in run.model.parameters() if p.requires_grad]

    @torch.no_grad()
    def clipped_late(max_norm: float | None) -> tuple[Tensor, Tensor]:
        before = [p.detach().clone() for p in parameters]
        result = step(None)
        lr = run.optimizer.param_groups[0]["lr"]
        moved = torch.stack([((p - b) / lr).norm() for p, b in zip(parameters, before)]).norm()
        factor = min(1.0, MAX_NORM / float(moved))
        for parameter, b in zip(parameters, before):
            parameter.copy_(b + factor * (parameter - b))
        return result

    run.engine.step = clipped_late  # pyright: ignore[reportAttributeAccessIssue]


def _step_per_micro_batch(run: Run, recorder: StepRecorder) -> None:
    """Advance momentum and orthogonalize with every micro-batch; update the weights once."""
    micro_step, step = run.engine.micro_step, type(run.optimizer).step

    def always_last(*, last: bool) -> AbstractContextManager[object]:
        return _then(micro_step(last=True), lambda: None if last else advance())

    def advance() -> None:
        rates = [group["lr"] for group in run.optimizer.param_groups]
        for group in run.optimizer.param_groups:
            group["lr"] = 0.0
        step(run.optimizer)
        for group, rate in zip(run.optimizer.param_groups, rates):
            group["lr"] = rate

    run.engine.micro_step = always_last  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def _then(inner: AbstractContextManager[object], after: Callable[[], None]) -> Iterator[None]:
    with inner:
        yield
    after()


@contextmanager
def _nothing_routed() -> Iterator[None]:
    """Let no parameter look like a matrix, as under `zero.Init`, whose shards are flat, without an error."""
    from optimizers import groups

    route = groups.route

    def flat(named: Sequence[tuple[str, Tensor]], rule: str, *args: Any, **kwargs: Any) -> list[Any]:
        return route(named, "adamw", *args, **kwargs)

    with patch.object(groups, "route", flat), patch.object(groups, "require_matrices", lambda *args: None):
        yield


@contextmanager
def _own_sketches() -> Iterator[None]:
    """Draw different test matrices on every rank."""
    from optimizers.rules.parts import subspaces

    drawn = sketches.test_matrix

    def own(
        seed: int, name: str, refresh: int, shape: tuple[int, ...], device: torch.device | str = "cpu"
    ) -> Tensor:
        return drawn(seed + dist.get_rank(), name, refresh, shape, device)

    with patch.object(subspaces, "test_matrix", own):
        yield


@contextmanager
def _own_bases() -> Iterator[None]:
    """Draw different test matrices on every replica, and keep each replica's own basis."""
    with _own_sketches(), patch.object(ReplicaCollectives, "broadcast_bases", Unsharded.broadcast_bases):
        yield


def _never_clip(run: Run, recorder: StepRecorder) -> None:
    """Read the clipping bound, but do not apply it."""
    step = run.engine.step
    run.engine.step = lambda max_norm: step(None)  # pyright: ignore[reportAttributeAccessIssue]


def _halve_gradients(run: Run, recorder: StepRecorder) -> None:
    """Average the gradients twice."""
    backward = run.engine.backward
    run.engine.backward = lambda loss: backward(loss / 2)  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def _smooth_cut() -> Iterator[None]:
    """Damp directions about the cut by σ²/(σ² + cut²) instead of dropping those below it."""

    def smooth(scaled: Tensor, cut: float) -> tuple[Tensor, Tensor, Tensor]:
        identity = torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)
        weight = torch.linalg.solve(scaled + cut * cut * identity, scaled)
        return weight, torch.ones_like(scaled[:, 0, 0]), torch.zeros_like(scaled[:, 0, 0], dtype=torch.bool)

    with patch.object(dwh, "spectral_projector", smooth):
        yield


DEFECTS: Mapping[str, Defect] = {
    "shard-local Newton–Schulz": Defect(around=_shard_local),
    "clipping after orthogonalization": Defect(change=_clip_updates),
    "micro-batch momentum": Defect(change=_step_per_micro_batch),
    "no matrix routed": Defect(around=_nothing_routed),
    "unsynchronized basis, shards": Defect(around=_own_sketches),
    "unsynchronized basis, replicas": Defect(around=_own_bases),
    "smooth cut": Defect(around=_smooth_cut),
    "clipping forgotten": Defect(change=_never_clip),
    "gradients halved": Defect(change=_halve_gradients),
}
"""The defects of `cells.CONTROLS` by name."""
