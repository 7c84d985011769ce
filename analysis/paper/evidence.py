"""Finished runs as evidence for a cell: taken only if nothing but the seed, and what the paper leaves open, differs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from analysis.compare import loading
from analysis.compare.runs import Run
from analysis.paper.tables import Quantity
from harness.config import compose
from harness.config.errors import InputError
from harness.config.identity import differing_keys
from harness.config.keys import word
from harness.config.schema import RunConfig

_GIB = 2**30
_SEEDS = ("seed", "optimizer.seed")
# The identity of a run has the hash of its corpus in their place.
_TEXT = ("source", "package", "files", "dataset", "subset", "split", "field", "tokenizer", "vocab_size")
_WHOLE_STATE = ("single", "ddp")
"""Engines whose processes each hold everything, as the figures of papers mean it."""


@dataclass(frozen=True, eq=False)
class Finished:
    """A finished run with the configuration that it had."""

    run: Run
    config: RunConfig


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
class Measured:
    """What runs say about a cell.

    Attributes:
        value: in the unit of the quantity.
        runs: folders of the runs it is made of.
        note: how they were chosen, where the paper leaves keys open; else empty.
    """

    value: float
    runs: list[str]
    note: str = ""


def read(folder: Path) -> tuple[list[Finished], list[str]]:
    """The finished runs below a folder, and a line for each other run that says why it is no evidence.

    Raises:
        InputError: no such folder.
    """
    finished: list[Finished] = []
    remarks: list[str] = []
    for run in loading.load(folder):
        if run.foreign:
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


def measure(runs: Sequence[Finished], quantity: Quantity, unstated: Sequence[str]) -> Measured | None:
    """The figure of matching runs; None where they do not have it.

    Perplexity is exp of the mean loss over seeds; of several settings of what the paper leaves open, that with the
    lowest, which the note says. Memory is the largest of any process, weights and state as held.
    """
    if quantity.kind == "memory":
        return _memory(runs, quantity)
    if quantity.kind != "perplexity" or not runs:
        return None
    settings: dict[tuple[str, ...], dict[int, Finished]] = {}
    for found in runs:
        setting = tuple(f"{key}={word(_value(found.config, key))}" for key in unstated)
        settings.setdefault(setting, {}).setdefault(found.run.seed, found)
    losses = {s: fmean(f.run.final_loss for f in seeds.values()) for s, seeds in settings.items()}
    best = min(losses, key=lambda setting: losses[setting])
    others = len(losses) - 1
    note = f"the best of {others + 1} settings: {' '.join(best)}" if others else ""
    taken = [found.run.where for found in settings[best].values()]
    return Measured(math.exp(losses[best]), taken, note)


def remark(found: Finished, targets: Sequence[Target]) -> str:
    """Why a finished run, which matches none of the targets, is in no cell: the closest one, and what differs."""
    if not targets:
        return f"{found.run.where}: not taken, no run fills a cell of this table"
    apart = [(target.label, target.differences(found)) for target in targets]
    label, keys = min(apart, key=lambda entry: len(entry[1]))
    return f"{found.run.where}: not taken; closest to {label}, differs in {', '.join(keys)}"


def _memory(runs: Sequence[Finished], quantity: Quantity) -> Measured | None:
    kinds = {"weights": "weights", "state": "optimizer_state"}
    sizes = {
        found.run.where: sum(found.run.fact("memory_bytes", kinds[kind]) for kind in quantity.counts) / _GIB
        for found in runs
        if found.config.engine.name in _WHOLE_STATE and found.config.engine.optimizer_work == "replicated"
    }
    known = {where: size for where, size in sizes.items() if math.isfinite(size)}
    return Measured(max(known.values()), list(known)) if known else None


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
