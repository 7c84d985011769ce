"""Judge all runs below a folder, and convert the result to JSON (`--json`, comparison.json)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from analysis.comparison import memorization, profiles, results_table, track3
from analysis.comparison.results_table import ResultsRow, ResultsTable
from analysis.comparison.sets import ComparisonSet, group_into_sets
from analysis.comparison.statistics import RESOLUTION, Pairwise
from analysis.comparison.verdict import Verdict, judge
from analysis.comparison.warnings import ReportWarning, find_warnings
from analysis.formatting import to_jsonable
from analysis.runs import tuning_ledger
from analysis.runs.loading import load
from analysis.runs.logs import loading as logs
from analysis.runs.reading import read_provenance
from analysis.runs.run import LoadedRun
from harness.redaction import redact_paths

DOCUMENT_SCHEMA_VERSION = 1
NO_RUNS = "There are no runs below this folder: nothing is compared."


@dataclass(frozen=True)
class JudgedSet:
    """One set with its verdict, table and warnings."""

    comparison: ComparisonSet
    verdict: Verdict
    table: ResultsTable
    warnings: list[ReportWarning]
    commands: list[str]
    """Recorded `optbench compare` commands of the set, else the recorded commands of its runs."""


@dataclass(frozen=True)
class Document:
    """All runs below one folder, grouped into judged sets."""

    folder: Path
    runs: list[LoadedRun]
    sets: list[JudgedSet]
    remarks: list[str] = field(default_factory=list)
    """One line for each file below the folder that is not in the report."""
    findings: list[logs.LogFinding] = field(default_factory=list)
    """What is wrong with the logs of other programs as evidence."""
    log_format: str | None = None
    """The format of `analysis.runs.logs` that was read; None: run folders and tables."""

    @property
    def notices(self) -> list[str]:
        """Return what is shown above the sets: findings, then files that are not in the report."""
        return [*(finding.message for finding in self.findings), *self.remarks]

    @property
    def commands(self) -> list[str]:
        """Return the commands of all sets, each once."""
        return list(dict.fromkeys(command for judged in self.sets for command in judged.commands))

    @property
    def profiles(self) -> profiles.Profiles | None:
        """Return the performance profiles over the sets as workloads; None with fewer than two."""
        return profiles.compare_sets([judged.comparison for judged in self.sets])

    @property
    def sentence(self) -> str:
        """The verdict of the only set; with several sets, the statement that they are not compared."""
        if not self.sets:
            return NO_RUNS
        if len(self.sets) == 1:
            return self.sets[0].verdict.sentence
        return (
            f"The runs fall into {len(self.sets)} sets that differ in data, model, budget or precision: "
            "each set is judged separately, and no conclusion is drawn across sets."
        )


def judge_folder(folder: str | Path, *, public: bool = False, log_format: str | None = None) -> Document:
    """Load all runs below ``folder``, group them into sets, and judge each set.

    Args:
        folder: contains run folders or tables at any depth; it may hold none.
        public: redact paths of this machine in all texts, for output that leaves it.
        log_format: read the public logs of this format (`analysis.runs.logs`) instead of runs and tables.

    Raises:
        InputError: no such folder.
    """
    root = Path(folder)
    remarks: list[str] = []
    findings: list[logs.LogFinding] = []
    if log_format is not None:
        runs = logs.load(root, log_format, remarks, findings)
    else:
        runs = tuning_ledger.without_trials(load(root, remarks), remarks)
        tuning_ledger.attach(runs)
    places = dict.fromkeys([root, *(run.folder.parent for run in runs)])
    provenance = {place: read_provenance(place) for place in places}
    if public:
        for run in runs:
            for name in ("config", "summary", "status", "environment", "reason", "notes"):
                setattr(run, name, redact_paths(getattr(run, name)))
            run.tuning = tuning_ledger.public(run.tuning) if run.tuning is not None else None
        provenance = {place: redact_paths(record) for place, record in provenance.items()}
        remarks = redact_paths(remarks)
    order = list(dict.fromkeys(name for record in provenance.values() for name in record["optimizers"]))
    found = group_into_sets(runs, order)
    memorization.attach(found, places, remarks)
    sets = [_judge_set(comparison, provenance) for comparison in found]
    return Document(root, runs, sets, remarks, findings, log_format)


def _judge_set(comparison: ComparisonSet, provenance: Mapping[Path, Mapping[str, list[str]]]) -> JudgedSet:
    commands: dict[str, None] = {}
    for run in comparison.runs:
        recorded = provenance[run.folder.parent]["commands"]
        commands |= dict.fromkeys(recorded or [run.text("command")])
    commands.pop("", None)
    return JudgedSet(
        comparison,
        judge(comparison),
        results_table.build(comparison),
        find_warnings(comparison),
        list(commands),
    )


def to_json(document: Document) -> dict[str, Any]:
    """Return ``{"schema_version", "runs", "comparison", "warnings"}``; non-finite numbers become null."""
    return {
        "schema_version": DOCUMENT_SCHEMA_VERSION,
        "runs": [_run(run) for run in document.runs],
        "comparison": {
            "sentence": document.sentence,
            "commands": document.commands,
            "sets": [_set(judged) for judged in document.sets],
            "profiles": to_jsonable(profiles.to_json(document.profiles)),
        },
        "warnings": [
            *(ReportWarning(f.code, f.message).to_json(None) for f in document.findings),
            *(ReportWarning("remark", remark).to_json(None) for remark in document.remarks),
            *([] if document.runs else [ReportWarning("no_runs", NO_RUNS).to_json(None)]),
            *(w.to_json(judged.comparison.key) for judged in document.sets for w in judged.warnings),
        ],
    }


def _run(run: LoadedRun) -> dict[str, Any]:
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
            "metrics": run.summary.get("metrics") or {},
            "notes": run.notes,
            "foreign": run.is_external,
            "summary": run.summary,
        }
    )


def _set(judged: JudgedSet) -> dict[str, Any]:
    comparison = judged.comparison
    names = [arm.label for arm in comparison.arms]
    tests, loss_tests = comparison.tests, comparison.loss_tests
    return to_jsonable(
        {
            "key": comparison.key,
            "title": comparison.title,
            "verdict": {**asdict(judged.verdict), "sentence": judged.verdict.sentence},
            "seeds": comparison.seeds,
            "measure": {**asdict(comparison.measure), "key": comparison.measure.key},
            "examples": None if comparison.examples is None else len(comparison.examples),
            "target": comparison.target,
            "unigram_entropy": comparison.entropy,
            "commands": judged.commands,
            "resolution": RESOLUTION,
            "tuning": tuning_ledger.to_json([study for _, study in comparison.studies]),
            "arms": [_arm(comparison, index) for index in range(len(comparison.arms))],
            "pairs": [
                {
                    "arms": [names[i], names[j]],
                    "test": "paired t" if tests.paired else "welch",
                    **_test(tests, k),
                    **({} if loss_tests is None else {"loss": _test(loss_tests, k)}),
                    **_pair(comparison, i, j),
                }
                for k, (i, j) in enumerate(tests.pairs)
            ],
            **(
                {"track3": [track3.judge_arm(arm) for arm in comparison.arms]}
                if comparison.key == "log:track3"
                else {}
            ),
            "memorization": None if comparison.memorization is None else comparison.memorization.model_dump(),
            "table": {
                "columns": [asdict(column) for column in judged.table.columns],
                "rows": [_row(row) for row in judged.table.rows],
                "notes": judged.table.notes,
            },
        }
    )


def _arm(comparison: ComparisonSet, index: int) -> dict[str, Any]:
    arm = comparison.arms[index]
    facts = {
        "label": arm.label,
        "optimizer": arm.optimizer,
        "n": arm.final.n,
        "mean": arm.final.mean,
        "sd": arm.final.sd,
        "half_width_95": arm.final.half_width,
        "losses": {str(run.seed): run.final_loss for run in arm.finished},
        "results": {str(seed): value for seed, value in arm.results(comparison.measure).items()},
    }
    if comparison.examples is not None:
        by_examples, both = comparison.examples.half_widths(index, arm.final)
        facts |= {"half_width_examples_95": by_examples, "half_width_both_95": both}
    return facts


def _test(tests: Pairwise, pair: int) -> dict[str, Any]:
    return {
        "n": tests.n[pair],
        "difference": tests.mean[pair],
        "sd": tests.sd[pair],
        "half_width_95": tests.half_width[pair],
        "p": tests.p[pair],
        "p_holm": tests.p_holm[pair],
    }


def _pair(comparison: ComparisonSet, first: int, second: int) -> dict[str, Any]:
    """Return what the per-example results of a task say about two arms; empty without them."""
    examples = comparison.examples
    if examples is None:
        return {}
    rows = [
        [int(examples.rows[k]) for k in examples.changed(*arms)]
        for arms in ((first, second), (second, first))
    ]
    return {
        "agreement": asdict(examples.agreement(first, second)),
        "mcnemar": [asdict(test) for test in examples.mcnemar(first, second)],
        "only_first_right": rows[0],
        "only_second_right": rows[1],
    }


def _row(row: ResultsRow) -> dict[str, Any]:
    values = {key: cell.value for key, cell in row.cells.items()}
    blank = {key: None for key, value in values.items() if isinstance(value, float) and math.isnan(value)}
    return {"failed": row.failed, **values, **blank}
