"""`optbench report ENTITY/PROJECT[/GROUP] --export DIR`: runs of W&B read back into run folders."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from analysis.dashboards import access
from harness.config.schema import RunConfig
from harness.errors import InputError
from harness.files import atomic
from harness.record import readers
from harness.record.schema import METRICS, SCHEMA_VERSION, STATES, SUMMARY_KEYS

STATE_OF = {"finished": "finished", "running": "running", "pending": "running", "preempting": "interrupted"}
"""W&B's word for a run that left no summary of its own → ours; all others (crashed, killed, failed) failed."""


def export(place: tuple[str, str, str | None], out: Path) -> tuple[list[Path], list[str]]:
    """Write a run folder below ``out`` for each training run of a W&B project.

    What comes back is what the mirror sent: configuration (paths cut), rows, summary, certificate. Spectra by layer and
    the table of parameters stay where the run was made.

    Args:
        place: entity, project, and the group or None for all.
        out: for the folders; a folder that holds the same run is written anew.

    Returns:
        The folders, and a line for each run that is none of ours.

    Raises:
        InputError: W&B can't be reached or has no such project, no run of ours is in it, or a folder is taken.
    """
    entity, project, group = place
    shown = "/".join(part for part in place if part)
    if obstacle := access.obstacle():
        raise InputError("--export", shown, f"needs W&B: {obstacle}", fix="wandb login")
    import wandb

    chosen: dict[str, Any] = {"jobType": "train", **({"group": group} if group else {})}
    remarks: list[str] = []
    written: dict[Path, None] = {}
    try:
        for run in wandb.Api(timeout=access.ANSWER_TIMEOUT_S).runs(
            f"{entity}/{project}", filters=chosen, lazy=False
        ):
            if not isinstance(run.config.get("optimizer"), dict):
                remarks.append(f"{run.name} ({run.id}) is no run of optbench: left out")
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
    """A folder by the run's name; with its id where two runs have one name."""
    name = re.sub(r"[^\w.+-]+", "-", str(run.name or run.id)).strip("-.") or run.id
    groups = [re.sub(r"[^\w.+-]+", "-", str(run.group)).strip("-.")] if run.group else []
    folder = out.joinpath(*groups, name)
    if folder in taken:
        folder = folder.with_name(f"{name}-{run.id}")
    if folder.exists() and _origin(folder) != run.id:
        raise InputError(
            "--export", folder, "is there already and is another run", fix="--export ANOTHER_FOLDER"
        )
    return folder


def _origin(folder: Path) -> str | None:
    status, _ = readers.status(folder)
    return status.wandb_run_id if status is not None and "exported_from" in status.facts() else None


def _write(folder: Path, run: Any, origin: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    summary = {key: _plain(run.summary.get(key)) for key in SUMMARY_KEYS if run.summary.get(key) is not None}
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
    """Our keys of a run's configuration; what W&B drops, empty tables, is filled in where the keys are today's."""
    kept = {key: value for key, value in sent.items() if key in RunConfig.model_fields}
    try:
        return RunConfig.model_validate(kept).model_dump(mode="json")
    except ValidationError:
        return kept


def _rows(history: Iterable[Mapping[str, Any]]) -> list[dict[str, float | int | None]]:
    """Our keys of W&B's rows, by step; of a step that was sent twice the later row holds."""
    found: dict[int, dict[str, float | int | None]] = {}
    for row in history:
        step = _number(row.get("step"))
        if step is not None:
            found[int(step)] = {key: _number(value) for key, value in row.items() if key in METRICS}
    return [{**found[step], "step": step} for step in sorted(found)]


def _number(value: object) -> float | int | None:
    """A finite number, or None: W&B spells what is not finite as a word."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if known else None  # pyright: ignore[reportReturnType]


def _plain(value: Any) -> Any:
    """JSON of W&B's own summary objects, numbers that are not finite as null."""
    if isinstance(value, str | bool) or value is None:
        return value
    if hasattr(value, "items"):
        return {str(key): _plain(inner) for key, inner in value.items() if not str(key).startswith("_")}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return _number(value)


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, allow_nan=False) + "\n"
