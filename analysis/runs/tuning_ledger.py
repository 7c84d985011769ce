"""tuning.json: every trial of a tuning study, what each optimizer was given, and what was chosen.

`optbench sweep` writes it into the folder of the comparison that it ends with; reports read it from there.
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
from analysis.runs.run import Run
from harness.redaction import redact_paths

SCHEMA_VERSION = 1
FILE = "tuning.json"
TRIALS = "trials.json"
"""Left in the folder of the trials: runs below it took part in a choice and are not compared."""
SPENT = ("finished", "diverged")
"""States whose outcome is known: these trials make the budget."""


@dataclass(frozen=True)
class Trial:
    """One setting, trained once.

    Attributes:
        number: from 1, in the order of training.
        values: option → number or word; an option that is no number of its own is as typed.
        state: of the run; "pending" if it was not begun.
        loss: final validation loss, nats/token; NaN unless it finished with a finite one.
        seconds: training seconds over all attempts; NaN if not recorded.
        added: by the extension, not by the space.
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


@dataclass(frozen=True)
class Tuned:
    """One optimizer of a study.

    Attributes:
        space: option → list of values or [low, "..", high]; the default ladder is ``{"lr": "ladder"}``.
        best: number of the trial with the lowest final loss; None if none finished.
        edges: option → "lowest" or "highest", where the best value lies on the edge of what was tried.
        seed: of the trials.
        confirmed: identities of the runs of the best setting on fresh seeds.
        lost: of the same study, the optimizers without a finite trial.
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
        """Trials whose outcome is known."""
        return [trial for trial in self.trials if trial.state in SPENT]

    @property
    def seconds(self) -> float:
        """Training seconds of all trials that recorded them."""
        return math.fsum(trial.seconds for trial in self.trials if math.isfinite(trial.seconds))

    @property
    def chosen(self) -> Trial | None:
        """The best trial."""
        return next((trial for trial in self.trials if trial.number == self.best), None)

    @property
    def counts(self) -> Counter[str]:
        """State → number of trials."""
        return Counter(trial.state for trial in self.trials)


def best(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the lowest finite loss, the earlier one of two equal ones; None if there is none."""
    finite = [trial for trial in trials if math.isfinite(trial.loss)]
    return min(finite, key=lambda trial: (trial.loss, trial.number), default=None)


def to_json(arms: Sequence[Tuned]) -> list[dict[str, Any]]:
    """Rows for tuning.json and ``--json``; numbers that are not finite are null."""
    rows = []
    for arm in arms:
        facts = asdict(arm)
        del facts["lost"]
        budget = {"trials": len(arm.spent), "seconds": arm.seconds, "states": dict(arm.counts)}
        rows.append(to_jsonable({**facts, "budget": budget}))
    return rows


def read(folder: Path) -> list[Tuned]:
    """The optimizers of the ledger in a folder; none without one, or where it can't be read."""
    rows = reading.mapping(folder / FILE, []).get("arms")
    arms = [arm for row in (rows if isinstance(rows, list) else []) if (arm := _arm(row)) is not None]
    lost = tuple(arm.label for arm in arms if arm.best is None)
    return [replace(arm, lost=lost) for arm in arms]


def _arm(row: Any) -> Tuned | None:
    """One optimizer; None where the row is not what `to_json` writes."""
    try:
        trials = [
            {**trial, "loss": reading.number(trial["loss"]), "seconds": reading.number(trial["seconds"])}
            for trial in row["trials"]
        ]
        arm = TypeAdapter(Tuned).validate_python({**row, "trials": trials})
    except (KeyError, TypeError, ValidationError):
        return None
    known = arm.chosen.values if arm.chosen is not None else {}
    return arm if (arm.best is None or known) and set(arm.edges) <= set(known) else None


def public(arm: Tuned) -> Tuned:
    """Without the paths of this machine, for what leaves it."""
    return replace(arm, trials=tuple(replace(t, reason=redact_paths(t.reason)) for t in arm.trials))


def adopt(runs: Sequence[Run]) -> None:
    """Tell the runs that a study chose how they were chosen."""
    ledgers = {folder: read(folder) for folder in dict.fromkeys(run.folder.parent for run in runs)}
    for run in runs:
        identity = run.text("identity") or str(run.status.get("identity") or "")
        chosen = [arm for arm in ledgers[run.folder.parent] if identity and identity in arm.confirmed]
        run.tuning = chosen[0] if chosen else None


def without_trials(runs: list[Run], remarks: list[str]) -> list[Run]:
    """The runs without tuning trials, if others are there; what was left out is said.

    The best of several noisy trials is lower than what its setting gives: it must not stand beside fresh runs.
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
