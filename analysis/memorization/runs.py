"""The runs to measure, their arms and checkpoints, and the corpus that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from analysis.comparison.sets import ComparisonSet, group_into_sets
from analysis.memorization.windows import CorpusView
from analysis.runs import loading, tuning_ledger
from analysis.runs.run import LoadedRun
from harness import data
from harness.checkpoint import store
from harness.checkpoint.store import DamagedCheckpoint, Store
from harness.config import compose
from harness.config.schema import RunConfig
from harness.data import tokenizer
from harness.errors import InputError

Say = Callable[[str], None]


class MeasuredRun(NamedTuple):
    """A run whose checkpoints are measured.

    Attributes:
        arm: label of its optimizer and the options in which it differs from other arms.
        rank: of the subspace; None for rules without one.
        optimizer: preset.
        run: as it was loaded.
        config: checked configuration of its checkpoints.
        checkpoints: (step, folder), ascending.
    """

    arm: str
    rank: int | None
    optimizer: str
    run: LoadedRun
    config: RunConfig
    checkpoints: tuple[tuple[int, Path], ...]

    @property
    def seed(self) -> int:
        """Return the seed of the run."""
        return self.run.seed


def find(places: Sequence[Path], say: Say, *, last_only: bool) -> tuple[ComparisonSet, list[MeasuredRun]]:
    """Return the finished runs below some folders that have valid checkpoints, in the order of their arms.

    Args:
        places: run folders, or folders of runs.
        say: told of what is left out.
        last_only: keep the last checkpoint of each run alone.

    Raises:
        InputError: no run, runs of several comparisons or of a task, no finished run, or no checkpoint.
    """
    loaded = [run for place in places for run in loading.load(place) if not run.is_external]
    remarks: list[str] = []
    loaded = tuning_ledger.without_trials(loaded, remarks)
    for remark in remarks:
        say(f"left out: {remark}")
    sets = group_into_sets(loaded)
    if not sets:
        raise InputError("memorize", places[0], "holds no run", fix="optbench memorize runs/GROUP")
    if len(sets) > 1:
        titles = "; ".join(f"{s.title} ({len(s.runs)} runs)" for s in sets[:3])
        reason = f"holds runs that cannot be compared: {titles}"
        raise InputError("memorize", places[0], reason, fix="a folder of runs with the same data and budget")
    found = []
    for arm in sets[0].arms:
        for run in arm.runs:
            if not run.finished:
                # Its last checkpoint would set the loss at which all others are compared.
                why = f", {run.reason}" if run.reason else ""
                say(f"left out: {run.where} has not finished with a finite result ({run.state}{why})")
                continue
            checkpoints = _checkpoints(run.folder, say)
            if not checkpoints:
                say(f"left out: {run.where} has no valid checkpoint")
                continue
            config = _config(checkpoints[-1][1])
            rank = run.optimizer_config.get("rank")
            used = checkpoints[-1:] if last_only else checkpoints
            is_rank = isinstance(rank, int) and not isinstance(rank, bool)
            found.append(
                MeasuredRun(arm.label, rank if is_rank else None, arm.optimizer, run, config, tuple(used))
            )
    if not found:
        reason = "holds no checkpoint of a finished run"
        raise InputError(
            "memorize", places[0], reason, fix="checkpoint.every=50 checkpoint.keep=100, and train"
        )
    return sets[0], found


def open_corpus(measured: Sequence[MeasuredRun], say: Say) -> CorpusView:
    """Open the corpus of the runs, from the cache or built again.

    Raises:
        InputError: it is not the one that they were trained on any more, or as `CorpusView`.
    """
    config, (_, folder) = measured[0].config, measured[0].checkpoints[-1]
    corpus = data.prepare(config.data, say=say, trust_remote_code=config.trust_remote_code)
    if corpus.sha256 != store.read_manifest(folder).get("corpus_sha256"):
        reason = "is not the corpus that the runs were trained on: its source has changed"
        raise InputError("data", config.data.name, reason, fix="put the source back as it was")
    return CorpusView(corpus, config, tokenizer.load(str(corpus.tokenizer_folder)))


def _checkpoints(folder: Path, say: Say) -> list[tuple[int, Path]]:
    found = []
    for step in sorted(Store(folder).steps()):
        path = Store(folder).folder(step)
        try:
            store.verify(path)
        except DamagedCheckpoint as error:
            say(f"left out: {folder.name}, step {step}: {error}")
            continue
        found.append((step, path))
    return found


def _config(checkpoint: Path) -> RunConfig:
    config = compose.load_file(checkpoint / store.CONFIG)
    if config.task.name != "pretrain":
        reason = f"is a run with task={config.task.name}; memorization is measured on language models"
        raise InputError("memorize", checkpoint.parent.parent, reason, fix="runs with task=pretrain")
    if config.data.mode != "packed":
        reason = "has data.mode=padded, and rows are compared that are full"
        raise InputError("memorize", checkpoint.parent.parent, reason, fix="runs with data.mode=packed")
    return config
