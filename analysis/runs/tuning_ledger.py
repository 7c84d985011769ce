"""tuning.json: all trials of a tuning study, the budget of each optimizer, and the setting that was selected.

`optbench sweep` writes it into the folder of its final comparison; reports read it from there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from analysis.formatting import to_jsonable
from analysis.runs import reading
from analysis.runs.run import LoadedRun
from harness.redaction import redact_paths

LEDGER_SCHEMA_VERSION = 1
FILE = "tuning.json"
TRIALS = "trials.json"
"""Written into the folder of the trials: runs below it selected a setting and are not compared."""
SPENT = ("finished", "diverged")
"""States with a known outcome: these trials count as budget."""


@dataclass(frozen=True)
class Trial:
    """A setting that was trained once.

    Attributes:
        number: from 1, in the order of training.
        values: option → number, or the text as typed.
        state: of the run; "pending" if it was not started.
        loss: final validation loss, nats/token; NaN unless it finished with a finite one.
        seconds: training seconds over all attempts; NaN if not recorded.
        added: True if the extension added it to the search space.
        score: with ``tune_by=metric`` the metric of the task, else None.
    """

    number: int
    values: dict[str, float | str]
    state: str
    reason: str
    loss: float
    seconds: float
    run: str
    identity: str
    added: bool = False
    score: float | None = None

    @property
    def cost(self) -> float:
        """What settings are selected by, lower is better: the loss, or the metric with its sign changed."""
        cost = self.loss if self.score is None else -self.score
        return cost if math.isfinite(cost) else math.inf


@dataclass(frozen=True)
class TunedArm:
    """An optimizer of a tuning study.

    Attributes:
        space: option → list of values or [low, "..", high]; the default ladder is ``{"lr": "ladder"}``.
        best: number of the trial with the lowest final loss (or best metric); None if none finished.
        edges: option → "lowest" or "highest", if the best value is on the edge of the tried ones.
        seed: of the trials.
        confirmed: identities of the runs of the best setting on fresh seeds.
        lost: optimizers of the same study without a finite trial.
    """

    label: str
    optimizer: str
    space: dict[str, Any]
    trials: tuple[Trial, ...]
    best: int | None
    edges: dict[str, str]
    seed: int
    confirmed: tuple[str, ...] = ()
    lost: tuple[str, ...] = field(default=(), compare=False)

    @property
    def spent(self) -> list[Trial]:
        """Trials with a known outcome."""
        return [trial for trial in self.trials if trial.state in SPENT]

    @property
    def seconds(self) -> float:
        """Training seconds, summed over the trials that recorded them."""
        return math.fsum(trial.seconds for trial in self.trials if math.isfinite(trial.seconds))

    @property
    def best_trial(self) -> Trial | None:
        """The selected trial; None if none finished."""
        return next((trial for trial in self.trials if trial.number == self.best), None)

    @property
    def counts(self) -> Counter[str]:
        """State → number of trials."""
        return Counter(trial.state for trial in self.trials)


def select(trials: Sequence[Trial]) -> Trial | None:
    """Return the best trial with a finite loss or metric, the earlier of two equal ones; None if there is none."""
    finite = [trial for trial in trials if math.isfinite(trial.cost)]
    return min(finite, key=lambda trial: (trial.cost, trial.number), default=None)


def to_json(arms: Sequence[TunedArm]) -> list[dict[str, Any]]:
    """Return the entries of tuning.json and ``--json``; non-finite numbers become null."""
    rows = []
    for arm in arms:
        facts = asdict(arm)
        del facts["lost"]
        budget = {"trials": len(arm.spent), "seconds": arm.seconds, "states": dict(arm.counts)}
        rows.append(to_jsonable({**facts, "budget": budget}))
    return rows


def read(folder: Path) -> list[TunedArm]:
    """Return the optimizers in a folder's ledger; none if it is absent or damaged."""
    rows = reading.mapping(folder / FILE, []).get("arms")
    arms = [arm for row in (rows if isinstance(rows, list) else []) if (arm := _arm(row)) is not None]
    lost = tuple(arm.label for arm in arms if arm.best is None)
    return [replace(arm, lost=lost) for arm in arms]


def _arm(row: Any) -> TunedArm | None:
    """Return one optimizer; None if the row is not one that `to_json` writes."""
    try:
        trials = [
            {**trial, "loss": reading.number(trial["loss"]), "seconds": reading.number(trial["seconds"])}
            for trial in row["trials"]
        ]
        arm = TypeAdapter(TunedArm).validate_python({**row, "trials": trials})
    except (KeyError, TypeError, ValidationError):
        return None
    known = arm.best_trial.values if arm.best_trial is not None else {}
    return arm if (arm.best is None or known) and set(arm.edges) <= set(known) else None


def public(arm: TunedArm) -> TunedArm:
    """Return the study with the paths of this machine redacted."""
    return replace(arm, trials=tuple(replace(t, reason=redact_paths(t.reason)) for t in arm.trials))


def attach(runs: Sequence[LoadedRun]) -> None:
    """Set ``tuning`` of the runs whose setting a study selected."""
    ledgers = {folder: read(folder) for folder in dict.fromkeys(run.folder.parent for run in runs)}
    for run in runs:
        identity = run.text("identity") or str(run.status.get("identity") or "")
        studies = (arm for arm in ledgers[run.folder.parent] if identity and identity in arm.confirmed)
        run.tuning = next(studies, None)


def without_trials(runs: list[LoadedRun], remarks: list[str]) -> list[LoadedRun]:
    """Return the runs without tuning trials if there are others, and add a remark for each folder of trials.

    The best of several noisy trials is biased low: it must not be compared with runs on fresh seeds.
    """
    folders = dict.fromkeys(run.folder.parent for run in runs)
    marked = {folder for folder in folders if (folder / TRIALS).is_file()}
    kept = [run for run in runs if run.folder.parent not in marked]
    if not kept or not marked:
        return runs
    count = Counter(run.folder.parent for run in runs if run.folder.parent in marked)
    remarks += [
        f"{folder.name}: {n} tuning trials, not compared with other runs" for folder, n in count.items()
    ]
    return kept
