"""Publish a comparison to W&B (`optbench report DIR --wandb`): dashboards, a report, and the report's files.

Without a login the definition of the dashboards and a local preview are written instead.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import formatting
from analysis.comparison import document
from analysis.comparison.document import Document
from analysis.dashboards import client, definition, preview
from analysis.dashboards.definition import Scope
from harness.config.schema import RunConfig
from harness.files import atomic
from harness.record import readers
from harness.record.wandb import WandbSink
from harness.visible import visible

DEFINITION_SCHEMA_VERSION = 1
DEFINITION, PREVIEW = "wandb_dashboards.json", "wandb_preview.html"
ARTIFACT = "comparison"

WriteReport = Callable[[Document, Path], list[Path]]
"""Writes the files of a report into a folder and returns their paths, the HTML page among them."""


@dataclass(frozen=True)
class Publication:
    """Files that were written, remarks for the user, and links to W&B."""

    files: list[Path] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)


def publish(
    original: Document, out: Path, project: tuple[str | None, str] | None, write_report: WriteReport
) -> Publication:
    """Write the definition of the dashboards; save them and log the report's files where W&B can be reached.

    Args:
        original: the judged runs.
        out: folder of the report; receives the definition.
        project: entity (or None) and project; None: those in the runs' configurations.
        write_report: writes the report's files, for the artifact.

    Raises:
        InputError: the runs name several projects.
    """
    # What leaves the machine contains no paths of it.
    public = document.judge_folder(original.folder, public=True, log_format=original.log_format)
    scope = definition.find_scope(public, project)
    remarks = _missing_in_wandb(original)
    if not scope.sets:
        return Publication(remarks=[*remarks, "W&B: none of these runs was made here; nothing to show there"])
    obstacle = client.find_obstacle()
    links: dict[str, str] = {}
    if obstacle is None:
        remarks += _send_waiting_runs(original)
        try:
            scope, links = _save_dashboards(scope, public, out, write_report)
        except Exception as error:
            # W&B's client raises many types, some of them bare Exception; the local files are written in any case.
            obstacle = (str(error).splitlines() or [type(error).__name__])[0][:200]
    atomic.write_json(out / DEFINITION, _definition_json(scope, public, _read_saved(out)))
    files = [out / DEFINITION]
    if obstacle is not None:
        atomic.write_text(out / PREVIEW, preview.render(public, scope))
        files.append(out / PREVIEW)
        remarks.append(
            f"W&B: {obstacle.rstrip('.')}. The definition is in {DEFINITION}, a preview in {PREVIEW}; "
            "the same command saves the dashboards once W&B can be reached"
        )
    return Publication(files, remarks, links)


def _missing_in_wandb(original: Document) -> list[str]:
    """Return a remark for each kind of runs that the dashboards cannot show because W&B does not have them."""
    external = sum(run.is_external for run in original.runs)
    settings = [run.config.get("wandb") for run in original.runs if not run.is_external]
    disabled = sum(isinstance(keys, dict) and keys.get("mode") == "disabled" for keys in settings)
    counts = {"from tables": external, "trained with wandb.mode=disabled": disabled}
    return [
        f"W&B: {formatting.plural(n, 'run')} {kind}: in the artifact only" for kind, n in counts.items() if n
    ]


def _send_waiting_runs(original: Document) -> list[str]:
    """Send the runs that wait in their folders, so that the dashboards can show them; return remarks."""
    failures: list[str] = []
    sent = 0
    for run in original.runs:
        if run.is_external or run.state == "running" or not client.unsent_folders(run.folder):
            continue
        problem = client.sync(run.folder)
        sent += problem is None
        if problem is not None:
            failures.append(f"W&B: {run.where} could not be sent: {problem}")
    return [f"W&B: {formatting.plural(sent, 'offline run')} sent", *failures] if sent else failures


def _definition_json(scope: Scope, public: Document, saved: dict[str, Any]) -> dict[str, Any]:
    from analysis.dashboards import workspace

    return {
        "schema_version": DEFINITION_SCHEMA_VERSION,
        "entity": scope.entity,
        "project": scope.project,
        "groups": list(scope.groups),
        "group_by": list(scope.group_by),
        "saved": saved,
        "workspace": workspace.to_json(workspace.workspace(scope, _name(scope))),
        "report": workspace.to_json(workspace.report(scope, public, _name(scope), online=False)),
    }


def _name(scope: Scope) -> str:
    return f"optbench: {', '.join(scope.groups) or scope.project}"


def _read_saved(out: Path) -> dict[str, Any]:
    """Return where an earlier call saved the dashboards, so that they are updated and not duplicated."""
    saved = (readers.json_object(out / DEFINITION)[0] or {}).get("saved")
    return saved if isinstance(saved, dict) else {}


def _save_dashboards(
    scope: Scope, public: Document, out: Path, write_report: WriteReport
) -> tuple[Scope, dict[str, str]]:
    """Log the report's files, then save the dashboards; return the scope with W&B's entity, and the links."""
    entity, address = log_report(scope, public, write_report)
    scope = scope.at(entity)
    from analysis.dashboards import workspace

    place = [entity, scope.project]
    saved = _read_saved(out)
    if saved.get("place") != place:
        saved = dict[str, Any](place=place)
    board = workspace.workspace(scope, _name(scope))
    board._internal_name, board._internal_id = saved.get("workspace", ["", ""])
    board.save()
    saved["workspace"] = [board._internal_name, board._internal_id]
    # Written before the next step, which may fail: a later call must not save a second workspace.
    atomic.write_json(out / DEFINITION, {"schema_version": DEFINITION_SCHEMA_VERSION, "saved": saved})
    report = workspace.report(scope, public, _name(scope), online=True)
    report.id = saved.get("report", "")
    report.save()
    saved["report"] = report.id
    atomic.write_json(out / DEFINITION, {"schema_version": DEFINITION_SCHEMA_VERSION, "saved": saved})
    return scope, {"W&B workspace": board.url, "W&B report": report.url, "W&B run with the files": address}


def log_report(scope: Scope, public: Document, write_report: WriteReport) -> tuple[str, str]:
    """Log a W&B run of job type ``report`` that shows page and tables and holds all files as an artifact.

    Returns:
        Entity and address of that run.

    Raises:
        RuntimeError: W&B did not accept it.
    """
    accepted: dict[str, str] = {}
    messages: list[str] = []
    keys = [key for key, _ in scope.sets]
    identity = hashlib.sha256("\0".join([scope.project, *scope.groups, *keys]).encode()).hexdigest()[:10]
    group = visible(", ".join(scope.groups))[:120] or "default"
    config = RunConfig.model_validate(
        {"wandb": {"mode": "online", "project": scope.project, "entity": scope.entity}, "group": group}
    )
    with tempfile.TemporaryDirectory(prefix="optbench-") as scratch:
        folder = Path(scratch, "report-" + re.sub(r"[^\w.,+ -]", "-", group, flags=re.ASCII))
        folder.mkdir()
        files = write_report(public, folder / "files")
        certificates = folder / "files" / "certificates.json"
        atomic.write_json(certificates, _certificates(public))
        sink = WandbSink(
            config,
            folder,
            f"report-{identity}",
            {"comparison_keys": keys, "groups": list(scope.groups)},
            messages.append,
            job_type="report",
            described={"report": {"sentence": public.sentence}},
        )

        def log_files(run: Any) -> None:
            if not run.offline:
                _log_files(run, public, [*files, certificates])
                accepted.update(entity=run.entity, address=run.url)

        sink.attach(log_files)
        sink.finish({"sentence": public.sentence}, exit_code=0)
    if not accepted:
        # The mirror's message promises an offline run, which a report does not need: it is board again.
        reason = (
            messages[0].removeprefix("W&B: ").partition("; writing an offline run")[0] if messages else ""
        )
        raise RuntimeError(reason or "no answer")
    return accepted["entity"], accepted["address"]


def _log_files(run: Any, public: Document, files: list[Path]) -> None:
    import wandb

    artifact = wandb.Artifact(f"{ARTIFACT}-{run.id}", type="comparison")
    for path in files:
        artifact.add_file(str(path), name=path.name)
    run.log_artifact(artifact)
    page = next(path for path in files if path.suffix == ".html")
    logged: dict[str, Any] = {"comparison/report": wandb.Html(str(page))}
    for index, judged in enumerate(public.sets):
        columns = judged.table.columns
        rows = [
            [row.cells[column.key].text if column.key in row.cells else "" for column in columns]
            for row in judged.table.rows
        ]
        frame = pd.DataFrame(rows, columns=[column.head for column in columns])
        logged[f"comparison/table{index or ''}"] = wandb.Table(dataframe=frame)
    logged["comparison/certificates"] = wandb.Table(dataframe=pd.DataFrame(_certificates(public)).astype(str))
    run.log(logged)


def _certificates(public: Document) -> list[dict[str, Any]]:
    """Return each run's certificate (`optbench certify`), as far as it is recorded."""
    return [
        {
            "run": run.where,
            "optimizer": run.optimizer,
            "seed": run.seed,
            **(run.certified or {"passed": None}),
        }
        for run in public.runs
        if not run.is_external
    ]
