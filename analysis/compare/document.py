"""A comparison with all that is said about it, and its JSON form (`--json`, comparison.json)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from analysis.compare import cautions, comparison, tables, verdict
from analysis.compare.caution import Caution
from analysis.compare.comparison import ComparisonSet
from analysis.compare.statistics import RESOLUTION
from analysis.compare.tables import Table
from analysis.compare.verdict import Verdict
from analysis.formatting import to_jsonable
from analysis.report import tuning_tables
from analysis.runs import tuning_ledger
from analysis.runs.loading import load
from analysis.runs.reading import mapping
from analysis.runs.run import Run
from harness.redaction import redact_paths

SCHEMA_VERSION = 1
ORIGIN = "compare.json"
"""Left in a group's folder by `optbench compare`: its commands and the order of its arms."""
NO_RUNS = "There are no runs below this folder: nothing is compared."


@dataclass(frozen=True)
class Judged:
    """One set with what is said about it."""

    chosen: ComparisonSet
    verdict: Verdict
    table: Table
    cautions: list[Caution]
    commands: list[str]
    """The `optbench compare` commands that made the set, else those of its single runs, as far as recorded."""


@dataclass(frozen=True)
class Document:
    """All sets below one folder."""

    folder: Path
    runs: list[Run]
    sets: list[Judged]
    remarks: list[str] = field(default_factory=list)
    """What was found below the folder and is not in the report, one line each."""

    @property
    def commands(self) -> list[str]:
        """The commands of all sets."""
        return list(dict.fromkeys(command for judged in self.sets for command in judged.commands))

    @property
    def sentence(self) -> str:
        """The verdict of the only set; of several sets that there is none across them."""
        if not self.sets:
            return NO_RUNS
        if len(self.sets) == 1:
            return self.sets[0].verdict.sentence
        return (
            f"The runs fall into {len(self.sets)} sets that differ in data, model, budget or precision: "
            "each is judged by itself, and nothing is concluded across them."
        )


def read(folder: str | Path, *, public: bool = False) -> Document:
    """Load all runs below ``folder`` and judge them. A folder without runs makes a document that says so.

    Args:
        folder: of runs.
        public: cut the paths of this machine out of all that is said, for what leaves it.

    Raises:
        InputError: no such folder.
    """
    root = Path(folder)
    remarks: list[str] = []
    runs = tuning_ledger.without_trials(load(root, remarks), remarks)
    tuning_ledger.adopt(runs)
    origins = _origins(root, runs)
    if public:
        for run in runs:
            for name in ("config", "summary", "status", "environment", "reason", "notes"):
                setattr(run, name, redact_paths(getattr(run, name)))
            run.tuning = tuning_ledger.public(run.tuning) if run.tuning is not None else None
        origins = {place: redact_paths(origin) for place, origin in origins.items()}
        remarks = redact_paths(remarks)
    order = list(dict.fromkeys(name for origin in origins.values() for name in strings(origin["optimizers"])))
    judged = [_judged(chosen, origins) for chosen in comparison.compare(runs, order)]
    return Document(root, runs, judged, remarks)


def strings(value: object) -> list[str]:
    """The words of a list; nothing of anything else."""
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def _judged(chosen: ComparisonSet, origins: Mapping[Path, Mapping[str, Any]]) -> Judged:
    said = verdict.judge(chosen)
    commands: dict[str, None] = {}
    for run in chosen.runs:
        made_by = strings(origins.get(run.folder.parent, {}).get("commands"))
        commands |= dict.fromkeys(made_by or [run.text("command")])
    commands.pop("", None)
    table = tables.build(chosen)
    return Judged(chosen, said, table, cautions.cautions(chosen), list(commands))


def _origins(root: Path, runs: Sequence[Run]) -> dict[Path, dict[str, Any]]:
    """What `optbench compare` left beside the runs, by the folder that it lies in."""
    places = dict.fromkeys([root, *(run.folder.parent for run in runs)])
    found = {place: mapping(place / ORIGIN, []) for place in places}
    return {place: {"commands": [], "optimizers": [], **origin} for place, origin in found.items() if origin}


def to_json(document: Document) -> dict[str, Any]:
    """``{"schema_version", "runs", "comparison", "warnings"}``; numbers that are not finite are null."""
    return {
        "schema_version": SCHEMA_VERSION,
        "runs": [_run(run) for run in document.runs],
        "comparison": {
            "sentence": document.sentence,
            "commands": document.commands,
            "sets": [_set(judged) for judged in document.sets],
        },
        "warnings": [
            *({"set": None, **asdict(Caution("remark", remark))} for remark in document.remarks),
            *([] if document.runs else [{"set": None, **asdict(Caution("no_runs", NO_RUNS))}]),
        ]
        + [
            {"set": judged.chosen.key, **asdict(caution)}
            for judged in document.sets
            for caution in judged.cautions
        ],
    }


def _run(run: Run) -> dict[str, Any]:
    return to_jsonable(
        {
            "folder": run.where,
            "optimizer": run.optimizer,
            "seed": run.seed,
            "state": run.state,
            "reason": run.reason,
            "comparison_key": run.comparison_key,
            "identity": run.text("identity") or None,
            "final_loss": run.final_loss,
            "notes": run.notes,
            "foreign": run.foreign,
            "summary": run.summary,
        }
    )


def _set(judged: Judged) -> dict[str, Any]:
    chosen = judged.chosen
    names = [arm.label for arm in chosen.arms]
    tests = chosen.tests
    return to_jsonable(
        {
            "key": chosen.key,
            "title": chosen.title,
            "verdict": {**asdict(judged.verdict), "sentence": judged.verdict.sentence},
            "seeds": chosen.seeds,
            "target": chosen.target,
            "unigram_entropy": chosen.entropy,
            "commands": judged.commands,
            "resolution": RESOLUTION,
            "tuning": tuning_ledger.to_json([arm for _, arm in tuning_tables.of_set(chosen)]),
            "arms": [
                {
                    "label": arm.label,
                    "optimizer": arm.optimizer,
                    "n": arm.final.n,
                    "mean": arm.final.mean,
                    "sd": arm.final.sd,
                    "half_width_95": arm.final.half_width,
                    "losses": {str(seed): value for seed, value in arm.losses().items()},
                }
                for arm in chosen.arms
            ],
            "pairs": [
                {
                    "arms": [names[i], names[j]],
                    "n": tests.n[k],
                    "difference": tests.mean[k],
                    "sd": tests.sd[k],
                    "half_width_95": tests.half_width[k],
                    "p": tests.p[k],
                    "p_holm": tests.p_holm[k],
                }
                for k, (i, j) in enumerate(tests.pairs)
            ],
            "table": {
                "columns": [asdict(column) for column in judged.table.columns],
                "rows": [_row(row) for row in judged.table.rows],
                "notes": judged.table.notes,
            },
        }
    )


def _row(row: tables.Row) -> dict[str, Any]:
    values = {key: cell.value for key, cell in row.cells.items()}
    blank = {key: None for key, value in values.items() if isinstance(value, float) and math.isnan(value)}
    return {"failed": row.failed, **values, **blank}


def grave(document: Document) -> Sequence[Caution]:
    """The grave warnings of all sets."""
    return [caution for judged in document.sets for caution in judged.cautions if caution.grave]
