"""A study from its first trial to the runs that are compared. Torch-free: each run trains in processes of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from analysis.runs import reading, tuning_ledger
from analysis.runs.tuning_ledger import FILE, SCHEMA_VERSION, TRIALS, Tuned
from analysis.training import sessions
from analysis.training.arguments import Plan
from analysis.tuning import trials
from analysis.tuning.arguments import Study
from analysis.tuning.trials import Planned
from harness.errors import InputError
from harness.files import atomic
from harness.preparation import Prepared
from harness.record import folder as run_folder

DONE, NOTHING_FINITE, FAILED, INTERRUPTED = 0, 1, 3, 75


class Tuning:
    """The trials, their extension, and the comparison of the best settings on fresh seeds.

    Attributes:
        home: folder of the comparison, with the ledger.
        plans: the trials so far.
    """

    def __init__(self, study: Study, trainer: sessions.Trainer) -> None:
        """Compose and check every trial; nothing is started.

        Args:
            study: what is to be tuned and compared.
            trainer: trains the runs.

        Raises:
            InputError: the first thing that is wrong with any of them.
        """
        self._study, self._trainer = study, trainer
        self.plans = trials.planned(study, trainer.say)
        self.place = self.plans[0].run.folder.parent
        self.home: Path = self.place.with_name(study.plan.group)
        self._read_ledger()

    def arms(self) -> list[Tuned]:
        """Every optimizer of this command as it stands, from the run folders."""
        return [
            trials.tuned(self._study, arm, self.plans, self._confirmed.get(arm.label, ()))
            for arm in self._study.plan.arms
        ]

    def tune(self) -> int:
        """Make the trials, and more of them while a best lies on an edge; 0, or 75 if interrupted."""
        # Another command may have worked on this group since this one was checked.
        self._read_ledger()
        session = self._session(self.plans)
        self.home.mkdir(parents=True, exist_ok=True)
        self.place.mkdir(parents=True, exist_ok=True)
        atomic.write_json(
            self.place / TRIALS, {"schema_version": SCHEMA_VERSION, "study": self._study.plan.group}
        )
        if self._train(session) == sessions.INTERRUPTED:
            return INTERRUPTED
        for _ in range(self._study.extend):
            more = self._extension()
            if not more:
                break
            self.plans += more
            if self._train(self._session(more)) == sessions.INTERRUPTED:
                return INTERRUPTED
        return DONE

    def confirm(self) -> tuple[int, Plan]:
        """Run the best setting of every optimizer on fresh seeds.

        Returns:
            0 · 3: a run failed or diverged · 75: interrupted; and the comparison that was made.
        """
        plan = self._study.plan
        chosen = {arm.label: arm.best for arm in self.arms() if arm.best is not None}
        settings = {(p.label, p.number): p.values for p in self.plans}
        best = [
            trials.with_values(arm, settings[arm.label, number])
            for arm in plan.arms
            if (number := chosen.get(arm.label)) is not None
        ]
        plan = replace(plan, arms=best)
        runs = sessions.prepared(plan, self._trainer.say)
        self._free(runs, [identity for known in self._confirmed.values() for identity in known])
        count = len(best)
        self._confirmed = {arm.label: [run.identity for run in runs[i::count]] for i, arm in enumerate(best)}
        self.write()
        session = sessions.Session(runs, self._trainer, group=plan.group)
        return session.train(), plan

    def write(self) -> None:
        """Write the ledger; optimizers that an earlier command tuned in this group stay in it."""
        atomic.write_json(self.home / FILE, self.document())

    def document(self) -> dict[str, object]:
        """The ledger as JSON data."""
        now = self.arms()
        labels = {arm.label for arm in now}
        rows = tuning_ledger.to_json([*(arm for arm in self._before if arm.label not in labels), *now])
        return {
            "schema_version": SCHEMA_VERSION,
            "command": self._study.plan.command,
            "trials_group": self._study.trials_group,
            "comparison_key": self.plans[0].run.comparison_key,
            "steps": self.plans[0].run.config.steps,
            "world_size": self.plans[0].run.config.world_size,
            "seed": self._study.seed,
            "fresh_seeds": self._study.plan.seeds,
            "arms": rows,
        }

    def code(self) -> int:
        """Exit code of the trials: 3 if one failed, 1 if an optimizer has no finite one, else 0."""
        arms = self.arms()
        if any(trial.state not in tuning_ledger.SPENT for arm in arms for trial in arm.trials):
            return FAILED
        return NOTHING_FINITE if any(arm.best is None for arm in arms) else DONE

    def _read_ledger(self) -> None:
        """Read what earlier commands tuned in this group."""
        self._before = tuning_ledger.read(self.home)
        self._confirmed: dict[str, list[str]] = {arm.label: list(arm.confirmed) for arm in self._before}
        self._check_home()

    def _check_home(self) -> None:
        """Refuse a group with runs of another command in the places of the comparison, before the trials are spent."""
        own = {identity for known in self._confirmed.values() for identity in known}
        places = [
            self.home / f"{arm.label}-seed{s}"
            for arm in self._study.plan.arms
            for s in self._study.plan.seeds
        ]
        for place in places:
            old = reading.mapping(place / "status.json", []).get("identity")
            if old is not None and old not in own and not self.plans[0].run.config.overwrite:
                reason = f"has {place} of another command, where a run of this one's comparison goes"
                raise InputError("group", self._study.plan.group, reason, fix="group=… of your own")

    def _train(self, session: sessions.Session) -> int:
        self.write()
        return session.train(self.write)

    def _session(self, plans: Sequence[Planned]) -> sessions.Session:
        plan = self._study.plan
        runs = [plan.run for plan in plans]
        later = len(plan.arms) * len(plan.seeds) * runs[0].config.steps
        return sessions.Session(
            runs, self._trainer, group=plan.group, is_over=sessions.has_ended, steps_later=later
        )

    def _extension(self) -> list[Planned]:
        """One more trial for every optimizer if a best lies on an edge, or none did finish; else none.

        A trial that failed leaves the optimizers with unequal budgets, which more trials would not mend.
        """
        arms = self.arms()
        ended = all(trial.state in tuning_ledger.SPENT for arm in arms for trial in arm.trials)
        if not ended or not any(arm.edges or arm.best is None for arm in arms):
            return []
        where = [
            f"{arm.label} ({', '.join(arm.edges.values()) or 'none finished'})"
            for arm in arms
            if arm.edges or arm.best is None
        ]
        self._trainer.say(
            f"best learning rate on the edge of what was tried: {', '.join(where)}; one more trial for every optimizer"
        )
        more = [
            trials.plan_one(
                self._study,
                arm,
                len(tuned.trials) + 1,
                trials.further(tuned, self.plans),
                self._trainer.say,
                added=True,
            )
            for arm, tuned in zip(self._study.plan.arms, arms, strict=True)
        ]
        self._free(
            [plan.run for plan in more], [t.identity for arm in self._before for t in arm.trials if t.added]
        )
        return more

    def _free(self, runs: Sequence[Prepared], own: Sequence[str]) -> None:
        """Move runs of this study aside that its later results have overtaken: another best, another edge."""
        for run in runs:
            old = reading.mapping(run.folder / "status.json", []).get("identity")
            if old is not None and old != run.identity and old in own:
                run_folder.set_aside(run.folder)
                self._trainer.say(f"{run.folder}: of a setting that is not the best any more, moved aside")
