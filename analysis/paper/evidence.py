"""Find finished runs for a cell: they may differ from it only in the seed and in keys that the paper does not state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from analysis.paper.tables import Quantity
from analysis.runs import loading
from analysis.runs.run import LoadedRun
from harness.config import compose
from harness.config.identity import differing_keys
from harness.config.overrides import leaves
from harness.config.schema import RunConfig
from harness.config.typed_keys import format_value
from harness.errors import InputError

_SHOWN = 6
"""Most differing keys that a remark names."""
_SEEDS = ("seed", "optimizer.seed")
# The identity of a run has the hash of its corpus in their place.
_TEXT = ("source", "package", "files", "dataset", "subset", "split", "field", "tokenizer", "vocab_size")


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A finished run with its configuration."""

    run: LoadedRun
    config: RunConfig

    @property
    def holds_everything(self) -> bool:
        """True if each process held all weights and all state, as the numbers of papers assume."""
        engine = self.config.engine
        return engine.name in ("single", "ddp") and engine.optimizer_work == "replicated"


@dataclass(frozen=True)
class TargetRun:
    """The run that a cell requires.

    Attributes:
        label: row and column of the cell.
        config: of the run.
        unstated: keys that the paper does not state.
    """

    label: str
    config: RunConfig
    unstated: Sequence[str]

    def differences(self, finished: FinishedRun) -> list[str]:
        """Return the keys in which a finished run differs, without the seed and keys that the paper does not state."""
        keys = [key for key in differing_keys(self.config, finished.config) if key not in _SEEDS]
        data, own = self.config.data, finished.config.data
        keys += [f"data.{key}" for key in _TEXT if getattr(data, key) != getattr(own, key)]
        # Papers of this kind read every document once; a smaller corpus read twice is another protocol.
        if finished.run.fact("epochs") > 1:
            keys.append("data.max_tokens")
        return [key for key in keys if key not in self.unstated]


@dataclass(frozen=True)
class MatchingRuns:
    """The runs that fill a row and column: the seeds of one setting.

    Attributes:
        runs: at least one.
        note: names the setting if there are several, which differ in unstated keys; else empty.
    """

    runs: list[FinishedRun]
    note: str

    def measured(self, quantity: Quantity) -> float | None:
        """Return the number in the quantity's unit; None if the runs do not have it.

        Perplexity is exp of the mean loss. Memory is the maximum over processes, with weights and state as held.
        """
        if quantity.kind == "perplexity":
            return math.exp(fmean(finished.run.final_loss for finished in self.runs))
        if quantity.kind == "state_numbers":
            return None
        kinds = {"weights": "weights", "state": "optimizer_state"}
        unsharded = (finished for finished in self.runs if finished.holds_everything)
        sizes = [sum(f.run.fact("memory_bytes", kinds[kind]) for kind in quantity.counts) for f in unsharded]
        return max((quantity.in_unit(size) for size in sizes if math.isfinite(size)), default=None)


def read(folder: Path) -> tuple[list[FinishedRun], list[str]]:
    """Return the finished runs below a folder, and for each other run a line with the reason why it is not used.

    Raises:
        InputError: no such folder.
    """
    finished: list[FinishedRun] = []
    remarks: list[str] = []
    for run in loading.load(folder):
        if run.is_external:
            remarks.append(
                f"{run.where}: not used, a run of another trainer, whose protocol cannot be checked"
            )
        elif not run.finished:
            remarks.append(f"{run.where}: not used, {run.state}")
        else:
            try:
                finished.append(FinishedRun(run, compose.load_file(run.folder / "config.yaml")))
            except InputError as error:
                remarks.append(f"{run.where}: not used, {error}")
    return finished, remarks


def select_setting(matching: Sequence[FinishedRun], unstated: Sequence[str]) -> MatchingRuns | None:
    """Select the setting with the lowest mean loss among runs that match a target; None without runs.

    A setting is one combination of values of ``unstated`` keys; a seed counts once in a setting.
    """
    settings: dict[str, dict[int, FinishedRun]] = {}
    for finished in matching:
        values = leaves("", finished.config.model_dump(mode="json"))
        setting = " ".join(f"{key}={format_value(values.get(key))}" for key in unstated)
        settings.setdefault(setting, {}).setdefault(finished.run.seed, finished)
    if not settings:
        return None
    losses = {
        s: fmean(finished.run.final_loss for finished in seeds.values()) for s, seeds in settings.items()
    }
    best = min(losses, key=lambda setting: losses[setting])
    note = f"the best of {len(settings)} settings: {best}" if len(settings) > 1 else ""
    return MatchingRuns(list(settings[best].values()), note)


def remark(finished: FinishedRun, targets: Sequence[TargetRun]) -> str:
    """Return why a finished run is in no cell: the closest target, and the keys that differ."""
    if not targets:
        return f"{finished.run.where}: not used, no run fills a cell of this table"
    distances = [(target.label, target.differences(finished)) for target in targets]
    label, keys = min(distances, key=lambda entry: len(entry[1]))
    shown = ", ".join(keys[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
    return f"{finished.run.where}: not used; closest to {label}, differs in {shown}"
