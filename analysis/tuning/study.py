"""Run a tuning study: plan the trials, train them, read their results, and train the best settings on fresh seeds.

Torch-free: each run trains in processes of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.compare import sessions
from analysis.compare.arguments import ArmSpec, ComparisonPlan
from analysis.runs import reading, tuning_ledger
from analysis.runs.measure import LOSS, final_value, measure_of
from analysis.runs.tuning_ledger import FILE, LEDGER_SCHEMA_VERSION, SPENT, TRIALS, Trial, TunedArm
from analysis.tuning import space
from analysis.tuning.arguments import Study
from analysis.tuning.space import Values
from harness.config import checks, compose
from harness.errors import ExitCode, InputError
from harness.files import atomic
from harness.preparation import Prepared, prepare
from harness.record import folder as run_folder

NOTHING_FINITE = 1
"""Exit code: an optimizer has no trial with a finite loss."""
Make = Callable[[Sequence[str]], Prepared]
"""Composes and checks the run of some overrides."""


@dataclass(frozen=True)
class PlannedTrial:
    """A trial that is ready to start.

    Attributes:
        label: of the arm.
        number: from 1.
        values: options that the trial sets.
        run: composed and checked.
        added: True if the extension added it.
    """

    label: str
    number: int
    values: Values
    run: Prepared
    added: bool = False


class Tuning:
    """A study in progress: the trials, their extension, and the comparison of the best settings on fresh seeds.

    Attributes:
        home: folder of the comparison, with the ledger.
        trials_home: folder of the trials.
        trials: planned so far.
    """

    def __init__(self, study: Study, trainer: sessions.Trainer, make: Make | None = None) -> None:
        """Compose and check every trial; nothing is started.

        Args:
            study: optimizers, search spaces and budget.
            trainer: trains the runs.
            make: composes and checks a run; None: as it will run on this machine.

        Raises:
            InputError: the first error in any of them.
        """
        self._study, self._trainer = study, trainer
        self._make = make or (lambda words: prepare(words, say=trainer.say, writes_folder=False))
        self.trials = plan_trials(study, self._make)
        if study.tune_by == "metric" and self.trials[0].run.config.task.name == "pretrain":
            raise InputError(
                "tune_by", "metric", "needs a task with a metric", allowed="loss", fix="tune_by=loss"
            )
        self.trials_home = self.trials[0].run.folder.parent
        self.home: Path = self.trials_home.with_name(study.plan.group)
        self.read_ledger()

    def arms(self) -> list[TunedArm]:
        """Return the current result of every optimizer, read from the run folders."""
        return [
            read_arm(self._study, arm, self.trials, self._confirmed.get(arm.label, ()))
            for arm in self._study.plan.arms
        ]

    def tune(self) -> int:
        """Train the trials, and add more while a best one is on an edge; return 0, or 75 if interrupted."""
        # Another command may have changed this group since this one was checked.
        self.read_ledger()
        session = self._session(self.trials)
        self.make_folders()
        if self._train(session) == ExitCode.RESUMABLE:
            return ExitCode.RESUMABLE
        for _ in range(self._study.extend):
            more = self.extend()
            if not more:
                break
            if self._train(self._session(more)) == ExitCode.RESUMABLE:
                return ExitCode.RESUMABLE
        return ExitCode.DONE

    def make_folders(self) -> None:
        """Make the folders of the study, and mark that of the trials as such."""
        self.home.mkdir(parents=True, exist_ok=True)
        self.trials_home.mkdir(parents=True, exist_ok=True)
        marker = {"schema_version": LEDGER_SCHEMA_VERSION, "study": self._study.plan.group}
        atomic.write_json(self.trials_home / TRIALS, marker)

    def confirm(self) -> tuple[int, ComparisonPlan]:
        """Train the best setting of every optimizer on fresh seeds.

        Returns:
            Exit code (0; 3: a run failed or diverged; 75: interrupted), and the plan of the comparison.
        """
        plan, runs = self.plan_confirmation()
        session = sessions.Session(runs, self._trainer, group=plan.group)
        return session.train(), plan

    def plan_confirmation(self, *, writes: bool = True) -> tuple[ComparisonPlan, list[Prepared]]:
        """Plan the runs of the best settings on fresh seeds.

        Args:
            writes: write their identities into the ledger, and archive runs of a setting that is no longer the best.

        Returns:
            The plan of the comparison and its runs, in the order of training.
        """
        plan = self._study.plan
        numbers = {arm.label: arm.best for arm in self.arms() if arm.best is not None}
        settings = {(trial.label, trial.number): trial.values for trial in self.trials}
        best = [
            with_values(arm, settings[arm.label, numbers[arm.label]])
            for arm in plan.arms
            if arm.label in numbers
        ]
        plan = replace(plan, arms=best)
        runs = [self._make(plan.overrides(arm, seed)) for seed in plan.seeds for arm in plan.arms]
        if writes:
            self.record_confirmation(plan, runs)
        return plan, runs

    def record_confirmation(self, plan: ComparisonPlan, runs: Sequence[Prepared]) -> None:
        """Write the identities of the runs of `plan_confirmation`, and archive those that they replace."""
        self._archive_outdated(runs, [identity for known in self._confirmed.values() for identity in known])
        count = len(plan.arms)
        self._confirmed = {
            arm.label: [run.identity for run in runs[i::count]] for i, arm in enumerate(plan.arms)
        }
        self.write_ledger()

    def archive_confirmation(self) -> None:
        """Archive all runs of the arms on fresh seeds, for a study that is to be repeated."""
        for place in self._confirmation_folders():
            if place.exists():
                run_folder.archive(place)

    def _confirmation_folders(self) -> list[Path]:
        plan = self._study.plan
        return [self.home / f"{arm.label}-seed{seed}" for arm in plan.arms for seed in plan.seeds]

    def write_ledger(self) -> None:
        """Write the ledger; it keeps optimizers that an earlier command tuned in this group."""
        atomic.write_json(self.home / FILE, self.ledger())

    def ledger(self) -> dict[str, object]:
        """Return the ledger as JSON data."""
        arms = self.arms()
        labels = {arm.label for arm in arms}
        earlier = [arm for arm in self._earlier if arm.label not in labels]
        first = self.trials[0].run
        return {
            "schema_version": LEDGER_SCHEMA_VERSION,
            "command": self._study.plan.command,
            "trials_group": self._study.trials_group,
            "comparison_key": first.comparison_key,
            "steps": first.config.steps,
            "world_size": first.config.world_size,
            "seed": self._study.seed,
            "tune_by": self._study.tune_by,
            "fresh_seeds": self._study.plan.seeds,
            "arms": tuning_ledger.to_json([*earlier, *arms]),
        }

    def exit_code(self) -> int:
        """Return the exit code of the trials: 3 if one failed, 1 if an optimizer has no finite one, else 0."""
        arms = self.arms()
        if any(trial.state not in SPENT for arm in arms for trial in arm.trials):
            return ExitCode.RUN_FAILED
        return NOTHING_FINITE if any(arm.best is None for arm in arms) else ExitCode.DONE

    def read_ledger(self) -> None:
        """Read what earlier commands tuned in this group."""
        self._earlier = tuning_ledger.read(self.home)
        self._confirmed: dict[str, list[str]] = {arm.label: list(arm.confirmed) for arm in self._earlier}
        self._check_home()

    def _check_home(self) -> None:
        """Refuse a group in which another command has runs of the same names, before the trials are trained."""
        own = {identity for known in self._confirmed.values() for identity in known}
        for place in self._confirmation_folders():
            existing = reading.mapping(place / "status.json", []).get("identity")
            if existing is not None and existing not in own and not self.trials[0].run.config.overwrite:
                reason = f"already has {place} of another command, which this comparison would replace"
                raise InputError("group", self._study.plan.group, reason, fix="group=… of your own")

    def _train(self, session: sessions.Session) -> int:
        self.write_ledger()
        return session.train(self.write_ledger)

    def _session(self, trials: Sequence[PlannedTrial]) -> sessions.Session:
        plan = self._study.plan
        runs = [trial.run for trial in trials]
        later = len(plan.arms) * len(plan.seeds) * runs[0].config.steps
        return sessions.Session(
            runs, self._trainer, group=plan.group, is_over=sessions.has_ended, steps_later=later
        )

    def extend(self) -> list[PlannedTrial]:
        """Add one more trial for every optimizer if a best one is on an edge or an optimizer has none; else none.

        After a failed trial the budgets are unequal, which more trials would not correct.
        """
        arms = self.arms()
        ended = all(trial.state in SPENT for arm in arms for trial in arm.trials)
        if not ended or not any(arm.edges or arm.best is None for arm in arms):
            return []
        where = [
            f"{arm.label} ({', '.join(arm.edges.values()) or 'none finished'})"
            for arm in arms
            if arm.edges or arm.best is None
        ]
        self._trainer.say(
            f"best learning rate on the edge of the tried ones: {', '.join(where)}; one more trial for every optimizer"
        )
        more = [
            plan_trial(
                self._study,
                arm,
                len(tuned.trials) + 1,
                next_setting(tuned, self.trials),
                self._make,
                added=True,
            )
            for arm, tuned in zip(self._study.plan.arms, arms, strict=True)
        ]
        earlier = [t.identity for arm in self._earlier for t in arm.trials if t.added]
        self._archive_outdated([trial.run for trial in more], earlier)
        self.trials += more
        return more

    def _archive_outdated(self, runs: Sequence[Prepared], own: Sequence[str]) -> None:
        """Archive runs of this study whose setting is no longer the best one or beyond the edge."""
        for run in runs:
            existing = reading.mapping(run.folder / "status.json", []).get("identity")
            if existing is not None and existing != run.identity and existing in own:
                run_folder.archive(run.folder)
                self._trainer.say(f"{run.folder}: its setting is no longer the best one, archived")


def with_values(arm: ArmSpec, values: Values) -> ArmSpec:
    """Return the arm with these options set, replacing its own."""
    own = tuple(f"optimizer.{key}={value}" for key, value in values.items())
    names = tuple(f"optimizer.{key}=" for key in values)
    kept = (override for override in arm.overrides if not override.startswith(names))
    return ArmSpec(arm.label, (*kept, *own))


def plan_trials(study: Study, make: Make) -> list[PlannedTrial]:
    """Plan the trials of all search spaces, with the optimizers taking turns.

    Raises:
        InputError: the first error in any of them.
    """
    points = {arm.label: _points(study, arm) for arm in study.plan.arms}
    return [
        plan_trial(study, arm, number, points[arm.label][number - 1], make)
        for number in range(1, study.trials + 1)
        for arm in study.plan.arms
    ]


def plan_trial(
    study: Study, arm: ArmSpec, number: int, values: Values, make: Make, *, added: bool = False
) -> PlannedTrial:
    """Compose and check one trial.

    Raises:
        InputError: the trial has bad input.
    """
    spec = with_values(arm, values)
    own = [f"seed={study.seed}", f"group={study.trials_group}", f"name={arm.label}-trial{number}"]
    run = make([*study.plan.shared, *spec.overrides, *own])
    return PlannedTrial(arm.label, number, values, run, added)


def _points(study: Study, arm: ArmSpec) -> list[Values]:
    axes = study.spaces[arm.label]
    if axes:
        return space.points(arm.label, axes, study.trials, study.seed)
    return space.ladder(_centre(study, arm), study.trials)


def _centre(study: Study, arm: ArmSpec) -> dict[str, float]:
    """Return the learning rates of an arm, as given or by default: ``lr``, and ``aux_lr`` unless it follows ``lr``.

    Both move: a ladder that left the rate of embeddings and head where it is would tune half of one arm, and all of
    another.
    """
    config = compose.load([*study.plan.shared, *arm.overrides])
    # Of whichever machine, because only the rates are read; without what only GPUs have.
    config = config.model_copy(update={"tf32": False, "memory_snapshot": False})
    optimizer = checks.check(config, devices=0).optimizer
    assert optimizer.lr is not None
    aux = optimizer.options.get("aux_lr")
    return {"lr": optimizer.lr, **({} if aux is None else {"aux_lr": aux})}


def read_trial(trial: PlannedTrial, *, by_metric: bool = False) -> Trial:
    """Read the result of a trial from its run folder; with ``by_metric`` also the metric of its task."""
    run = trial.run
    state = sessions.state_of(run) or "pending"
    notes: list[str] = []
    summary = reading.mapping(run.folder / "summary.json", notes) if state != "pending" else {}
    attempts = (
        reading.mapping(run.folder / "status.json", notes).get("attempts") if state != "pending" else None
    )
    loss, score = math.nan, None
    if state == "finished":
        measure = measure_of({}, summary)
        loss = final_value(LOSS, summary)
        score = measure.sign * final_value(measure, summary) if by_metric else None
        if not math.isfinite(loss if score is None else score):
            # A run may reach its last step with a loss that is not finite.
            state, loss, score = "diverged", math.nan, None
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
        score=score,
    )


def _typed(value: str) -> float | str:
    number = space.number(value)
    return number if math.isfinite(number) else value


def read_arm(
    study: Study, arm: ArmSpec, planned: Sequence[PlannedTrial], confirmed: Sequence[str] = ()
) -> TunedArm:
    """Read the current result of one optimizer."""
    own = [trial for trial in planned if trial.label == arm.label]
    results = tuple(read_trial(trial, by_metric=study.tune_by == "metric") for trial in own)
    best, axes = tuning_ledger.select(results), study.spaces[arm.label]
    tried = [trial.values for trial, result in zip(own, results, strict=True) if result.state in SPENT]
    values = next((trial.values for trial in own if best and trial.number == best.number), {})
    return TunedArm(
        label=arm.label,
        optimizer=own[0].run.config.optimizer.name,
        space={a.key: list(a.values) or [a.low, "..", a.high] for a in axes} or {"lr": "ladder"},
        trials=results,
        best=best.number if best else None,
        edges=space.edges(values, tried, axes) if best else {},
        seed=study.seed,
        confirmed=tuple(confirmed),
    )


def next_setting(arm: TunedArm, planned: Sequence[PlannedTrial]) -> Values:
    """Return the setting of one more trial: beyond the edge if the best one is there, else next to the best one."""
    own = [trial for trial in planned if trial.label == arm.label]
    spent = [(trial, result) for trial, result in zip(own, arm.trials, strict=True) if result.state in SPENT]
    costs = [result.cost for _, result in spent]
    rates = [space.number(trial.values["lr"]) for trial, _ in spent]
    if arm.best_trial is None:
        # All trials diverged: try a lower rate than all of them.
        start = min(own, key=lambda trial: space.number(trial.values["lr"])).values
        return {key: space.spelled(space.number(value) / space.FACTOR) for key, value in start.items()}
    start = next(trial.values for trial in own if trial.number == arm.best)
    return space.beyond(start, rates, costs)
