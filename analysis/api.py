"""Use optbench from Python and notebooks: `from harness import train, compare, load_runs`.

Keys are those of the command line: overrides (``"optimizer.rank=16"``), keyword arguments (``steps=100``,
``**{"optimizer.rank": 16}``) or nested mappings (``optimizer={"name": "sumo", "rank": 16}``). Results are pandas data
frames, whose ``attrs`` hold everything that is not a table. Bad input raises `harness.errors.InputError`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import pandas as pd

from analysis.compare import arguments, sessions
from analysis.compare.progress import Verbosity
from analysis.comparison import document
from analysis.report import report
from analysis.runs import loading
from analysis.runs.run import LoadedRun
from harness.config.overrides import leaves
from harness.errors import InputError
from harness.preparation import prepare
from harness.record.schema import METRICS

__all__ = ["InputError", "RunFailed", "compare", "load_runs", "train"]

_PLAIN = re.compile(r"[\w./:+~%-]+", re.ASCII)
"""Text that needs no quotes in the grammar of overrides."""
_FIRST = ("optimizer", "seed", "state", "val/loss", "lr", "steps", "tokens", "wall_s")
"""Columns of `load_runs` that come first."""


class RunFailed(RuntimeError):
    """Raised for a failed run; the message contains the reason and the folder."""


def train(*overrides: str, progress: bool = True, **keys: Any) -> pd.DataFrame:
    """Train one run in processes of its own and return its metrics.

    A run that finished with the same settings is read, not repeated. An interrupted one resumes.

    Args:
        overrides: ``key=value``, as on the command line.
        progress: show a progress line.
        keys: keys of a run.

    Returns:
        One row for each row of metrics.jsonl, columns named by `harness.record.schema.METRICS`; ``attrs`` has
        ``folder``, ``state`` (finished, diverged or interrupted), ``reason``, ``config`` and ``summary``.

    Raises:
        InputError: bad input; nothing was trained.
        RunFailed: the run failed.
    """
    arguments_ = [*overrides, *_overrides(keys)]
    verbosity = Verbosity.NORMAL if progress else Verbosity.QUIET
    trainer = sessions.Trainer(as_json=False, verbosity=verbosity)
    run = prepare(arguments_, say=trainer.say, writes_folder=False)
    session = sessions.Session([run], trainer, group=run.config.group)
    session.train()
    if session.refusals:
        raise session.refusals[0]
    (read,) = loading.load(run.folder)
    if read.state not in ("finished", "diverged", "interrupted"):
        raise RunFailed(f"{read.state}: {read.reason or 'no reason is recorded'} ({read.folder})")
    frame = _metrics(read)
    frame.attrs |= {
        "folder": str(read.folder),
        "state": read.state,
        "reason": read.reason,
        "config": read.config,
        "summary": read.summary,
    }
    return frame


def compare(*optimizers: str | Iterable[str], progress: bool = True, **keys: Any) -> pd.DataFrame:
    """Train several optimizers under one protocol, write the report, and return the runs.

    Args:
        optimizers: names of optimizers, or lists of them, and arguments of ``optbench compare``.
        progress: show a progress line.
        keys: keys of the runs, ``seeds``, ``group`` and ``preset``; ``sumo={"rank": 16}`` applies to one optimizer.

    Returns:
        As `load_runs` of the group's folder; ``attrs`` also has ``report`` (path of the HTML page), ``verdict`` and
        ``exit_code`` (0 all finished, 3 a run failed or diverged, 75 interrupted: call again to resume).

    Raises:
        InputError: bad input of any run; nothing was started.
        RunFailed: no run left a folder.
    """
    names = [name for item in optimizers for name in ([item] if isinstance(item, str) else item)]
    plan = arguments.plan([*names, *_overrides(keys), *([] if progress else ["--quiet"])])
    code, folder = sessions.train(plan)
    if not folder.is_dir():
        raise RunFailed("no run left a folder")

    sessions.write_provenance(folder, plan)
    judged = document.judge_folder(folder)
    written = report.write(judged, folder)
    frame = load_runs(folder)
    frame.attrs |= {
        "report": str(written.html),
        "verdict": [part.verdict.headline for part in judged.sets],
        "exit_code": code,
    }
    return frame


def load_runs(folder: str | PathLike[str] = "runs", *, metrics: bool = False) -> pd.DataFrame:
    """Read the runs below a folder, including those of other trainers.

    Args:
        folder: where to look.
        metrics: return the rows of metrics.jsonl of all runs instead of one row for each run.

    Returns:
        One row for each run: state and summary, indexed by the run's folder below ``folder``; or with ``metrics`` one
        for each logged step, with the columns ``run``, ``optimizer`` and ``seed``. ``attrs["folder"]`` is the folder.

    Raises:
        InputError: no such folder.
    """
    runs = loading.load(str(folder))
    if metrics:
        frames = [_metrics(run) for run in runs]
        for frame, run in zip(frames, runs, strict=True):
            for place, (name, value) in enumerate(_names(run).items()):
                frame.insert(place, name, value)
        frame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["run"])
    else:
        frame = pd.DataFrame([_facts(run) for run in runs], columns=None if runs else ["run"])
        frame = frame.set_index("run")
    frame.attrs["folder"] = str(folder)
    return frame


def _names(run: LoadedRun) -> dict[str, Any]:
    return {"run": run.where, "optimizer": run.optimizer, "seed": run.seed}


def _facts(run: LoadedRun) -> dict[str, Any]:
    """Return name, state, the scalars of the summary and a task's final metrics, the most important ones first."""
    scalars = {key: value for key, value in run.summary.items() if not isinstance(value, Mapping | list)}
    names = run.summary.get("metrics") or {}
    finals = {
        f"val/{name}": facts.get("value") for name, facts in names.items() if isinstance(facts, Mapping)
    }
    facts = {
        **scalars,
        **finals,
        **_names(run),
        "state": run.state,
        "reason": run.reason,
        "folder": str(run.folder),
    }
    first = {"run": run.where, **{key: facts.get(key) for key in _FIRST}}
    return {**first, **{key: value for key, value in facts.items() if key not in first}}


def _metrics(run: LoadedRun) -> pd.DataFrame:
    """Return the logged rows, with columns in the order of `METRICS`."""
    known = [key for key in METRICS if key in run.metrics]
    others = [key for key in run.metrics if key not in METRICS]
    frame = pd.DataFrame({key: run.metrics[key] for key in [*known, *others]})
    if "step" in frame:
        frame["step"] = frame["step"].astype(int)
    return frame


def _overrides(keys: Mapping[str, Any]) -> list[str]:
    """Return keyword arguments as overrides."""
    return [
        f"{name}={_value(value)}" for key, item in keys.items() for name, value in _leaves(key, item).items()
    ]


def _leaves(key: str, value: Any) -> dict[str, Any]:
    return leaves(key, dict(value)) if isinstance(value, Mapping) and value else {key: value}


def _value(value: Any) -> str:
    """Format a value for the grammar of overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_value(name)}:{_value(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_value, value)) + "]"
    if not isinstance(value, str | PathLike):
        return str(value)
    text = str(value)
    if _PLAIN.fullmatch(text):
        return text
    # In the grammar a backslash is an escape only if quotes follow it.
    quoted = re.sub(r'(\\*)"', r'\1\1\\"', text)
    return '"' + quoted + "\\" * (len(quoted) - len(quoted.rstrip("\\"))) + '"'
