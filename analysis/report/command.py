"""`optbench report DIR`: compare the runs below a folder, and optionally show them in W&B.

Arguments are checked before pandas, scipy and plotly are imported, so that a typing error is answered at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from analysis.training import arguments

if TYPE_CHECKING:
    from analysis.compare.document import Document
    from analysis.report.report import Written


def main(argv: Sequence[str]) -> int:
    """Run ``optbench report DIR [--out DIR] [--figures png] [--wandb] [--json]``.

    ``ENTITY/PROJECT[/GROUP] --export DIR`` first reads runs from W&B into DIR.

    Returns:
        0, also where the folder holds no runs; the report then says so.

    Raises:
        InputError: no such folder or W&B project, or an unknown argument.
    """
    request = arguments.report(argv)
    if request.export is not None:
        from analysis.dashboards.export import export

        folders, remarks = export(request.export, request.folder)
        for line in (*remarks, f"{len(folders)} runs read from W&B into {request.folder}"):
            print(line, file=sys.stderr)
    from analysis.report import finish

    def publish(document: Document, written: Written) -> Written:
        from analysis.dashboards import publishing

        return publishing.publish(document, written, request.project)

    finish.write(
        request.folder,
        request.out,
        as_json=request.as_json,
        further=publish if request.wandb else None,
        figures=request.figures,
    )
    return 0
