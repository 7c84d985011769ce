"""Which runs are seeds of one setting, and what tells settings apart."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from analysis.runs.run import LoadedRun


class TheoryArm(NamedTuple):
    """A scale, optimizer and setting; its runs differ in the seed alone.

    Attributes:
        scale: model, steps and tokens per step.
        optimizer: preset.
        setting: the learning rate, and every other option in which runs of this scale and optimizer differ.
    """

    scale: str
    optimizer: str
    setting: str

    @property
    def label(self) -> str:
        """Return optimizer, setting and model in short."""
        return f"{self.optimizer}, {self.setting}, {self.scale.partition(',')[0]}"


def scale_of(run: LoadedRun) -> str:
    """Return model, steps and tokens per step of a run."""
    model, keys = run.config.get("model") or {}, run.config
    return f"{model.get('name')}, {keys.get('steps')} steps of {keys.get('batch_size')}×{keys.get('seq_len')}"


def options_of(run: LoadedRun, without: Collection[str] = ()) -> dict[str, Any]:
    """Return what a run was trained with besides its seed: the comparison key, and the optimizer's options."""
    options = {key: value for key, value in run.optimizer_config.items() if key not in without}
    return {"comparison": run.comparison_key, **options}


def setting_key(run: LoadedRun, without: Collection[str] = ()) -> str:
    """Return a text that is equal for runs that differ in the seed and in the options `without` alone."""
    return repr(sorted(options_of(run, without).items()))


def arms_of(runs: Sequence[LoadedRun]) -> dict[Path, TheoryArm]:
    """Return run folder → arm; runs have equal arms exactly where their `setting_key` is equal."""
    found = {}
    for run in runs:
        scale = scale_of(run)
        alike = [
            options_of(other)
            for other in runs
            if scale_of(other) == scale and other.optimizer == run.optimizer
        ]
        own = options_of(run)
        keys = [
            "lr",
            *(key for key in dict.fromkeys(key for options in alike for key in options) if key != "lr"),
        ]
        missing = object()
        shown = [
            f"{key} {own.get(key)}"
            for key in keys
            if key == "lr" or any(options.get(key, missing) != own.get(key, missing) for options in alike)
        ]
        found[run.folder] = TheoryArm(scale, run.optimizer, ", ".join(shown))
    return found
