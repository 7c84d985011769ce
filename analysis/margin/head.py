"""Mode `head`: how robust the predictions of checkpoints are, at the same tokens of held-out text for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analysis.comparison.statistics import ALPHA, pairwise
from analysis.formatting import listing, significant
from analysis.margin.checkpoints import (
    LoadedCheckpoint,
    UnreadableCheckpoint,
    find_checkpoints,
    load_checkpoint,
)
from analysis.margin.config import MarginConfig
from analysis.margin.outputs import OBSERVED, MarginReport
from analysis.margin.plots import NORM_SYMBOLS, curves, step, step_axes
from analysis.margin.robustness import embedding_radii, head_margins, median_over_windows, windows
from analysis.margin.trajectory import MarginRun, TrajectoryRow
from analysis.pages.figures import Plot, figure
from harness.errors import InputError
from harness.model.loss import IGNORED
from optimizers.linalg.robust import full_precision

WINDOW, WINDOWS = 32, 64
"""Tokens of a window, and how many are attacked. Intervals are over windows, whose tokens depend on each other."""
QUESTION = "How far must a feature or an input move before the language model predicts another token?"

Say = Callable[[str], None]


def run_head(config: MarginConfig, say: Say) -> list[MarginRun]:
    """Measure checkpoints: one run per optimizer label, a row per checkpoint.

    Facts of a run: `paired_at`, the last step of which all optimizers have a checkpoint, and its `windows`; or None.

    Raises:
        InputError: bad input; checkpoints whose held-out tokens differ, which no comparison can be made on.
    """
    runs: dict[str, MarginRun] = {}
    measured: dict[str, dict[float, dict[str, list[float]]]] = {}
    tokens: tuple[str, Tensor] | None = None
    for number, path in (checkpoints := find_checkpoints(config, say)):
        try:
            with full_precision("cpu"):
                loaded = load_checkpoint(path, number, config, say)
                tokens = tokens or (path.name, loaded.ids)
                if not torch.equal(tokens[1], loaded.ids):
                    reason = f"mixes data: {tokens[0]} and {path.name} have other held-out tokens"
                    raise InputError("checkpoints", config.checkpoints, reason, fix="runs of the same data")
                row, by_window = measure(loaded, config)
        except UnreadableCheckpoint as error:
            if not runs and path == checkpoints[-1][1]:
                raise
            say(f"left out: {error}")
            continue
        run = runs.setdefault(loaded.optimizer, MarginRun(loaded.optimizer, 0, "ok"))
        run.rows.append(row)
        run.facts |= {"dtype": "float64", "checkpoints": len(run.rows)}
        measured.setdefault(loaded.optimizer, {})[row["t"]] = by_window
        say(f"{path.name}: accuracy {row['accuracy']:.3f}")
    common = set.intersection(*(set(steps) for steps in measured.values())) if measured else set()
    for name, run in runs.items():
        at = max(common, default=None)
        run.facts |= {"paired_at": at, "windows": None if at is None else measured[name][at]}
    return list(runs.values())


def measure(loaded: LoadedCheckpoint, config: MarginConfig) -> tuple[TrajectoryRow, dict[str, list[float]]]:
    """Return the row of one checkpoint, and norm → the mean signed margin of each window."""
    model: Any = loaded.model
    ids, labels = (
        windows(part, min(WINDOW, loaded.ids.shape[1]), WINDOWS) for part in (loaded.ids, loaded.labels)
    )
    with torch.no_grad():
        scores = model(input_ids=ids).logits.flatten(0, 1)
        loss = float(nn.functional.cross_entropy(scores, labels.flatten(), ignore_index=IGNORED))
    row: TrajectoryRow = {
        "t": float(loaded.step),
        "ln_tau": math.log(loaded.step) if loaded.step > 0 else None,
        "gap": None,
        "log_loss": math.log(loss) if loss > 0.0 else -math.inf,
        "tokens": int((labels != IGNORED).sum()),
        "windows": len(ids),
    }
    by_window: dict[str, list[float]] = {}
    for norm in config.norms:
        margins = head_margins(model, ids, labels, norm).numpy()
        row["accuracy"] = float((margins[~np.isnan(margins)] > 0.0).mean())
        row |= _with_interval(f"head_{norm}", margins)
        by_window[norm] = np.nanmean(margins, axis=1).tolist()
        radii = embedding_radii(model, ids, norm, seed=config.seed).numpy()
        row |= _with_interval(f"embedding_{norm}", radii[:, None])
    row["margin"] = row[f"head_{config.norms[0]}"]
    return row, by_window


def _with_interval(key: str, values: np.ndarray) -> dict[str, float | None]:
    """Return the median over (windows, tokens) and its 95 % bootstrap interval over windows; None below two windows."""
    found = median_over_windows(values)
    low, high = (None if math.isnan(end) else end for end in (found.low, found.high))
    return {key: found.median, f"{key} low": low, f"{key} high": high}


def paired_differences(by_window: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Return a row per pair of optimizers: mean difference over windows, its 95 % t-interval, and Holm's p-value.

    Fewer than two windows have no interval and no p-value. `verdict` is from the p-value adjusted for all pairs.

    Args:
        by_window: optimizer → the mean of each window, the same windows for all.
    """
    if len(by_window) < 2:
        return []
    names = list(by_window)
    tests = pairwise(list(by_window.values()))
    rows = []
    for k, (first, second) in enumerate(tests.pairs):
        mean, half = float(tests.mean[k]), float(tests.half_width[k])
        row: dict[str, Any] = {
            "difference": f"{names[first]} − {names[second]}",
            "mean signed margin": mean,
            "mean signed margin low": mean - half,
            "mean signed margin high": mean + half,
            "p": float(tests.p[k]),
            "p_holm": float(tests.p_holm[k]),
        }
        row = {key: None if value != value else value for key, value in row.items()}
        settled = row["p_holm"] is not None and row["p_holm"] < ALPHA
        rows.append({**row, "verdict": ("larger" if mean > 0.0 else "smaller") if settled else "not settled"})
    return rows


def report(config: MarginConfig, runs: Sequence[MarginRun]) -> MarginReport:
    """Return the report of mode `head`."""
    norm = config.norms[0]
    symbol = NORM_SYMBOLS[norm]
    at = runs[0].facts["paired_at"]
    pairs = (
        [] if at is None else paired_differences({run.optimizer: run.facts["windows"][norm] for run in runs})
    )
    last = {run.optimizer: run.rows[-1] for run in runs}
    parts = [
        f"{name} {significant(row['margin'])}{_interval(row, norm)} "
        f"(step {row['t']:g}, {row['accuracy']:.0%} of the tokens right)"
        for name, row in last.items()
    ]
    headline = f"Median signed {symbol} margin of the head, relative to the feature: {listing(parts)}."
    counted = next(iter(last.values()))
    scope = (
        f"{counted['tokens']} tokens in {counted['windows']} windows of held-out text, the same for all; a wrong "
        "prediction has a negative margin. Intervals (95 %) are over windows, of one run each: they say nothing of "
        "other seeds. Exact for the last layer on frozen features. Radii in embedding space are upper bounds from a "
        "short attack on the prediction after each window, over the median size of an embedding; nothing certifies the "
        "body. " + OBSERVED
    )
    plots = []
    if any(len(run.rows) > 1 for run in runs):
        traces = curves(runs, step, lambda r: r["margin"])
        built = figure(traces, **step_axes(traces, "signed margin / ‖feature‖"))
        plots.append(Plot("head", f"Signed {symbol} margin of the head", "Median over tokens.", built, 320))
    more = {f"differences_on_the_same_tokens_{norm}": [{"step": at, **row} for row in pairs]} if pairs else {}
    few = counted["windows"] < WINDOWS
    notes = [f"only {counted['windows']} windows are held out; {WINDOWS} are wanted"] if few else []
    if len(runs) > 1 and at is None:
        notes.append("the optimizers have no step in common, so that no two of them are compared")
    elif any(row["t"] != at for row in last.values()):
        notes.append(
            f"the last checkpoints are of different steps; pairs of optimizers are compared at step {at:g}"
        )
    return MarginReport(
        runs, notes, headline, scope, [_table_row(config, name, row) for name, row in last.items()], plots, more,
        question=QUESTION,
    )  # fmt: skip


def _interval(row: Mapping[str, Any], norm: str) -> str:
    low, high = row[f"head_{norm} low"], row[f"head_{norm} high"]
    return "" if low is None else f" [{significant(low)}, {significant(high)}]"


def _table_row(config: MarginConfig, name: str, row: TrajectoryRow) -> dict[str, Any]:
    out: dict[str, Any] = {"optimizer": name, "step": row["t"], "loss": math.exp(row["log_loss"])}
    out |= {"tokens right": row["accuracy"]}
    for norm in config.norms:
        for key, label in (("head", "signed head margin"), ("embedding", "embedding radius")):
            for suffix in ("", " low", " high"):
                out[f"{label} {NORM_SYMBOLS[norm]}{suffix}"] = row[f"{key}_{norm}{suffix}"]
    return out
