"""Real moments: their condition numbers over training, and where the error of five Newton-Schulz steps comes from.

``moments.parquet`` of a run has the figures of every hidden matrix at the probed steps. A checkpoint has the moments
themselves: M = U diag(σ) Vᵀ. In exact arithmetic five steps give U diag(p(s)) Vᵀ with s = σ/‖M‖_F, so the squared error
‖O_NS - UVᵀ‖²_F/k is the mean of (1 - p(s))² over the k directions. It is divided in two ways:

- by place: directions inside the band of the coefficients (`polar_bound.band`), and small ones below it;
- by kind: (1 - p̄)², a shorter or longer step, and the variance of p, which no learning rate undoes.

Then the spectrum is replaced at the same singular vectors. Factors and figures of checkpoints are fp64, except the
measured factor, which the rule's own function computes in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from analysis.paper.theory.arms import TheoryArm
from analysis.paper.theory.polar_bound import MUON, STEPS, Band, band, geometric
from analysis.runs.run import LoadedRun
from harness.checkpoint import store
from harness.checkpoint.files import Saved
from optimizers.linalg.newton_schulz import newton_schulz
from optimizers.linalg.polar import EXACT
from optimizers.linalg.robust import default_rtol

Floats = NDArray[np.float64]

LINE = 10.0
"""The condition number at which Figure 1 of the paper has its line."""
REPLACED = (1.0, 10.0, 100.0, 1000.0)
"""Condition numbers of the geometric spectra that replace the real one."""
QUANTILES = {"q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}


class ConditionRow(NamedTuple):
    """The condition numbers of one arm after one step, over matrices and seeds.

    Attributes:
        arm: of the runs.
        step: counted from 1.
        runs, matrices: how many moments there are: seeds, and moments over all of them.
        condition: quantile → condition number.
        above: share of moments with a condition number above 10.
        residual_share: median of 1 - 1/stable rank, what the best rank-one approximation leaves out.
        polar_error: median ‖O - UVᵀ‖_F/√k of the applied factor; NaN where the rule applies none.
    """

    arm: TheoryArm
    step: int
    runs: int
    matrices: int
    condition: dict[str, float]
    above: float
    residual_share: float
    polar_error: float


def condition_rows(runs: Sequence[LoadedRun], arms: Mapping[Path, TheoryArm]) -> list[ConditionRow]:
    """Return Figure 1(a) of all runs with ``moments.parquet``.

    Args:
        runs: finished.
        arms: run folder → arm (`arms_of`).
    """
    rows = []
    for arm in dict.fromkeys(arms.values()):
        frames = [
            run.moments.assign(run=str(run.folder))
            for run in runs
            if arms[run.folder] == arm and not run.moments.empty
        ]
        if not frames:
            continue
        moments = pd.concat(frames, ignore_index=True)
        steps, folders = moments["step"].to_numpy(), moments["run"].to_numpy()
        kappa, stable, error = (
            moments[name].to_numpy(float) for name in ("condition_number", "stable_rank", "polar_error")
        )
        for step in np.unique(steps):
            at = steps == step
            condition = kappa[at & np.isfinite(kappa)]
            rows.append(
                ConditionRow(
                    arm,
                    int(step),
                    len(set(folders[at])),
                    len(condition),
                    {name: _quantile(condition, q) for name, q in QUANTILES.items()},
                    float(np.mean(condition > LINE)) if condition.size else math.nan,
                    _quantile(1.0 - 1.0 / stable[at & (stable > 0)], 0.5),
                    _quantile(error[at], 0.5),
                )
            )
    return rows


def _quantile(values: Floats, share: float) -> float:
    """Return a quantile of the finite values; NaN without any."""
    kept = values[np.isfinite(values)]
    return float(np.quantile(kept, share)) if kept.size else math.nan


@dataclass(frozen=True, eq=False)
class RealMoment:
    """A moment of a checkpoint, as what it is orthogonalized from.

    Attributes:
        arm, seed: of its run.
        step: steps taken.
        layer: parameter.
        matrix: (m, n), fp32 as stored.
    """

    arm: TheoryArm
    seed: int
    step: int
    layer: str
    matrix: torch.Tensor


def checkpoints_of(run: LoadedRun) -> list[tuple[int, Path]]:
    """Return step and folder of the run's complete checkpoints, in their order."""
    saved = store.Store(run.folder) if (run.folder / "checkpoints").is_dir() else None
    return [] if saved is None else [(step, saved.folder(step)) for step in sorted(saved.steps())]


def is_exact(run: LoadedRun) -> bool:
    """Return True if the run's rule steps along exact polar factors."""
    return run.optimizer_config.get("orthogonalizer") in (*EXACT, "auto")


def takes_newton_schulz(run: LoadedRun) -> bool:
    """Return True if the run's rule takes five steps of Muon's quintic."""
    options = run.optimizer_config
    return options.get("orthogonalizer") == "newton_schulz" and options.get("orthogonalizer_steps") == STEPS


def orthogonalizes_its_moment(run: LoadedRun) -> bool:
    """Return True if the run's rule orthogonalizes the moment that it stores: not with a look-ahead."""
    options = run.optimizer_config
    return "orthogonalizer" in options and options.get("nesterov") is False


def real_moments(run: LoadedRun, arm: TheoryArm) -> Iterator[RealMoment]:
    """Yield the moments of all hidden matrices of all checkpoints of a run.

    Raises:
        DamagedCheckpoint: a file cannot be read.
    """
    if not orthogonalizes_its_moment(run):
        return
    for step, folder in checkpoints_of(run):
        saved = Saved(folder)
        try:
            for layer in saved.names("moment"):
                moment = saved.whole(layer, "moment")
                # AdamW's first moment of an embedding has the same kind; only matrices with a basis or a rule count.
                if moment.ndim == 2 and (layer, "second_moment") not in saved:
                    yield RealMoment(arm, run.seed, step, layer, moment.float())
        finally:
            saved.close()


class ErrorRow(NamedTuple):
    """The error of five Newton-Schulz steps on one moment, ‖·‖_F/√k, and what it consists of.

    Attributes:
        arm, seed, step, layer: of the moment.
        side: k, directions above the cut.
        condition: κ.
        measured: by the rule's function, fp32.
        computed: from the singular values, fp64.
        small: share of the directions that lie below the band.
        small_energy: share of the squared error in them.
        length: share of the squared error that is a change of length, (1 - p̄)².
        lifted: error when the directions below the band are lifted to its start.
        replaced: condition number → error with a geometric spectrum of this condition number.
        values: σ/σ₁, descending.
    """

    arm: TheoryArm
    seed: int
    step: int
    layer: str
    side: int
    condition: float
    measured: float
    computed: float
    small: float
    small_energy: float
    length: float
    lifted: float
    replaced: dict[float, float]
    values: Floats

    @property
    def total(self) -> float:
        """Squared error ‖O_NS - UVᵀ‖²_F, summed over directions."""
        return self.computed**2 * self.side


def error_row(moment: RealMoment) -> ErrorRow | None:
    """Return the error of a moment and its parts; None for a moment that is zero or not finite."""
    matrix = moment.matrix.double().numpy()
    if not np.isfinite(matrix).all() or not matrix.any():
        return None
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    # The same cut as an exact factor's: directions below it are rounding noise.
    values = values[values > default_rtol(matrix.shape, torch.float32) * values[0]]
    k = len(values)
    exact = left[:, :k] @ right[:k]
    applied = newton_schulz(moment.matrix, steps=STEPS, dtype=torch.float32).double().numpy()
    place = band()
    s = MUON.scaled(values)
    p = MUON.polynomial(s, STEPS)
    squares = (1.0 - p) ** 2
    is_small = s < place.start
    return ErrorRow(
        moment.arm,
        moment.seed,
        moment.step,
        moment.layer,
        k,
        float(values[0] / values[-1]),
        float(np.linalg.norm(applied - exact)) / math.sqrt(k),
        error_of(values),
        float(is_small.mean()),
        float(squares[is_small].sum() / squares.sum()),
        float((1.0 - p.mean()) ** 2 / squares.mean()),
        error_of(lifted(values, place)),
        {kappa: error_of(geometric(kappa, k)) for kappa in REPLACED},
        values / values[0],
    )


def error_of(values: Floats) -> float:
    """Return ‖O_NS - UVᵀ‖_F/√k after five steps of Muon's quintic, of a matrix with these singular values (k,)."""
    errors = MUON.direction_errors(values, STEPS)
    return float(np.sqrt(np.mean(errors**2)))


def lifted(values: Floats, place: Band) -> Floats:
    """Return the spectrum with every σ/‖M‖_F at least at the band's start; all others keep their σ."""
    result = values
    # The norm grows with what is lifted, by less each time.
    for _ in range(60):
        result = np.maximum(values, place.start * np.linalg.norm(result))
    return result
