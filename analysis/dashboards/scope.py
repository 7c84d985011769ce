"""Which W&B project a comparison lies in, which of its runs are shown, and how they are grouped."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from analysis.compare.comparison import ComparisonSet
from analysis.compare.document import Document
from analysis.pages.figures import colour
from analysis.runs.run import LoadedRun
from harness.errors import InputError

DEFAULT_PROJECT = "optbench"
OPTIMIZER = "optimizer.name"


@dataclass(frozen=True)
class Scope:
    """What the dashboards are about."""

    entity: str | None
    """User or team; None: the default of whoever is logged in."""
    project: str
    groups: tuple[str, ...]
    """W&B groups of the runs, which are the groups of their folders."""
    sets: tuple[tuple[str, str], ...]
    """(comparison key, title) of each set."""
    group_by: tuple[str, ...]
    """Configuration keys that make an arm: the optimizer's name, and options that tell its arms apart."""
    colours: tuple[tuple[str, str], ...]
    """(optimizer, colour), as in the report."""

    def at(self, entity: str) -> Scope:
        """The same, with the entity known."""
        return replace(self, entity=entity)


def of(document: Document, place: tuple[str | None, str] | None) -> Scope:
    """The scope of a comparison.

    Args:
        document: judged runs.
        place: (entity or None, project) as the user names it; None: as the runs' configurations do.

    Raises:
        InputError: the runs name more than one project, and the user none.
    """
    own = [run for run in document.runs if not run.is_external]
    entity, project = place or _place(own)
    sets = [
        comparison
        for comparison in (judged.comparison for judged in document.sets)
        if not _is_foreign(comparison)
    ]
    groups = dict.fromkeys(str(run.config["group"]) for run in own if run.config.get("group"))
    keys: dict[str, None] = {OPTIMIZER: None}
    colours: dict[str, str] = {}
    for comparison in sets:
        keys |= dict.fromkeys(_told_apart_by(comparison))
        for index, arm in enumerate(comparison.arms):
            colours.setdefault(arm.optimizer, colour(index))
    return Scope(
        entity,
        project,
        tuple(groups),
        tuple((comparison.key, comparison.title) for comparison in sets),
        tuple(keys),
        tuple(colours.items()),
    )


def _place(runs: list[LoadedRun]) -> tuple[str | None, str]:
    places = {
        (found.get("entity"), str(found.get("project") or DEFAULT_PROJECT))
        for run in runs
        if isinstance(found := run.config.get("wandb"), dict)
    }
    if len(places) > 1:
        shown = ", ".join(sorted(f"{entity or '(yours)'}/{project}" for entity, project in places))
        raise InputError(
            "--wandb", shown, "are several W&B projects", fix="optbench report DIR --wandb=ENTITY/PROJECT"
        )
    return places.pop() if places else (None, DEFAULT_PROJECT)


def _is_foreign(comparison: ComparisonSet) -> bool:
    return all(run.is_external for run in comparison.runs)


def _told_apart_by(comparison: ComparisonSet) -> list[str]:
    """Options in which arms with one optimizer name differ: without them their runs would fold into one curve."""
    found: dict[str, None] = {}
    for name in dict.fromkeys(arm.optimizer for arm in comparison.arms):
        options = [arm.runs[0].optimizer_config for arm in comparison.arms if arm.optimizer == name]
        for key in dict.fromkeys(key for option in options for key in option):
            values: set[Any] = {
                json.dumps(option.get(key), sort_keys=True, default=str) for option in options
            }
            if len(values) > 1:
                found[f"optimizer.{key}"] = None
    return list(found)
