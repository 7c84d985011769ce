"""Finished runs as evidence for a cell: taken only if nothing but the seed, and what the paper leaves open, differs."""

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
"""Differing keys that a remark names."""
_SEEDS = ("seed", "optimizer.seed")
# The identity of a run has the hash of its corpus in their place.
_TEXT = ("source", "package", "files", "dataset", "subset", "split", "field", "tokenizer", "vocab_size")


@dataclass(frozen=True, eq=False)
class Finished:
    """A finished run with the configuration that it had."""

    run: LoadedRun
    config: RunConfig

    @property
    def holds_everything(self) -> bool:
        """Each of its processes held all weights and all state, as the figures of papers mean it."""
        engine = self.config.engine
        return engine.name in ("single", "ddp") and engine.optimizer_work == "replicated"


@dataclass(frozen=True)
class Target:
    """What a run must be to stand in a cell.

    Attributes:
        label: the cell in words.
        config: of the run.
        unstated: keys that the paper leaves open.
    """

    label: str
    config: RunConfig
    unstated: Sequence[str]

    def differences(self, found: Finished) -> list[str]:
        """Keys in which a finished run is another one; the seed and what the paper leaves open are none."""
        keys = [key for key in differing_keys(self.config, found.config) if key not in _SEEDS]
        data, own = self.config.data, found.config.data
        keys += [f"data.{key}" for key in _TEXT if getattr(data, key) != getattr(own, key)]
        # Papers of this kind read every document once; a smaller corpus read twice is another protocol.
        if found.run.fact("epochs") > 1:
            keys.append("data.max_tokens")
        return [key for key in keys if key not in self.unstated]


@dataclass(frozen=True)
class Chosen:
    """The runs that speak for a row and column: one setting, its seeds.

    Attributes:
        runs: at least one.
        note: which of several settings it is, where the paper leaves keys open; else empty.
    """

    runs: list[Finished]
    note: str

    def measured(self, quantity: Quantity) -> float | None:
        """The figure in the quantity's unit; None where the runs do not have it.

        Perplexity is exp of the mean loss. Memory is the largest of any process, weights and state as held.
        """
        if quantity.kind == "perplexity":
            return math.exp(fmean(found.run.final_loss for found in self.runs))
        if quantity.kind == "state_numbers":
            return None
        kinds = {"weights": "weights", "state": "optimizer_state"}
        whole = (found for found in self.runs if found.holds_everything)
        sizes = [sum(f.run.fact("memory_bytes", kinds[kind]) for kind in quantity.counts) for f in whole]
        return max((quantity.in_unit(size) for size in sizes if math.isfinite(size)), default=None)


def read(folder: Path) -> tuple[list[Finished], list[str]]:
    """The finished runs below a folder, and a line for each other run that says why it is no evidence.

    Raises:
        InputError: no such folder.
    """
    finished: list[Finished] = []
    remarks: list[str] = []
    for run in loading.load(folder):
        if run.is_external:
            remarks.append(
                f"{run.where}: not taken, a run of another trainer, whose protocol cannot be checked"
            )
        elif not run.finished:
            remarks.append(f"{run.where}: not taken, {run.state}")
        else:
            try:
                finished.append(Finished(run, compose.load_file(run.folder / "config.yaml")))
            except InputError as error:
                remarks.append(f"{run.where}: not taken, {error}")
    return finished, remarks


def choose(matching: Sequence[Finished], unstated: Sequence[str]) -> Chosen | None:
    """One setting out of runs that match a target: of several values of ``unstated`` keys, the lowest mean loss.

    A seed counts once in a setting. None without runs.
    """
    settings: dict[str, dict[int, Finished]] = {}
    for found in matching:
        values = leaves("", found.config.model_dump(mode="json"))
        setting = " ".join(f"{key}={format_value(values.get(key))}" for key in unstated)
        settings.setdefault(setting, {}).setdefault(found.run.seed, found)
    if not settings:
        return None
    losses = {s: fmean(found.run.final_loss for found in seeds.values()) for s, seeds in settings.items()}
    best = min(losses, key=lambda setting: losses[setting])
    note = f"the best of {len(settings)} settings: {best}" if len(settings) > 1 else ""
    return Chosen(list(settings[best].values()), note)


def remark(found: Finished, targets: Sequence[Target]) -> str:
    """Why a finished run, which matches none of the targets, is in no cell: the closest one, and what differs."""
    if not targets:
        return f"{found.run.where}: not taken, no run fills a cell of this table"
    apart = [(target.label, target.differences(found)) for target in targets]
    label, keys = min(apart, key=lambda entry: len(entry[1]))
    shown = ", ".join(keys[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
    return f"{found.run.where}: not taken; closest to {label}, differs in {shown}"
