"""Load the public logs below a folder as runs: one arm for each folder, one run for each file.

What makes a folder's mean something else than it seems is found and named: a log that is there twice, runs of several
settings, several runs in one file. A duplicate does not count as another seed, and settings that differ are arms of
their own.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.formatting import listing, plural
from analysis.runs.logs import nanochat, track3, wandb_export, workload
from analysis.runs.logs.log_run import LogRun, Reader, read_file
from analysis.runs.run import LoadedRun
from harness.errors import InputError
from harness.files.bounded import UnreadableFile


class LogFormat(NamedTuple):
    """How the logs of one program are read."""

    reader: Reader
    suffixes: tuple[str, ...]
    model: str = ""
    """Name of the model, where the format fixes the workload."""
    ends_early: bool = False
    """A log that ends before the announced number of steps is a whole run."""


FORMATS: dict[str, LogFormat] = {
    "track3": LogFormat(track3.read, (".txt", ".log"), "modded-nanogpt track 3", ends_early=True),
    "nanochat": LogFormat(nanochat.read, (".txt", ".log")),
    "wandb": LogFormat(wandb_export.read, (".csv", ".json", ".jsonl")),
}
_OWN_FILES = ("comparison.csv", "comparison.json", "wandb_dashboards.json", "compare.json", "tuning.json")
BITS = "bits_per_byte"


@dataclass(frozen=True)
class LogFinding:
    """Something in the logs that changes what their mean says."""

    code: str
    """``duplicate_log``, ``duplicate_seed``, ``mixed_settings`` or ``several_runs``."""
    message: str


@dataclass
class Entry:
    """One run with its place among the others."""

    log: LogRun
    arm: str
    where: str
    """Path of the file below the folder, with the run's number or name if the file holds several."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings in which runs of this arm differ."""
    copy_of: Entry | None = None
    """The entry of which this is a copy."""


def load(
    root: Path, name: str, remarks: list[str], findings: list[LogFinding], *, every_run: bool = False
) -> list[LoadedRun]:
    """Load all logs of one format below ``root``.

    Args:
        root: folder; each folder in it is an arm, and files in ``root`` itself are one arm.
        name: key of `FORMATS`.
        remarks: receives one line for each file that is not read.
        findings: receives duplicates, mixed settings and files with several runs.
        every_run: take all runs of a file with several; else the last one, which its last line reports.

    Raises:
        InputError: the folder does not exist.
    """
    return [
        _loaded(entry, number, name) for entry, number in entries(root, name, remarks, findings, every_run)
    ]


def entries(
    root: Path, name: str, remarks: list[str], findings: list[LogFinding], every_run: bool
) -> list[tuple[Entry, int]]:
    """Return the runs in the order of their files, each with a number that only its copies share; see `load`."""
    if not root.is_dir():
        raise InputError("report", root, "is not a folder", fix=f"optbench report LOGS --format {name}")
    found: list[Entry] = []
    for path in _files(root, FORMATS[name], remarks):
        found += _read(path, root, name, remarks, findings, every_run)
    arms: dict[tuple[str, str], list[Entry]] = {}
    for entry in found:
        # Runs on other models or data are no repetitions, whatever their folder is.
        arms.setdefault((entry.arm, _text(workload.settings_of(entry.log.settings))), []).append(entry)
    for (arm, _), members in arms.items():
        _find_copies(arm, members, findings)
        _separate_settings(arm, members, findings)
        _find_repeated_seeds(arm, members, findings)
    _find_copies_elsewhere(found, findings)
    return [pair for members in arms.values() for pair in _numbered(members)]


def _files(root: Path, kind: LogFormat, remarks: list[str]) -> list[Path]:
    def note(error: OSError) -> None:
        remarks.append(f"{error.filename} cannot be listed ({error.strerror})")

    found = []
    for directory, below, names in os.walk(root, onerror=note):
        below[:] = [folder for folder in below if not folder.startswith(".")]
        found += [
            Path(directory, name)
            for name in names
            if name.lower().endswith(kind.suffixes) and not name.startswith(".") and name not in _OWN_FILES
        ]
    return sorted(found, key=lambda path: _natural(path.relative_to(root).as_posix()))


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts 2.txt before 10.txt."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _read(
    path: Path, root: Path, name: str, remarks: list[str], findings: list[LogFinding], every_run: bool
) -> list[Entry]:
    relative = path.relative_to(root)
    where = relative.as_posix()
    try:
        logs = read_file(path, name, FORMATS[name].reader)
    except (FileNotFoundError, UnreadableFile) as error:
        remarks.append(f"{where} is not read: {error}")
        return []
    if not logs:
        remarks.append(f"{where} is not read: it has no line of the format {name}")
        return []
    folder = relative.parts[0] if len(relative.parts) > 1 else root.resolve().name
    named = [log.settings.get("run") for log in logs]
    if len(logs) > 1 and not all(named):
        kept = "all of them count" if every_run else "the last one counts, as in its last line"
        findings.append(
            LogFinding("several_runs", f"{where} holds {len(logs)} runs (its steps begin anew); {kept}.")
        )
        chosen = list(enumerate(logs, 1)) if every_run else [(len(logs), logs[-1])]
        return [Entry(log, log.optimizer or folder, f"{where} (run {number})") for number, log in chosen]
    return [
        Entry(log, log.optimizer or folder, f"{where} ({run})" if run else where)
        for log, run in zip(logs, named, strict=True)
    ]


def _find_copies(arm: str, members: Sequence[Entry], findings: list[LogFinding]) -> None:
    """Mark each run whose rows are all in another run of the arm as a copy of it.

    Equal losses prove nothing for one row, because losses have five digits: a single row must also have equal seconds.
    """
    rows = [entry.log.rows() for entry in members]
    order = sorted(range(len(members)), key=lambda i: (-len(rows[i]), i))
    pairs = []
    for place, i in enumerate(order):
        timed = "wall_s" in members[i].log.columns
        for j in order[:place]:
            if members[j].copy_of is None and rows[i] <= rows[j] and (len(rows[i]) > 1 or timed):
                members[i].copy_of = members[j]
                pairs.append((_short(members[i]), _short(members[j])))
                break
    if pairs:
        text = listing([f"{copy} repeats {original}" for copy, original in pairs])
        findings.append(
            LogFinding(
                "duplicate_log",
                f"{arm} holds {plural(len(pairs), 'log')} twice: {text}. Copies do not count.",
            )
        )


def _short(entry: Entry) -> str:
    """Return the place within the arm's folder."""
    return entry.where.removeprefix(f"{entry.arm}/")


def _find_copies_elsewhere(found: Iterable[Entry], findings: list[LogFinding]) -> None:
    """Name files with equal content in different arms; which arm they belong to cannot be known, so both count."""
    by_content: dict[str, dict[str, str]] = {}
    for entry in found:
        if entry.copy_of is None:
            by_content.setdefault(entry.log.provenance.sha256, {}).setdefault(entry.arm, entry.where)
    for arms in by_content.values():
        # Named runs of one file are of different arms by themselves.
        if len(arms) > 1 and len({where.split(" (")[0] for where in arms.values()}) > 1:
            text = f"{listing(list(arms.values()))} have the same content, and both count."
            findings.append(LogFinding("duplicate_log", text))


def _separate_settings(arm: str, members: Sequence[Entry], findings: list[LogFinding]) -> None:
    """Give runs whose settings differ options of their own, by which they become arms of their own."""
    originals = [entry for entry in members if entry.copy_of is None]
    settings = [{**entry.log.settings, "steps_planned": entry.log.planned} for entry in originals]
    if FORMATS[originals[0].log.provenance.format].ends_early:
        for entry, own in zip(originals, settings, strict=True):
            own["last_step"] = _intended_end(entry, originals)
    keys = dict.fromkeys(key for entry in settings for key in entry if key != "run")
    varied = [key for key in keys if len({_text(entry.get(key)) for entry in settings}) > 1]
    if not varied:
        return
    for entry, own in zip(originals, settings, strict=True):
        entry.options = {key: _plain(own.get(key)) for key in varied}
    groups: dict[str, list[str]] = {}
    for entry in originals:
        label = ", ".join(f"{key}={_text(value)}" for key, value in entry.options.items())
        groups.setdefault(label, []).append(entry.where)
    text = "; ".join(f"{label}: {plural(len(runs), 'run')}" for label, runs in groups.items())
    findings.append(
        LogFinding("mixed_settings", f"{arm} holds runs of {len(groups)} settings ({text}). Each is an arm.")
    )


def _intended_end(entry: Entry, members: Sequence[Entry]) -> float:
    """Return the last step of a run, or where it diverged that of the first run of its kind that goes as far."""
    if not entry.log.diverged:
        return entry.log.last_step
    ends = [
        other.log.last_step
        for other in members
        if not other.log.diverged and other.log.planned == entry.log.planned
    ]
    return min((end for end in ends if end >= entry.log.last_step), default=entry.log.last_step)


def _find_repeated_seeds(arm: str, members: Sequence[Entry], findings: list[LogFinding]) -> None:
    """Name different runs of one setting that state the same seed: only one of them can count in a pair."""
    places: dict[tuple[int, str], list[str]] = {}
    for entry in members:
        if entry.copy_of is None and entry.log.seed is not None:
            places.setdefault((entry.log.seed, _text(entry.options)), []).append(entry.where)
    for (seed, _), runs in places.items():
        if len(runs) > 1:
            text = f"{arm} holds {len(runs)} different runs with seed {seed} ({listing(runs)}); one of them counts."
            findings.append(LogFinding("duplicate_seed", text))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return None if isinstance(value, float) and math.isnan(value) else value


def _text(value: Any) -> str:
    return json.dumps(_plain(value), default=str, sort_keys=True)


def _numbered(members: Sequence[Entry]) -> list[tuple[Entry, int]]:
    """Number the runs of an arm: by their seeds if the logs state all of them, else in the order of the files."""
    stated = all(entry.log.seed is not None for entry in members)
    numbers: dict[int, int] = {}
    for entry in members:
        if entry.copy_of is None:
            seed = entry.log.seed
            numbers[id(entry)] = seed if stated and seed is not None else len(numbers)
    return [(entry, numbers[id(entry.copy_of or entry)]) for entry in members]


def _loaded(entry: Entry, number: int, name: str) -> LoadedRun:
    log, kind = entry.log, FORMATS[name]
    source = log.provenance
    options = (entry.copy_of or entry).options
    summary: dict[str, Any] = {
        "optimizer": entry.arm,
        "seed": number,
        **_last(log.columns),
        "settings": {key: _plain(value) for key, value in log.settings.items() if key != "run"},
        "source": {
            "format": name,
            "file": source.path.name,
            "sha256": source.sha256,
            "bytes": source.size,
            "rows": len(log.columns.get("step", ())),
        },
    }
    if math.isfinite(log.planned) and not kind.ends_early:
        summary["steps_planned"] = log.planned
    state, reason = _state(log, ends_early=kind.ends_early)
    stated = workload.settings_of(log.settings)
    lacking = "" if kind.model else workload.missing(log.settings)
    return LoadedRun(
        folder=source.path,
        where=entry.where,
        config={
            "optimizer": {"name": entry.arm, **options},
            **({"model": {"name": kind.model}} if kind.model else workload.titles(log.settings)),
        },
        summary=summary,
        status={},
        environment={},
        parameters=[],
        metrics=log.columns,
        moments=pd.DataFrame(),
        state=state,
        reason=reason,
        comparison_key=":".join(["log", name, *([_text(stated)] if stated and not kind.model else [])]),
        notes=list(log.notes),
        is_external=True,
        has_seed=log.seed is not None,
        unstated=lacking,
    )


def _last(columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the summary values of the last rows that have them."""
    summary: dict[str, Any] = {}
    names = {"step": "steps", "tokens": "tokens", "wall_s": "wall_s", "val/loss": "val/loss"}
    for key, name in {**names, "train/loss": "train/loss"}.items():
        values = columns.get(key, np.empty(0))
        values = values[np.isfinite(values)]
        if len(values):
            summary[name] = float(values[-1])
    losses = columns.get("val/loss", np.empty(0))
    if np.isfinite(losses).any():
        summary["best_val_loss"] = float(np.nanmin(losses))
    bits = columns.get(f"val/{BITS}", np.empty(0))
    bits = bits[np.isfinite(bits)]
    if len(bits) and "val/loss" not in summary:
        summary["metrics"] = {BITS: {"value": float(bits[-1]), "better": "lower", "unit": "bits/byte"}}
    rates = columns.get("lr", np.empty(0))
    if np.isfinite(rates).any():
        summary["lr"] = float(np.nanmax(rates))
    return summary


def _state(log: LogRun, *, ends_early: bool) -> tuple[str, str]:
    values = log.columns.get("val/loss", log.columns.get(f"val/{BITS}"))
    if values is None:
        return "failed", "the log has no validation loss"
    if log.diverged:
        return "diverged", "the last validation loss is not finite"
    if not np.isfinite(values).any():
        return "failed", "no finite validation loss"
    if not ends_early and math.isfinite(log.planned) and log.last_step < log.planned:
        return "interrupted", f"the log ends at step {log.last_step:g} of {log.planned:g}"
    return "finished", ""
