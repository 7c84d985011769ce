"""Figures of the moments' spectra as arrays over steps and layers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from analysis.compare.comparison import Arm
from analysis.runs.curves import Floats
from analysis.runs.reading import number


@dataclass(frozen=True)
class Figure:
    """How one of `harness.record.schema.MOMENT_FIGURES` is shown."""

    title: str
    axis: str
    logarithmic: bool
    caption: str


FIGURES = {
    "condition_number": Figure(
        "Condition number of the moment",
        "condition number",
        True,
        "σ1 over the smallest singular value above the rank cut.",
    ),
    "effective_rank": Figure(
        "Effective rank of the moment", "effective rank", False, "Singular values above the rank cut."
    ),
    "stable_rank": Figure("Stable rank of the moment", "stable rank", False, "‖M‖²_F/σ1²."),
    "orthogonality_error": Figure(
        "Orthogonality error of the applied factor",
        "orthogonality error",
        True,
        "‖OOᵀ − I‖_F/√k. Small does not mean right: see the polar error.",
    ),
    "polar_error": Figure(
        "Distance of the applied factor from the polar factor",
        "polar error",
        True,
        "‖O − polar(M)‖_F/√k against an exact factor.",
    ),
}


@dataclass(frozen=True)
class Spectra:
    """One arm's figures, median over its runs: name → (steps, layers), NaN where none was recorded.

    Layers stand by the number of their block, within a block in the order of the record.
    """

    steps: Floats
    layers: list[str]
    values: dict[str, Floats]


def spectra(arm: Arm) -> Spectra | None:
    """The arm's figures folded over its runs; None if no run recorded any."""
    frames = [run.moments for run in arm.runs if len(run.moments)]
    if not frames:
        return None
    columns = [{name: frame[name].tolist() for name in frame.columns} for frame in frames]
    for c in columns:
        c["step"] = [number(step) for step in c["step"]]
    steps = np.unique(np.concatenate([np.asarray(c["step"], float) for c in columns]))
    steps = steps[np.isfinite(steps)]
    names = dict.fromkeys(str(layer) for c in columns for layer in c["layer"])
    layers = sorted(names, key=lambda layer: (block(layer) is None, block(layer) or 0))
    place = {layer: index for index, layer in enumerate(layers)}
    values = {}
    for name in FIGURES:
        cube = np.full((len(columns), len(steps), len(layers)), np.nan)
        for run, c in enumerate(columns):
            if name in c:
                at = np.asarray(c["step"], float)
                kept = np.flatnonzero(np.isfinite(at))
                rows = np.searchsorted(steps, at[kept])
                cube[run, rows, [place[str(c["layer"][i])] for i in kept]] = [
                    number(c[name][i]) for i in kept
                ]
        cube[~np.isfinite(cube)] = np.nan
        if np.isfinite(cube).any():
            values[name] = fold(np.nanmedian, cube, 0)
    return Spectra(steps, layers, values)


def fold(reduce: Callable[..., Floats], values: Floats, axis: int) -> Floats:
    """``reduce`` over an axis; NaN, without numpy's warning, where there is nothing to reduce."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return reduce(values, axis=axis)


def block(layer: str) -> int | None:
    """Number of the block that a matrix stands in: ``model.layers.3.mlp.up_proj.weight`` → 3."""
    found = re.search(r"\.(\d+)\.", layer)
    return int(found[1]) if found else None


def short(layer: str) -> str:
    """``model.layers.3.self_attn.q_proj.weight`` → ``3 q_proj``; a name without a number loses its ending
    only.
    """
    stem = re.sub(r"\.weight$", "", layer)
    numbered = re.search(r"\.(\d+)\.(.*)$", stem)
    return f"{numbered[1]} {numbered[2].rsplit('.', 1)[-1]}" if numbered else stem
