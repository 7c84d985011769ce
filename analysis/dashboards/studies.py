"""The studies of docs/RESULTS.md as a W&B workspace: write its definition, and create it in a project.

    python -m analysis.dashboards.studies                  # write wandb_studies.json
    python -m analysis.dashboards.studies ENTITY/PROJECT   # and create the workspace there; again: update it

It shows the runs on fresh seeds, grouped by study and arm; the trials are in groups of their own. Runs reach W&B while
they train, or later by ``optbench report runs/studies --wandb``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.dashboards import client
from analysis.dashboards.definition import OPTIMIZER, Scope
from analysis.results.studies import STUDIES
from harness.errors import InputError
from harness.files import atomic
from harness.record import readers

SCHEMA_VERSION = 1
FILE = "wandb_studies.json"
NAME = "optbench: studies"
GROUP_BY = ("group", OPTIMIZER, "optimizer.rank", "optimizer.refresh_interval")
"""Study, optimizer, and the options in which two arms of a study differ."""


def main(argv: Sequence[str]) -> int:
    """Write the definition, and save the workspace where a project is named.

    Returns:
        0: done. 2: W&B cannot be reached, did not accept it, or there is no wandb-workspaces; the file is written
        where that is possible.
    """
    parser = argparse.ArgumentParser(prog="python -m analysis.dashboards.studies")
    parser.add_argument("project", nargs="?", metavar="ENTITY/PROJECT")
    parser.add_argument("--out", type=Path, default=Path(FILE), help=f"file of the definition ({FILE})")
    options = parser.parse_args(argv)
    try:
        place = _place(options.project)
        definition = to_definition(place)
        saved = _read_saved(options.out) if options.project else {}
        atomic.write_json(options.out, {**definition, "saved": saved})
        print(options.out)
        if options.project:
            print(f"W&B workspace: {_save(place, options.out, definition, saved)}")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def scope(place: tuple[str | None, str] = (None, "optbench")) -> Scope:
    """Return the runs on fresh seeds of all studies, in a project."""
    groups = tuple(study.name for study in STUDIES)
    return Scope(*place, groups=groups, sets=(), group_by=GROUP_BY, colours=())


def to_definition(place: tuple[str | None, str] = (None, "optbench")) -> dict[str, Any]:
    """Return the definition as JSON data: groups, grouping, and the workspace as W&B would save it.

    Raises:
        InputError: wandb-workspaces is not installed.
    """
    workspace = _objects()
    chosen = scope(place)
    return {
        "schema_version": SCHEMA_VERSION,
        "entity": chosen.entity,
        "project": chosen.project,
        "groups": list(chosen.groups),
        "group_by": list(chosen.group_by),
        "workspace": workspace.to_json(workspace.workspace(chosen, NAME)),
    }


def _objects() -> Any:
    """Import what makes W&B's objects.

    Raises:
        InputError: wandb-workspaces is not installed.
    """
    try:
        from analysis.dashboards import workspace
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("wandb_workspaces", "wandb"):
            raise
        raise InputError(
            "workspace", error.name, "is not installed", fix="pip install 'wandb-workspaces>=0.4.13,<0.5'"
        ) from error
    return workspace


def _place(text: str | None) -> tuple[str | None, str]:
    if text is None:
        return None, "optbench"
    entity, slash, project = text.partition("/")
    if not (entity and slash and project) or "/" in project:
        raise InputError("project", text, allowed="ENTITY/PROJECT")
    return entity, project


def _read_saved(out: Path) -> dict[str, Any]:
    """Return where an earlier call saved the workspace; empty if it was not saved."""
    saved = (readers.json_object(out)[0] or {}).get("saved")
    return saved if isinstance(saved, dict) else {}


def _save(place: tuple[str | None, str], out: Path, definition: dict[str, Any], saved: dict[str, Any]) -> str:
    """Save the workspace, replacing the one that an earlier call saved in this project; return its address.

    Raises:
        InputError: W&B cannot be reached, or did not accept it.
    """
    shown = "/".join(part for part in place if part)
    if (obstacle := client.find_obstacle()) is not None:
        raise InputError("project", shown, f"needs W&B: {obstacle}", fix="wandb login")
    board = _objects().workspace(scope(place), NAME)
    if saved.get("place") == list(place):
        board._internal_name, board._internal_id = saved["workspace"]
    try:
        board.save()
    except Exception as error:  # W&B's client raises many types, some of them bare Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError("project", shown, f"could not be changed: {reason}") from error
    kept = {"place": list(place), "workspace": [board._internal_name, board._internal_id]}
    atomic.write_json(out, {**definition, "saved": kept})
    return board.url


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
