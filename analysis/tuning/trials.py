"""The trials of a study: composed and checked before anything is spent, read back when they have ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from analysis.runs import reading
from analysis.runs.tuning_ledger import SPENT, Trial, Tuned, best
from analysis.training import sessions
from analysis.training.arguments import Arm
from analysis.tuning import space
from analysis.tuning.arguments import Study
from analysis.tuning.space import Values
from harness.config import checks, compose
from harness.preparation import Prepared, prepare

Say = Callable[[str], None]


@dataclass(frozen=True)
class Planned:
    """A trial and its run.

    Attributes:
        label: whose.
        number: from 1.
        values: what is set.
        run: ready to start.
        added: by the extension.
    """

    label: str
    number: int
    values: Values
    run: Prepared
    added: bool = False


def with_values(arm: Arm, values: Values) -> Arm:
    """The arm with these options set, in place of its own."""
    own = tuple(f"optimizer.{key}={value}" for key, value in values.items())
    names = tuple(f"optimizer.{key}=" for key in values)
    return Arm(arm.label, (*(word for word in arm.overrides if not word.startswith(names)), *own))


def planned(study: Study, say: Say) -> list[Planned]:
    """The trials of the spaces, optimizers taking turns.

    Raises:
        InputError: the first thing that is wrong with any of them.
    """
    points = {arm.label: _points(study, arm) for arm in study.plan.arms}
    return [
        plan_one(study, arm, number, points[arm.label][number - 1], say)
        for number in range(1, study.trials + 1)
        for arm in study.plan.arms
    ]


def plan_one(
    study: Study, arm: Arm, number: int, values: Values, say: Say, *, added: bool = False
) -> Planned:
    """One trial, checked.

    Raises:
        InputError: what is wrong with it.
    """
    chosen = with_values(arm, values)
    own = [f"seed={study.seed}", f"group={study.trials_group}", f"name={arm.label}-trial{number}"]
    run = prepare([*study.plan.shared, *chosen.overrides, *own], say=say, writes_folder=False)
    return Planned(arm.label, number, values, run, added)


def _points(study: Study, arm: Arm) -> list[Values]:
    axes = study.spaces[arm.label]
    if axes:
        return space.points(arm.label, axes, study.trials, study.seed)
    return space.ladder(_centre(study, arm), study.trials)


def _centre(study: Study, arm: Arm) -> dict[str, float]:
    """The default learning rate, and the second one that belongs to it.

    A default of a matrix rule may come with an ``aux_lr``, which a given ``lr`` does without: then the middle of the
    ladder would not be the default.
    """
    rate, aux = _rates(study, arm, {})
    without = _rates(study, arm, {"lr": space.spelled(rate)})[1]
    return {"lr": rate, **({"aux_lr": aux} if aux is not None and aux != without else {})}


def _rates(study: Study, arm: Arm, values: Values) -> tuple[float, float | None]:
    """Learning rate and ``aux_lr`` of the arm with these options set, defaults filled in."""
    config = compose.load([*study.plan.shared, *with_values(arm, values).overrides])
    optimizer = checks.check(config).optimizer
    assert optimizer.lr is not None
    return optimizer.lr, optimizer.options.get("aux_lr")


def read(trial: Planned) -> Trial:
    """What became of a trial."""
    run = trial.run
    state = sessions.state_of(run) or "pending"
    notes: list[str] = []
    summary = reading.mapping(run.folder / "summary.json", notes) if state != "pending" else {}
    attempts = (
        reading.mapping(run.folder / "status.json", notes).get("attempts") if state != "pending" else None
    )
    loss = reading.number(summary.get("val/loss")) if state == "finished" else math.nan
    if state == "finished" and not math.isfinite(loss):
        # It reached its end with a loss that is no number.
        state = "diverged"
    return Trial(
        number=trial.number,
        values={key: _typed(value) for key, value in trial.values.items()},
        state=state,
        reason=str(attempts[-1].get("reason", ""))
        if attempts and state not in ("finished", "pending")
        else "",
        loss=loss,
        seconds=reading.number(summary.get("wall_s")),
        run=run.folder.name,
        identity=run.identity,
        added=trial.added,
    )


def _typed(value: str) -> float | str:
    number = space.number(value)
    return number if math.isfinite(number) else value


def tuned(study: Study, arm: Arm, plans: Sequence[Planned], confirmed: Sequence[str] = ()) -> Tuned:
    """One optimizer as it stands."""
    own = [plan for plan in plans if plan.label == arm.label]
    rows = tuple(read(plan) for plan in own)
    chosen, axes = best(rows), study.spaces[arm.label]
    tried = [plan.values for plan, row in zip(own, rows, strict=True) if row.state in SPENT]
    values = next((plan.values for plan in own if chosen and plan.number == chosen.number), {})
    return Tuned(
        label=arm.label,
        optimizer=own[0].run.config.optimizer.name,
        space={a.key: list(a.values) or [a.low, "..", a.high] for a in axes} or {"lr": "ladder"},
        trials=rows,
        best=chosen.number if chosen else None,
        edges=space.edges(values, tried, axes) if chosen else {},
        seed=study.seed,
        confirmed=tuple(confirmed),
    )


def further(arm: Tuned, plans: Sequence[Planned]) -> Values:
    """The setting of one more trial: past the edge where the best lies on it, else beside the best."""
    own = [plan for plan in plans if plan.label == arm.label]
    known = [(plan, row) for plan, row in zip(own, arm.trials, strict=True) if row.state in SPENT]
    losses = [row.loss if math.isfinite(row.loss) else math.inf for _, row in known]
    rates = [space.number(plan.values["lr"]) for plan, _ in known]
    if arm.chosen is None:
        # All diverged: the way out is down.
        start = min(own, key=lambda plan: space.number(plan.values["lr"])).values
        return {key: space.spelled(space.number(value) / space.FACTOR) for key, value in start.items()}
    start = next(plan.values for plan in own if plan.number == arm.best)
    return space.beyond(start, rates, losses)
