"""Export runs from W&B into run folders (`optbench report ENTITY/PROJECT[/GROUP] --export DIR`)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from analysis.dashboards import client
from harness.config.schema import RunConfig
from harness.errors import InputError
from harness.files import atomic
from harness.record import readers
from harness.record.schema import METRICS, SCHEMA_VERSION, STATES, SUMMARY_KEYS

STATE_OF = {"finished": "finished", "running": "running", "pending": "running", "preempting": "interrupted"}
"""W&B's state of a run without our summary → ours; all other states (crashed, killed) count as failed."""


def export(place: tuple[str, str, str | None], out: Path) -> tuple[list[Path], list[str]]:
    """Write a run folder below ``out`` for each training run of a W&B project.

    The folder contains what the mirror sent: configuration (paths redacted), metrics, summary, certificate. Spectra by
    layer and the table of parameters exist only where the run was made.

    Args:
        place: entity, project, and the group or None for all.
        out: receives the folders; a folder of the same run is replaced.

    Returns:
        The folders, and a line for each run that optbench did not make.

    Raises:
        InputError: W&B cannot be reached or has no such project, the project has no optbench run, or a folder exists.
    """
    entity, project, group = place
    shown = "/".join(part for part in place if part)
    if obstacle := client.find_obstacle():
        raise InputError("--export", shown, f"needs W&B: {obstacle}", fix="wandb login")
    import wandb

    filters: dict[str, Any] = {"jobType": "train", **({"group": group} if group else {})}
    remarks: list[str] = []
    written: dict[Path, None] = {}
    try:
        for run in wandb.Api(timeout=client.ANSWER_TIMEOUT_S).runs(
            f"{entity}/{project}", filters=filters, lazy=False
        ):
            if not isinstance(run.config.get("optimizer"), dict):
                remarks.append(f"{run.name} ({run.id}) is not a run of optbench: skipped")
                continue
            folder = _place(out, run, written)
            _write(folder, run, f"{entity}/{project}/{run.id}")
            written[folder] = None
    except InputError:
        raise
    except Exception as error:
        # W&B's client raises many types: network, permission, no such project.
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError("--export", shown, f"could not be read: {reason}") from error
    if not written:
        raise InputError(
            "--export", shown, "holds no training run of optbench", allowed="ENTITY/PROJECT[/GROUP]"
        )
    return list(written), remarks


def _place(out: Path, run: Any, taken: Mapping[Path, None]) -> Path:
    """Return the folder of a run by its name, with its id if two runs have the same name."""
    name = re.sub(r"[^\w.+-]+", "-", str(run.name or run.id)).strip("-.") or run.id
    groups = [re.sub(r"[^\w.+-]+", "-", str(run.group)).strip("-.")] if run.group else []
    folder = out.joinpath(*groups, name)
    if folder in taken:
        folder = folder.with_name(f"{name}-{run.id}")
    if folder.exists() and _origin(folder) != run.id:
        raise InputError("--export", folder, "exists and is another run", fix="--export ANOTHER_FOLDER")
    return folder


def _origin(folder: Path) -> str | None:
    status, _ = readers.status(folder)
    return status.wandb_run_id if status is not None and "exported_from" in status.facts() else None


def _write(folder: Path, run: Any, origin: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    summary = {
        key: _to_jsonable(run.summary.get(key)) for key in SUMMARY_KEYS if run.summary.get(key) is not None
    }
    config = _config(run.config)
    rows = _rows(run.scan_history(use_cache=False))
    state = summary.get("state")
    ended = state in STATES
    state = state if ended else STATE_OF.get(run.state, "failed")
    last = rows[-1]["step"] if rows else 0
    if ended and state != "finished":
        summary.pop("val/loss", None)  # W&B keeps the last value of each key; ours is that of the last step
    attempt = {"state": state, "reason": str(summary.get("reason") or f"W&B: {run.state}"), "first_step": 0}
    files = {
        "config.yaml": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "environment.json": _json({"certificate": run.config.get("certificate")}),
        "status.json": _json(
            {
                "schema_version": SCHEMA_VERSION,
                "state": state,
                "step": last,
                "steps": config.get("steps"),
                "wandb_run_id": run.id,
                "exported_from": origin,
                "attempts": [{**attempt, "last_step": last}],
            }
        ),
    }
    if ended:
        files["summary.json"] = _json({"schema_version": SCHEMA_VERSION, **summary})
    for name in ("summary.json", "DONE"):
        (folder / name).unlink(missing_ok=True)
    for name, text in files.items():
        atomic.write_text(folder / name, text)
    if state == "finished":
        (folder / "DONE").touch()


def _config(sent: Mapping[str, Any]) -> dict[str, Any]:
    """Return our keys of a run's configuration; empty tables, which W&B drops, are restored if it validates."""
    kept = {key: value for key, value in sent.items() if key in RunConfig.model_fields}
    try:
        return RunConfig.model_validate(kept).model_dump(mode="json")
    except ValidationError:
        return kept


def _rows(history: Iterable[Mapping[str, Any]]) -> list[dict[str, float | int | None]]:
    """Return our keys of W&B's rows by step; of a step that was sent twice, the later row is used."""
    by_step: dict[int, dict[str, float | int | None]] = {}
    for row in history:
        step = _number(row.get("step"))
        if step is not None:
            by_step[int(step)] = {key: _number(value) for key, value in row.items() if key in METRICS}
    return [{**by_step[step], "step": step} for step in sorted(by_step)]


def _number(value: object) -> float | int | None:
    """Return a finite number, or None: W&B stores non-finite numbers as text."""
    is_finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_finite else None  # pyright: ignore[reportReturnType]


def _to_jsonable(value: Any) -> Any:
    """Convert W&B's summary objects to JSON data; non-finite numbers become null."""
    if isinstance(value, str | bool) or value is None:
        return value
    if hasattr(value, "items"):
        return {str(key): _to_jsonable(inner) for key, inner in value.items() if not str(key).startswith("_")}
    if isinstance(value, list | tuple):
        return [_to_jsonable(inner) for inner in value]
    return _number(value)


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, allow_nan=False) + "\n"
