"""`optbench report DIR`: compare the runs below a folder, and optionally show them in W&B.

Arguments are checked before pandas, scipy and plotly are imported, so that a typing error is answered at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness import command_line
from harness.commands import COMMANDS
from harness.errors import InputError

if TYPE_CHECKING:
    from analysis.comparison.document import Document
    from analysis.report.report import WrittenReport


@dataclass(frozen=True)
class ReportRequest:
    """Arguments of one `optbench report` command."""

    folder: Path
    """Of the runs; with ``export`` they are written there first."""
    out: Path
    as_json: bool
    figures: bool = False
    """Also write each plot as a PNG."""
    wandb: bool = False
    """Build dashboards in W&B."""
    project: tuple[str | None, str] | None = None
    """W&B entity (None: one's own) and project for them; None: what the runs name."""
    export: tuple[str, str, str | None] | None = None
    """W&B entity, project and group (None: all) to read runs from."""
    log_format: str | None = None
    """Format of public logs to read instead of runs."""


def main(argv: Sequence[str]) -> int:
    """Run ``optbench report DIR [--out DIR] [--figures png] [--format track3] [--wandb] [--json]``.

    ``ENTITY/PROJECT[/GROUP] --export DIR`` first reads runs from W&B into DIR.

    Returns:
        0, also for a folder without runs, for which the report states that.

    Raises:
        InputError: no such folder or W&B project, or an unknown argument.
    """
    request = parse(argv)
    if request.export is not None:
        from analysis.dashboards.export import export

        folders, remarks = export(request.export, request.folder)
        for line in (*remarks, f"{len(folders)} runs read from W&B into {request.folder}"):
            print(line, file=sys.stderr)
    from analysis.report import report

    def publish_to_wandb(document: Document, written: WrittenReport) -> WrittenReport:
        from analysis.dashboards.publishing import publish

        def write_files(public: Document, folder: Path) -> list[Path]:
            return report.write(public, folder).files

        added = publish(document, written.html.parent, request.project, write_files)
        return replace(
            written,
            files=[*written.files, *added.files],
            remarks=[*written.remarks, *added.remarks],
            links={**written.links, **added.links},
        )

    report.finish(
        request.folder,
        request.out,
        as_json=request.as_json,
        publish=publish_to_wandb if request.wandb else None,
        figures=request.figures,
        log_format=request.log_format,
    )
    return 0


def parse(argv: Sequence[str]) -> ReportRequest:
    """Parse the arguments of ``optbench report``.

    Raises:
        InputError: no folder, more than one, an unknown option, or a W&B project that is not ENTITY/PROJECT.
    """
    arguments = command_line.parse("report", argv)
    options, sources = arguments.options, list(arguments.rest)
    is_export = options.export is not None
    if is_export and options.wandb:
        # With --export, --wandb=ENTITY/PROJECT names the project to read.
        sources.append(options.wandb)
    if len(sources) != 1:
        what = "is not one W&B project" if is_export else "is not one folder"
        fix = _EXPORT if is_export else "optbench report runs"
        shown = " ".join(sources) or "nothing"
        raise InputError("report", shown, what, allowed=COMMANDS["report"].usage, fix=fix)
    if is_export and options.format:
        raise InputError("--format", options.format, "reads files", fix="one of --format and --export")
    folder = Path(options.export if is_export else sources[0])
    # Logs are somebody else's files: nothing is written among them.
    home = Path("runs") / folder.resolve().name if options.format else folder
    return ReportRequest(
        folder=folder,
        out=Path(options.out or home),
        log_format=options.format,
        as_json=options.json,
        figures=options.figures is not None,
        wandb=options.wandb is not None and not is_export,
        project=_dashboard_project(options.wandb) if options.wandb and not is_export else None,
        export=_exported_project(sources[0]) if is_export else None,
    )


_EXPORT = "optbench report ENTITY/PROJECT/GROUP --export FOLDER"


def _dashboard_project(text: str) -> tuple[str | None, str]:
    parts = text.split("/")
    if len(parts) > 2 or not all(parts):
        raise InputError("--wandb", text, allowed="PROJECT or ENTITY/PROJECT", fix="--wandb=ENTITY/PROJECT")
    return (parts[0] if len(parts) == 2 else None), parts[-1]


def _exported_project(text: str) -> tuple[str, str, str | None]:
    entity, project, group = [*text.split("/", 2), "", ""][:3]
    if not entity or not project or (text.count("/") > 1 and not group):
        raise InputError("--export", text, allowed="ENTITY/PROJECT or ENTITY/PROJECT/GROUP", fix=_EXPORT)
    return entity, project, group or None
