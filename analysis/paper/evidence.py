"""Find finished runs for a cell: they may differ from it only in the seed and in keys that the paper does not state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from analysis.paper.tables import PaperColumn, Quantity
from analysis.runs import loading
from analysis.runs.reading import number
from analysis.runs.run import LoadedRun
from harness.config import compose
from harness.config.identity import differing_keys
from harness.config.model_facts import full_config
from harness.config.overrides import leaves
from harness.config.schema import RunConfig
from harness.config.typed_keys import format_value
from harness.errors import InputError
from harness.tasks.metrics import METRICS

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

    def metric(self, name: str) -> float:
        """Return a metric of the last evaluation, in percent; NaN if the run has none of this name."""
        metrics = self.run.summary.get("metrics")
        entry = metrics.get(name) if isinstance(metrics, dict) else None
        return 100.0 * number(entry.get("value") if isinstance(entry, dict) else None)


@dataclass(frozen=True)
class TargetRun:
    """The run that a cell requires.

    Attributes:
        label: row and column of the cell.
        config: of the run.
        unstated: keys that the paper does not state.
        inputs: keys of what the user has: any value; a model needs weights.
        examples: that are evaluated; None where the paper does not tell.
    """

    label: str
    config: RunConfig
    unstated: Sequence[str]
    inputs: Sequence[str] = ()
    examples: int | None = None

    def differences(self, finished: FinishedRun) -> list[str]:
        """Return the keys in which a finished run differs, without the seed and keys that the paper does not state."""
        keys = [key for key in differing_keys(self.config, finished.config) if key not in _SEEDS]
        data, own = self.config.data, finished.config.data
        keys += [f"data.{key}" for key in _TEXT if getattr(data, key) != getattr(own, key)]
        if "model.path" in self.inputs:
            keys = self._with_any_weights(keys, finished)
        if self.config.task.name == "pretrain":
            # Papers of this kind read every document once; a smaller corpus read twice is another protocol.
            if finished.run.fact("epochs") > 1:
                keys.append("data.max_tokens")
        else:
            keys = self._of_task(keys, finished)
        found = [key for key in dict.fromkeys(keys) if key not in (*self.unstated, *self.inputs)]
        is_random = "model.path" in self.inputs and finished.config.model.path is None
        return [*found, *(["model.path (random weights)"] if is_random else [])]

    def _with_any_weights(self, keys: Sequence[str], finished: FinishedRun) -> list[str]:
        """Compare the model's configuration with all its defaults: a folder states more of them than a preset."""
        adapter = ("model.adapter", "model.lora.")
        kept = [key for key in keys if not key.startswith("model.") or key.startswith(adapter)]
        wanted, own = (
            full_config(config.model.model_copy(update={"path": None}))
            for config in (self.config, finished.config)
        )
        return kept + [f"model.config.{key}" for key in wanted if wanted[key] != own.get(key)]

    def _of_task(self, keys: Sequence[str], finished: FinishedRun) -> list[str]:
        """Compare epochs in place of steps, which follow from the number of training examples, and names of data.

        The same examples may come from a hub or from files, with their subset in the name.
        """
        # A run records the classes and the metric that it found where the table leaves them open.
        task = self.config.task
        is_open = {
            "task.target": task.target == "auto",
            "task.labels": task.labels is None,
            "task.metric": task.metric is None,
        }
        kept = [key for key in keys if key != "data.subset" and not is_open.get(key, False)]
        if finished.config.data.name != self.config.data.name:
            kept.append("data.name")
        if self.config.epochs is not None:
            kept = [key for key in kept if key not in ("steps", "epochs")]
            if finished.config.epochs != self.config.epochs:
                kept.append("epochs")
        evaluated = finished.run.fact("examples", "validation")
        if self.examples is not None and math.isfinite(evaluated) and evaluated != self.examples:
            kept.append(f"the number of evaluated examples ({evaluated:,.0f}, and not {self.examples:,})")
        return kept


class Measured(NamedTuple):
    """A value over the runs of a setting.

    Attributes:
        value: in the quantity's unit.
        std: standard deviation over seeds; None for fewer than two.
    """

    value: float
    std: float | None = None


@dataclass(frozen=True)
class MatchingRuns:
    """The runs that fill a row and column: the seeds of one setting.

    Attributes:
        runs: at least one.
        note: names the setting if there are several, which differ in unstated keys; else empty.
    """

    runs: list[FinishedRun]
    note: str

    def measured(self, quantity: Quantity, column: PaperColumn) -> Measured | None:
        """Return the number in the quantity's unit; None if the runs do not have it.

        Perplexity is exp of the mean loss. Memory is the maximum over processes, with weights and state as held. A
        metric, and hours, are the mean over seeds.
        """
        if quantity.kind == "perplexity":
            return Measured(math.exp(fmean(finished.run.final_loss for finished in self.runs)))
        if quantity.kind == "metric":
            return _over_seeds([finished.metric(column.metric or "") for finished in self.runs])
        if quantity.kind == "hours":
            return _over_seeds([finished.run.fact("wall_s") / 3600 for finished in self.runs])
        if quantity.kind == "state_numbers" or "low_rank_state" in quantity.counts:
            # A run records the state of all parameters together.
            return None
        kinds = {"weights": "weights", "state": "optimizer_state"}
        unsharded = (finished for finished in self.runs if finished.holds_everything)
        sizes = [sum(f.run.fact("memory_bytes", kinds[kind]) for kind in quantity.counts) for f in unsharded]
        held = [quantity.in_unit(size) for size in sizes if math.isfinite(size)]
        return Measured(max(held)) if held else None


def _over_seeds(values: Sequence[float]) -> Measured | None:
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return None
    return Measured(fmean(known), stdev(known) if len(known) > 1 else None)


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


def select_setting(
    matching: Sequence[FinishedRun], unstated: Sequence[str], metric: str | None = None
) -> MatchingRuns | None:
    """Select the best setting among runs that match a target; None without runs.

    A setting is one combination of values of ``unstated`` keys; a seed counts once in a setting.

    Args:
        matching: runs that match.
        unstated: keys that the paper does not state.
        metric: whose mean is best, in its own direction; None: the setting with the lowest mean loss.
    """
    settings: dict[str, dict[int, FinishedRun]] = {}
    for finished in matching:
        values = leaves("", finished.config.model_dump(mode="json"))
        setting = " ".join(f"{key}={format_value(values.get(key))}" for key in unstated)
        settings.setdefault(setting, {}).setdefault(finished.run.seed, finished)
    if not settings:
        return None
    costs = {
        s: fmean(_cost(finished, metric) for finished in seeds.values()) for s, seeds in settings.items()
    }
    best = min(costs, key=lambda setting: costs[setting])
    note = f"the best of {len(settings)} settings: {best}" if len(settings) > 1 else ""
    return MatchingRuns(list(settings[best].values()), note)


def _cost(finished: FinishedRun, metric: str | None) -> float:
    """Return what is lowest in the best run; infinite for a run without the metric."""
    if metric is None:
        return finished.run.final_loss
    value = finished.metric(metric)
    if not math.isfinite(value):
        return math.inf
    return -value if METRICS[metric].better == "higher" else value


def remark(finished: FinishedRun, targets: Sequence[TargetRun]) -> str:
    """Return why a finished run is in no cell: the closest target, and the keys that differ."""
    if not targets:
        return f"{finished.run.where}: not used, no run fills a cell of this table"
    distances = [(target.label, target.differences(finished)) for target in targets]
    label, keys = min(distances, key=lambda entry: len(entry[1]))
    shown = ", ".join(keys[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
    return f"{finished.run.where}: not used; closest to {label}, differs in {shown}"
