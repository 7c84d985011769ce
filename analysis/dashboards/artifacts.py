"""The report's own files in W&B: a run that shows page and tables, and holds all of them as an artifact."""

from __future__ import annotations

import hashlib
import re
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.compare.document import Document
from analysis.dashboards.scope import Scope
from analysis.report import report
from harness.config.schema import RunConfig
from harness.files import atomic
from harness.record.wandb import WandbSink
from harness.visible import visible

ARTIFACT = "comparison"


def log(where: Scope, shown: Document) -> tuple[str, str]:
    """One W&B run of job type `report`: page and tables to look at, all files as an artifact.

    Returns:
        Entity and address of that run.

    Raises:
        RuntimeError: W&B did not take it; says why.
    """
    taken: dict[str, str] = {}
    said: list[str] = []
    identity = hashlib.sha256("\0".join([where.project, *where.groups, *(k for k, _ in where.sets)]).encode())
    group = visible(", ".join(where.groups))[:120] or "default"
    config = RunConfig.model_validate(
        {"wandb": {"mode": "online", "project": where.project, "entity": where.entity}, "group": group}
    )
    with tempfile.TemporaryDirectory(prefix="optbench-") as scratch:
        folder = Path(scratch, "report-" + re.sub(r"[^\w.,+ -]", "-", group, flags=re.ASCII))
        folder.mkdir()
        files = report.write(shown, folder / "files").files
        certificates = folder / "files" / "certificates.json"
        atomic.write_json(certificates, _certificates(shown))
        sink = WandbSink(
            config,
            folder,
            f"report-{identity.hexdigest()[:10]}",
            {"comparison_keys": [key for key, _ in where.sets], "groups": list(where.groups)},
            said.append,
            job_type="report",
            described={"report": {"sentence": shown.sentence}},
        )

        def hand_over(run: Any) -> None:
            if not run.offline:
                _attach(run, shown, [*files, certificates])
                taken.update(entity=run.entity, address=run.url)

        sink.attach(hand_over)
        sink.finish({"sentence": shown.sentence}, exit_code=0)
    if not taken:
        # What the mirror says of a run of training, it says here of a report, which is made again instead.
        reason = (
            said[0].removeprefix("W&B: ").partition("; writing an offline run")[0] if said else "no answer"
        )
        raise RuntimeError(reason)
    return taken["entity"], taken["address"]


def _attach(run: Any, shown: Document, files: list[Path]) -> None:
    import wandb

    artifact = wandb.Artifact(f"{ARTIFACT}-{run.id}", type="comparison")
    for path in files:
        artifact.add_file(str(path), name=path.name)
    run.log_artifact(artifact)
    page = next(path for path in files if path.suffix == ".html")
    logged: dict[str, Any] = {"comparison/report": wandb.Html(str(page))}
    for index, judged in enumerate(shown.sets):
        columns = judged.table.columns
        rows = [
            [row.cells[c.key].text if c.key in row.cells else "" for c in columns]
            for row in judged.table.rows
        ]
        heads = [f"{c.label} ({c.unit})" if c.unit else c.label for c in columns]
        logged[f"comparison/table{index or ''}"] = wandb.Table(dataframe=pd.DataFrame(rows, columns=heads))
    logged["comparison/certificates"] = wandb.Table(dataframe=pd.DataFrame(_certificates(shown)).astype(str))
    run.log(logged)


def _certificates(shown: Document) -> list[dict[str, Any]]:
    """What is known of each run's optimizer on its engine (`optbench certify`)."""
    return [
        {
            "run": run.where,
            "optimizer": run.optimizer,
            "seed": run.seed,
            **(run.certified or {"passed": None}),
        }
        for run in shown.runs
        if not run.is_external
    ]
