"""Read the matrix from run folders: which optimizer pretrained, which fine-tuned, and the metric of every seed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from analysis.runs import loading, predictions
from analysis.runs.loading import NOT_COMPARED
from analysis.runs.measure import LOSS, Measure
from analysis.runs.run import LoadedRun
from harness.config.overrides import leaves
from harness.tasks.metrics import METRICS

Floats = NDArray[np.float64]
_THEN = "-then-"
_OF_THE_MODEL = ("model.name", "model.path")


def run_name(pretrained: str, arm: str, seed: int) -> str:
    """Return the name of the run that fine-tunes a pretrained model: ``adamw-then-muon-seed0``."""
    return f"{pretrained}{_THEN}{arm}-seed{seed}"


@dataclass(frozen=True)
class Matrix:
    """Results by pretraining optimizer (rows), fine-tuning optimizer (columns) and seed.

    Attributes:
        rows, columns: labels of the optimizers.
        seeds: those that every cell has.
        measure: the metric.
        values: shape (rows, columns, seeds); as the runs record them.
        of_examples: shape (rows, columns, seeds, examples): 1 where the answer is right; None unless the metric is
            their mean and every run kept its answers to the same examples.
        remarks: a line for each run that is not used, and for seeds that are not complete.
    """

    rows: list[str]
    columns: list[str]
    seeds: list[int]
    measure: Measure
    values: Floats
    of_examples: Floats | None
    remarks: list[str]

    @property
    def is_complete(self) -> bool:
        """True if there are two optimizers of each kind and a seed that all cells have."""
        return len(self.rows) >= 2 and len(self.columns) >= 2 and len(self.seeds) >= 1


def read(folder: Path) -> Matrix:
    """Read the finished runs below a folder.

    Raises:
        InputError: no such folder.
    """
    remarks: list[str] = []
    runs = [run for run in loading.load(folder, remarks) if not _refused(run, remarks)]
    runs = _of_one_protocol(runs, remarks)
    cells: dict[tuple[str, str], dict[int, LoadedRun]] = {}
    for run in runs:
        model = run.config["model"]
        cells.setdefault((str(model["name"]), _arm(run, str(model["name"]))), {})[run.seed] = run
    rows, columns = (list(dict.fromkeys(place[axis] for place in cells)) for axis in (0, 1))
    columns = sorted(columns, key=lambda name: rows.index(name) if name in rows else len(rows))
    found = [cells.get((row, column), {}) for row in rows for column in columns]
    every = sorted({seed for inside in found for seed in inside})
    seeds = [seed for seed in every if all(seed in inside for inside in found)]
    if left := [seed for seed in every if seed not in seeds]:
        missing = [
            f"{row}, then {column}"
            for row in rows
            for column in columns
            if set(left) - set(cells.get((row, column), {}))
        ]
        remarks.append(
            f"seeds {', '.join(map(str, left))} are not used: {'; '.join(missing)} lack some of them"
        )
    measure = runs[0].measure if runs else LOSS
    table = (
        [[[cells[row, column][seed] for seed in seeds] for column in columns] for row in rows]
        if seeds
        else []
    )
    shape = (len(rows), len(columns), len(seeds))
    values = np.array([[[run.final(measure) for run in cell] for cell in row] for row in table]).reshape(
        shape
    )
    return Matrix(rows, columns, seeds, measure, values, _answers(table, measure), remarks)


def _refused(run: LoadedRun, remarks: list[str]) -> bool:
    """Return True, with a remark, for a run that is in no cell."""
    model = run.config.get("model")
    if run.is_external or not isinstance(model, Mapping) or model.get("path") is None:
        remarks.append(f"{run.where}: not used, its model was not pretrained (no model.path)")
    elif run.state != "finished":
        remarks.append(f"{run.where}: not used, {run.state}")
    elif not math.isfinite(run.final(run.measure)):
        remarks.append(f"{run.where}: not used, without a final {run.measure.title}")
    else:
        return False
    return True


def _of_one_protocol(runs: Sequence[LoadedRun], remarks: list[str]) -> list[LoadedRun]:
    """Keep the runs that share the most common settings, apart from optimizer, seed and the model's weights."""
    settings = [_protocol(run) for run in runs]
    if not settings:
        return []
    common = dict(Counter(tuple(s.items()) for s in settings).most_common(1)[0][0])
    kept = []
    for run, own in zip(runs, settings, strict=True):
        if differing := [key for key in {**common, **own} if common.get(key) != own.get(key)]:
            remarks.append(
                f"{run.where}: not used, differs from the others in {', '.join(sorted(differing)[:4])}"
            )
        else:
            kept.append(run)
    return kept


def _protocol(run: LoadedRun) -> dict[str, str]:
    compared = {key: value for key, value in run.config.items() if key not in NOT_COMPARED}
    flat = {key: repr(value) for key, value in leaves("", compared).items() if key not in _OF_THE_MODEL}
    if flat.get("data.tokenizer") == repr(run.config["model"]["path"]):
        # Each model brings the tokenizer that it was pretrained with.
        del flat["data.tokenizer"]
    return {**flat, "metric": run.measure.name}


def _arm(run: LoadedRun, pretrained: str) -> str:
    """Return the label of the fine-tuning optimizer: that in the run's name, else the optimizer's name."""
    name = str(run.config.get("name") or "")
    start, end = f"{pretrained}{_THEN}", f"-seed{run.seed}"
    is_ours = name.startswith(start) and name.endswith(end) and len(name) > len(start) + len(end)
    return name[len(start) : -len(end)] if is_ours else run.optimizer


def _answers(table: Sequence[Sequence[Sequence[LoadedRun]]], measure: Measure) -> Floats | None:
    known = METRICS.get(measure.name)
    if known is None or not known.is_mean or not table:
        return None
    kept: list[NDArray[np.bool_]] = []
    first: NDArray[np.int64] | None = None
    for run in (run for row in table for cell in row for run in cell):
        answers = predictions.read(run.folder / predictions.FILE, run.notes)
        if answers is None or answers.correct is None:
            return None
        first = answers.examples if first is None else first
        if not np.array_equal(first, answers.examples):
            return None
        kept.append(answers.correct)
    shape = (len(table), len(table[0]), len(table[0][0]), -1)
    return np.array(kept, dtype=np.float64).reshape(shape)
