"""Optimizer steps on toy nets: which of two equal computations takes them, and what is recorded.

What has a fast rule takes `rules`, many runs at once; the rest takes a torch optimizer on a module (`real`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from analysis.margin.net import Ascent, Nets, ToyProblem, ascent, is_dead
from analysis.margin.optimizer_specs import OptimizerSpec
from analysis.margin.rules import fast_rule, has_fast_rule

OWN_ROUNDING = 1e4
"""Updates below this many eps of a run's largest one are rounding of the rule itself, which second moments magnify."""
ABORT_AT = 10_000
"""Steps after which random starts that do not separate the points are given up."""


@dataclass(frozen=True)
class Snapshot:
    """The nets after `t` steps.

    Attributes:
        t: steps done.
        ids: (R,) which runs these are.
        nets: their weights.
    """

    t: int
    ids: NDArray[np.int64]
    nets: Nets


@dataclass
class TrainResult:
    """What training leaves behind.

    Attributes:
        snapshots: at the recorded steps.
        flags: run → (step, reason) from which its numbers mean nothing any more.
        dead: runs given up at `ABORT_AT`, or at an earlier end.
        computed_by: "rules" or "optimizers".
    """

    snapshots: list[Snapshot] = field(default_factory=list)
    flags: dict[int, tuple[int, str]] = field(default_factory=dict)
    dead: list[int] = field(default_factory=list)
    computed_by: str = ""


class Stepper(Protocol):
    """One way to take steps."""

    @property
    def nets(self) -> Nets:
        """The weights as they are now."""
        ...

    def advance(self, first: int, last: int) -> None:
        """Take the steps first … last - 1."""
        ...

    def step_and_tell(self, t: int) -> Ascent:
        """Take step t and return the updates before they were rounded into the weights, in shape of hidden and output.

        Where an update is known only by what it does, any number that is 0 with it."""
        ...

    def keep(self, mask: NDArray[np.bool_]) -> None:
        """Go on with the runs that the mask marks alone."""
        ...


def record_times(steps: int, per_decade: int, also: Sequence[int] = ()) -> list[int]:
    """Return 0, all powers of ten, `per_decade` steps in between, the last step and `also`, ascending."""
    decades = int(np.ceil(np.log10(max(steps, 1)))) + 1
    grid = np.rint(10.0 ** (np.arange(decades * per_decade + 1) / per_decade)).astype(int)
    times = {0, steps, *(10**n for n in range(decades)), *grid.tolist(), *also}
    return sorted(t for t in times if t <= steps)


def train(
    start: Nets,
    problem: ToyProblem,
    optimizer: OptimizerSpec,
    at: Sequence[int],
    *,
    gives_up: bool,
    computed_by: str = "auto",
) -> TrainResult:
    """Take max(at) steps from `start` and keep the nets at the steps `at`.

    Args:
        start: R runs; not changed.
        problem: what is minimized.
        optimizer: with its options.
        at: ascending steps to record; the first is 0.
        gives_up: drop, after `ABORT_AT` steps, the runs of which a point is on the wrong side; fewer steps name them
            at their end.
        computed_by: "auto" or one of the two ways; both give the same numbers.
    """
    ids = np.arange(start.runs)
    stepper, name = _stepper(start.copy(), problem, optimizer, computed_by)
    out = TrainResult(computed_by=name)
    done = 0
    extra = {ABORT_AT} if gives_up and at[-1] >= ABORT_AT else set[int]()
    for t in sorted(extra.union(at)):
        if t > done:
            _one_watched_step(stepper, problem, optimizer, done, ids, out)
            stepper.advance(done + 1, t)
            done = t
        if t in at:
            out.snapshots.append(Snapshot(t, ids.copy(), stepper.nets.copy()))
        if gives_up and t == ABORT_AT:
            alive = ~is_dead(stepper.nets, problem)
            out.dead += ids[~alive].tolist()
            if not alive.all():
                stepper.keep(alive)
                ids = ids[alive]
            if not len(ids):
                break
    if gives_up and len(ids) and done < ABORT_AT:
        out.dead += ids[is_dead(stepper.nets, problem)].tolist()
    return out


def _one_watched_step(
    stepper: Stepper,
    problem: ToyProblem,
    optimizer: OptimizerSpec,
    t: int,
    ids: NDArray[np.int64],
    out: TrainResult,
) -> None:
    """Take one step, and flag runs in which rounding holds a weight that the update would move.

    The applied update is asked, not the gradient: a projection may leave a weight out, up to its own rounding.
    """
    # Runs that diverge are named by their last state.
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        before = stepper.nets.copy()
        updates = stepper.step_and_tell(t)
        pull = ascent(before, problem, scale_free=optimizer.scale_free)
        lost = np.zeros(len(ids), dtype=bool)
        silent = ~is_dead(before, problem)
        flat = (-1, len(ids))
        told = [np.abs(update.reshape(flat)) for update in updates if update is not None]
        least = OWN_ROUNDING * np.finfo(before.hidden.dtype).eps * np.concatenate(told).max(0)
        for old, new, update, gradient in zip(before, stepper.nets, updates, pull):
            if update is not None and gradient is not None:
                lost |= ((old == new) & (np.abs(update) > least)).reshape(flat).any(0)
                silent &= (gradient == 0.0).reshape(flat).all(0)
    for mask, reason in (
        (lost, "an update is below half a unit in the last place"),
        (silent, "the gradient underflows to 0"),
    ):
        for run in ids[mask].tolist():
            out.flags.setdefault(run, (t, reason))


def _stepper(
    start: Nets, problem: ToyProblem, optimizer: OptimizerSpec, computed_by: str
) -> tuple[Stepper, str]:
    shape = start.hidden.shape[0], start.hidden.shape[1]
    is_fast = has_fast_rule(optimizer, shape, train_output=problem.train_output)
    if computed_by in ("auto", "rules") and is_fast:
        return _RuleStepper(start, problem, optimizer), "rules"
    # torch is imported here: the default job takes a second without it.
    from analysis.margin.real import TorchStepper

    return TorchStepper(start, problem, optimizer), "optimizers"


class _RuleStepper:
    """`rules` as a stepper."""

    def __init__(self, start: Nets, problem: ToyProblem, optimizer: OptimizerSpec) -> None:
        self.nets = start
        self._problem, self._optimizer = problem, optimizer
        self._rule = fast_rule(optimizer, (start.hidden.shape[0], start.hidden.shape[1]))

    def advance(self, first: int, last: int) -> None:
        """Take steps, in place."""
        for t in range(first, last):
            self.step_and_tell(t)

    def step_and_tell(self, t: int) -> Ascent:
        """Take one step, in place; the rules count their steps themselves."""
        lr, decay = self._optimizer.lr, 1.0 - self._optimizer.lr * self._optimizer.weight_decay
        weights = [self.nets.hidden, self.nets.output] if self._problem.train_output else [self.nets.hidden]
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            pull = ascent(self.nets, self._problem, scale_free=self._optimizer.scale_free)
            updates = self._rule.update([-part for part in pull if part is not None])
            for weight, update in zip(weights, updates):
                if decay != 1.0:
                    weight *= decay
                weight -= lr * update
        return Ascent(updates[0], updates[1] if len(updates) > 1 else None)

    def keep(self, mask: NDArray[np.bool_]) -> None:
        """Drop runs, and the rule's state of them."""
        self.nets = Nets(*(np.ascontiguousarray(part) for part in self.nets.select(mask)))
        self._rule.keep(mask)
