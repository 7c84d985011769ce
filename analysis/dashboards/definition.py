"""What the dashboards show: sections of panels over the keys of `harness.record.schema`, and the runs in scope.

`workspace` turns it into W&B's objects, `preview` into a local page, so that both show the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from analysis.comparison.document import Document
from analysis.comparison.sets import ComparisonSet
from analysis.pages.figures import colour
from analysis.runs.run import LoadedRun
from harness.errors import InputError

DEFAULT_PROJECT = "optbench"
OPTIMIZER = "optimizer.name"
Kind = Literal["line", "bar", "comparer"]


class Panel(NamedTuple):
    """One chart.

    Attributes:
        title: shown above it.
        y: metric keys; a bar shows a run's last value of each.
        x: metric key of the horizontal axis of a line.
        log_y: logarithmic vertical axis.
        kind: curves, bars, or the table of differences between runs.
    """

    title: str
    y: tuple[str, ...] = ()
    x: str = "step"
    log_y: bool = False
    kind: Kind = "line"


class Section(NamedTuple):
    """Panels that answer one question."""

    name: str
    panels: tuple[Panel, ...]


SECTIONS: tuple[Section, ...] = (
    Section(
        "Loss",
        (
            Panel("Validation loss over tokens", ("val/loss",), "tokens"),
            Panel("Validation loss over training seconds", ("val/loss",), "wall_s"),
            Panel("Validation loss over model FLOPs", ("val/loss",), "flops"),
            Panel("Training loss over tokens", ("train/loss",), "tokens"),
            Panel("Validation loss at the last evaluation", ("val/loss",), kind="bar"),
            Panel("Lowest validation loss", ("best_val_loss",), kind="bar"),
        ),
    ),
    Section(
        "Throughput",
        (
            Panel("Tokens per second", ("throughput/tokens_per_s",)),
            Panel("Optimizer, seconds per step", ("time/optimizer_s",)),
            Panel("Forward and backward, seconds per step", ("time/forward_backward_s",)),
            Panel("Communication not hidden, seconds per step", ("time/communication_s",)),
            Panel("Model FLOP/s over the devices' peak", ("throughput/mfu",)),
            Panel("Slowest process over the others", ("balance/ratio",)),
        ),
    ),
    Section(
        "Memory",
        (
            Panel(
                "Peak in training and in all phases, bytes",
                ("memory/training_peak_bytes", "memory/peak_bytes"),
                kind="bar",
            ),
            Panel("Optimizer state, bytes", ("memory/optimizer_state_bytes",), kind="bar"),
            Panel(
                "Weights and gradients, bytes", ("memory/weights_bytes", "memory/gradients_bytes"), kind="bar"
            ),
        ),
    ),
    Section(
        "Moments",
        (
            Panel("Condition number, median over layers", ("moments/condition_number/median",), log_y=True),
            Panel("Condition number, worst layer", ("moments/condition_number/max",), log_y=True),
            Panel("Effective rank, median over layers", ("moments/effective_rank/median",)),
            Panel("Stable rank, median over layers", ("moments/stable_rank/median",)),
            Panel("Orthogonality error, worst layer", ("moments/orthogonality_error/max",), log_y=True),
            Panel("Distance from the polar factor, worst layer", ("moments/polar_error/max",), log_y=True),
        ),
    ),
    Section(
        "Stability",
        (
            Panel("Gradient norm before clipping", ("grad_norm",), log_y=True),
            Panel("Learning rate", ("lr",)),
            Panel("Steps skipped because of non-finite gradients", ("skipped_steps",)),
        ),
    ),
    Section("What differs", (Panel("Runs side by side", kind="comparer"),)),
)

COLUMNS = ("val/loss", "best_val_loss", "wall_s", "throughput/tokens_per_s", "memory/training_peak_bytes")
"""Summary values next to a run's name in W&B's table of runs."""


@dataclass(frozen=True)
class Scope:
    """W&B project, runs and grouping of the dashboards."""

    entity: str | None
    """User or team; None: the default of the user who is logged in."""
    project: str
    groups: tuple[str, ...]
    """W&B groups of the runs, which are the groups of their folders."""
    sets: tuple[tuple[str, str], ...]
    """(comparison key, title) of each set."""
    group_by: tuple[str, ...]
    """Configuration keys that define an arm: the optimizer's name, and options in which its arms differ."""
    colours: tuple[tuple[str, str], ...]
    """(optimizer, colour), as in the report."""
    metrics: tuple[str, ...] = ()
    """Metric keys of the tasks of the sets, e.g. ``val/accuracy``; empty for pretraining."""

    def at(self, entity: str) -> Scope:
        """Return the same scope with the entity known."""
        return replace(self, entity=entity)


def sections_of(scope: Scope) -> tuple[Section, ...]:
    """Return the sections: those of every run, and first one for the metrics of tasks where there are some."""
    panels = []
    for key in scope.metrics:
        name = f"Validation {key.removeprefix('val/').replace('_', ' ')}"
        panels += [
            Panel(f"{name} over steps", (key,)),
            Panel(f"{name} over training seconds", (key,), "wall_s"),
            Panel(f"{name} at the last evaluation", (key,), kind="bar"),
        ]
    return (*([Section("Task", tuple(panels))] if panels else []), *SECTIONS)


def find_scope(document: Document, place: tuple[str | None, str] | None) -> Scope:
    """Return the scope of a comparison.

    Args:
        document: judged runs.
        place: entity (or None) and project; None: those in the runs' configurations.

    Raises:
        InputError: ``place`` is None and the runs name more than one project.
    """
    own = [run for run in document.runs if not run.is_external]
    entity, project = place or _place(own)
    sets = [
        comparison
        for comparison in (judged.comparison for judged in document.sets)
        if not all(run.is_external for run in comparison.runs)
    ]
    groups = dict.fromkeys(str(run.config["group"]) for run in own if run.config.get("group"))
    keys: dict[str, None] = {OPTIMIZER: None}
    colours: dict[str, str] = {}
    for comparison in sets:
        keys |= dict.fromkeys(_differing_options(comparison))
        for index, arm in enumerate(comparison.arms):
            colours.setdefault(arm.optimizer, colour(index))
    return Scope(
        entity,
        project,
        tuple(groups),
        tuple((comparison.key, comparison.title) for comparison in sets),
        tuple(keys),
        tuple(colours.items()),
        tuple(dict.fromkeys(c.measure.key for c in sets if not c.measure.is_loss)),
    )


def _place(runs: list[LoadedRun]) -> tuple[str | None, str]:
    places = {
        (keys.get("entity"), str(keys.get("project") or DEFAULT_PROJECT))
        for run in runs
        if isinstance(keys := run.config.get("wandb"), dict)
    }
    if len(places) > 1:
        shown = ", ".join(sorted(f"{entity or '(yours)'}/{project}" for entity, project in places))
        raise InputError(
            "--wandb", shown, "are several W&B projects", fix="optbench report DIR --wandb=ENTITY/PROJECT"
        )
    return places.pop() if places else (None, DEFAULT_PROJECT)


def _differing_options(comparison: ComparisonSet) -> list[str]:
    """Return the options in which arms of one optimizer differ, which keep their runs in separate curves."""
    differing: dict[str, None] = {}
    for name in dict.fromkeys(arm.optimizer for arm in comparison.arms):
        options = [arm.runs[0].optimizer_config for arm in comparison.arms if arm.optimizer == name]
        for key in dict.fromkeys(key for option in options for key in option):
            values = {json.dumps(option.get(key), sort_keys=True, default=str) for option in options}
            if len(values) > 1:
                differing[f"optimizer.{key}"] = None
    return list(differing)
