"""`optbench report DIR --wandb`: the definition as a file, and with a login the dashboards and the report in W&B."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis import formatting
from analysis.compare import document
from analysis.compare.document import Document
from analysis.dashboards import access, artifacts, preview, scope, syncing
from analysis.dashboards.scope import Scope
from analysis.report.report import WrittenReport
from harness.files import atomic
from harness.record import readers

SCHEMA_VERSION = 1
DEFINITION, PREVIEW = "wandb_dashboards.json", "wandb_preview.html"


def publish(found: Document, written: WrittenReport, place: tuple[str | None, str] | None) -> WrittenReport:
    """Write the definition beside the report; save it, and log the report's files, where W&B can be reached.

    Args:
        found: the comparison.
        written: its report.
        place: (entity or None, project); None: what the runs' configurations name.

    Returns:
        ``written`` with the files, links and remarks that were added.

    Raises:
        InputError: the runs name several projects.
    """
    out = written.html.parent
    # Of what leaves the machine, from here on: without its paths.
    shown = document.judge_folder(found.folder, public=True)
    where = scope.of(shown, place)
    remarks = [*written.remarks, *_left_out(found)]
    if not where.sets:
        return replace(
            written, remarks=[*remarks, "W&B: none of these runs was made here; nothing to show there"]
        )
    obstacle = access.obstacle()
    links: dict[str, str] = {}
    if obstacle is None:
        remarks += _sync(found)
        try:
            where, links = _upload(where, shown, out)
        except Exception as error:
            # W&B's client raises many types, some of them bare Exception; the files are there whatever it says.
            obstacle = (str(error).splitlines() or [type(error).__name__])[0][:200]
    atomic.write_json(out / DEFINITION, _definition(where, shown, _saved(out)))
    files = [*written.files, out / DEFINITION]
    if obstacle is not None:
        atomic.write_text(out / PREVIEW, preview.render(shown, where))
        files.append(out / PREVIEW)
        remarks.append(
            f"W&B: {obstacle.rstrip('.')}. What would be saved is in {DEFINITION}, how it looks in {PREVIEW}; "
            "the same command saves it once W&B can be reached"
        )
    return replace(written, files=files, remarks=remarks, links={**written.links, **links})


def _left_out(found: Document) -> list[str]:
    """Runs that the dashboards cannot show, because W&B does not have them."""
    foreign = [run for run in found.runs if run.is_external]
    own = [run.config.get("wandb") for run in found.runs if not run.is_external]
    silent = sum(isinstance(keys, dict) and keys.get("mode") == "disabled" for keys in own)
    lines = {"from tables": len(foreign), "trained with wandb.mode=disabled": silent}
    return [
        f"W&B: {formatting.plural(n, 'run')} {what}: in the artifact only" for what, n in lines.items() if n
    ]


def _sync(found: Document) -> list[str]:
    """Send the runs that wait in their folders; what dashboards show must be there."""
    lines: list[str] = []
    sent = 0
    for run in found.runs:
        if run.is_external or run.state == "running" or not syncing.waiting(run.folder):
            continue
        problem = syncing.sync(run.folder)
        sent += problem is None
        if problem is not None:
            lines.append(f"W&B: {run.where} could not be sent: {problem}")
    return [f"W&B: {formatting.plural(sent, 'offline run')} sent", *lines] if sent else lines


def _definition(where: Scope, shown: Document, saved: dict[str, Any]) -> dict[str, Any]:
    from analysis.dashboards import workspace

    return {
        "schema_version": SCHEMA_VERSION,
        "entity": where.entity,
        "project": where.project,
        "groups": list(where.groups),
        "group_by": list(where.group_by),
        "saved": saved,
        "workspace": workspace.to_json(workspace.workspace(where, _name(where))),
        "report": workspace.to_json(workspace.report(where, shown, _name(where), online=False)),
    }


def _name(where: Scope) -> str:
    return f"optbench: {', '.join(where.groups) or where.project}"


def _saved(out: Path) -> dict[str, Any]:
    """Where an earlier call saved the dashboards: they are updated rather than made again."""
    found = (readers.json_object(out / DEFINITION)[0] or {}).get("saved")
    return found if isinstance(found, dict) else {}


def _upload(where: Scope, shown: Document, out: Path) -> tuple[Scope, dict[str, str]]:
    """Log the files, then save the dashboards; the scope with the entity that W&B took, and the links."""
    entity, address = artifacts.log(where, shown)
    where = where.at(entity)
    from analysis.dashboards import workspace

    place = [entity, where.project]
    saved: dict[str, Any] = _saved(out)
    if saved.get("place") != place:
        saved.clear()
        saved["place"] = place
    made = workspace.workspace(where, _name(where))
    made._internal_name, made._internal_id = saved.get("workspace", ["", ""])
    made.save()
    saved["workspace"] = [made._internal_name, made._internal_id]
    # Kept before the next step, which may fail: the one after that must not save a second workspace.
    atomic.write_json(out / DEFINITION, {"schema_version": SCHEMA_VERSION, "saved": saved})
    text = workspace.report(where, shown, _name(where), online=True)
    text.id = saved.get("report", "")
    text.save()
    saved["report"] = text.id
    atomic.write_json(out / DEFINITION, {"schema_version": SCHEMA_VERSION, "saved": saved})
    return where, {"W&B workspace": made.url, "W&B report": text.url, "W&B run with the files": address}
