"""The envelope of a run's twins, and whether another run is inside it: scores, p-value, first step, parameter.

A twin differs from the run by rounding alone. Of each twin and of the run under test we take, at each step, figures of
how far it is from the run (`figures`). A figure is compared with those of the twins by its prediction interval under
a normal distribution (x - mean)/(sd √(1 + 1/n)) ~ Student's t with n - 1 degrees of freedom, and expressed as the
standard normal quantile of the same probability. The score of a run is the largest of these over steps and figures.
The null distribution of the score comes from the twins: each is scored against the others, and the score under test
is placed in that sample by the same prediction interval.

Twins of one process lack the rounding of an engine's own sums of losses and gradient norms, so a draw of it
(`_ENGINE_ROUNDING`) is added to these figures of each twin, `_DRAWS` times: quantiles are averaged over the draws of
those that a run is compared with, and each draw of a twin gives a score. With a single draw, the null distribution
would depend on it. Nothing is added to the run under test, which has the rounding of its engine already, nor to
weights: their distances are compared as they are.

Scores are compared on the scale on which the largest of √m independent figures, out of m, is normal (`_as_normal`). The
largest of many is skewed to the right: on its own scale, 0.4 % of right runs should exceed Student's interval, and 1 %
do (36 independent figures, eight twins, simulated). The number of independent figures is between 1 and m; √m is the
geometric mean.

Assumptions: a run under test that is right is exchangeable with these twins or closer to the run than they are, and
both log-distances and scores, on that scale, are close to normal. No independence of steps or figures is assumed,
because scores are compared with scores; where figures go together, more right runs are inside than nominal
(docs/diverge.md has the shares).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from harness.verify.diverge.trajectory import Trajectory

ALPHA = 0.05
"""A run with a p-value below it is outside, unless the caller says otherwise."""
FEWEST_TWINS = 4
"""Twins below which a spread cannot be told from them."""

_FLOOR = 2.0**-24
"""Differences below half an ulp of fp32, relative, count as half an ulp: a logarithm needs one."""
_ENGINE_ROUNDING = {"weights": 0.0, "loss": 2.0**-20, "gradient norm": 2.0**-14}
"""Standard deviation of what is added to each twin's figures, relative. Losses and norms are fp32 sums over
many numbers, whose own order an engine chooses and the twins of one process do not vary. torch's fp32 norm of one
gradient of 262,144 elements on a CPU is 4e-5 to 7e-5 below that in fp64, because small squares are lost in a large sum;
that of its halves 2e-5 to 3e-5. So the norms of FSDP2 (3.5e-5) and ZeRO (6.3e-5) are above those of one process, more
than in any twin (measured on the model of the certificates)."""
_LEAST_SPREADS = _ENGINE_ROUNDING | {"weights": 0.05}
"""Least standard deviation by figure: a few twins may agree by chance. It applies to the scores of twins as well, and
so leaves the share of right runs that are outside as it is. (A draw of 0.05 was once added to the log-distances of
twins alone: all right runs were inside where twins spread by less.)"""
_DRAWS = 8
"""Draws of an engine's rounding for each twin."""
_LEAST, _LARGEST = -3.0, 37.0
"""Bounds of a figure's quantile; beyond them probabilities round to 1, or underflow."""

Figures = Mapping[tuple[str, int], float]
"""(figure, steps done) → value. "loss" and "gradient norm" are signed differences over their size; "weights" is the log
of the largest relative difference of a parameter's change."""


@dataclass(frozen=True)
class Verdict:
    """Whether a run is inside the envelope.

    Attributes:
        inside: p_value ≥ alpha.
        p_value: of a run that differs by rounding alone, to be at least as far away.
        score, limit: of the run, on the scale of `_as_normal`, and the score with p-value alpha.
        first_step: first step with a figure above the limit; None inside.
        figure: which.
        parameter: at that step, or at the first later one with weights, the parameter that is furthest outside; None
            inside, and where no weights are known.
        excess: how many times further apart than in the twins (geometric mean) that parameter, or that figure, is.
    """

    inside: bool
    p_value: float
    score: float
    limit: float
    first_step: int | None = None
    figure: str | None = None
    parameter: str | None = None
    excess: float | None = None


def figures(run: Trajectory, other: Trajectory) -> Figures:
    """Return how far another run is from a run, at the steps that both have."""
    found: dict[tuple[str, int], float] = {}
    for name, mine, theirs in (
        ("loss", run.losses, other.losses),
        ("gradient norm", run.gradient_norms, other.gradient_norms),
    ):
        for step in sorted(mine.keys() & theirs.keys()):
            size = max(abs(mine[step]), 1e-30)
            difference = (theirs[step] - mine[step]) / size
            # Infinite where only one of them is: the run under test has diverged.
            found[name, step] = difference if math.isfinite(difference) else math.inf
    for step in sorted(run.sketches.keys() & other.sketches.keys() - {0}):
        found["weights", step] = math.log(max(_FLOOR, *run.difference(other, step).values()))
    return found


def judge(run: Trajectory, twins: Sequence[Trajectory], other: Trajectory, alpha: float = ALPHA) -> Verdict:
    """Return whether another run differs from a run by more than its twins do.

    Args:
        run: undisturbed.
        twins: of it, at least `FEWEST_TWINS`.
        other: under test; steps and figures that it lacks are left out.
        alpha: share of right runs that may be outside.

    Raises:
        ValueError: the runs have no step in common.
    """
    run, twins = run.with_rows_of(other), [twin.with_rows_of(other) for twin in twins]
    tested = figures(run, other)
    if not tested:
        raise ValueError("no step in common")
    null = [figures(run, twin) for twin in twins]
    keys = list(tested)
    is_log = np.array([name == "weights" for name, _ in keys])
    printed = np.array([_printed(run, other, name, step) for name, step in keys])
    least = np.hypot([_LEAST_SPREADS[name] for name, _ in keys], printed)
    added = np.hypot([_ENGINE_ROUNDING[name] for name, _ in keys], printed)
    values = np.array([[figure[key] for key in keys] for figure in null])
    noise = np.random.default_rng(0).standard_normal((_DRAWS, *values.shape))  # the same in every call
    sample = values + added * noise
    z = _z_values(np.array([tested[key] for key in keys]), sample, is_log, least)
    scores = np.array(
        [
            _z_values(sample[:, i], np.delete(sample, i, axis=1), is_log, least).max(axis=-1)
            for i in range(len(twins))
        ]
    )
    usual, placed = _as_normal(scores, len(keys)), _as_normal(z, len(keys))
    degrees, spread = len(twins) - 1, max(usual.std(ddof=1), 0.1) * math.sqrt(1 + 1 / len(twins))
    p_value = float(stats.t.sf((placed.max() - usual.mean()) / spread, degrees))
    limit = float(usual.mean() + stats.t.isf(alpha, degrees) * spread)
    score = float(placed.max())
    if p_value >= alpha:
        return Verdict(True, p_value, score, limit)
    # The first step with a figure outside; of several figures, the one that is furthest outside.
    first, _, figure = min((step, -value, name) for (name, step), value in zip(keys, placed) if value > limit)
    parameter, excess = _parameter(run, twins, other, first)
    if parameter is None:
        least_size = float(least[keys.index((figure, first))])
        excess = _excess(
            tested[figure, first], [values[figure, first] for values in null], figure, least_size
        )
    return Verdict(False, p_value, score, limit, first, figure, parameter, excess)


def _printed(run: Trajectory, other: Trajectory, figure: str, step: int) -> float:
    """Return the standard deviation of what a table rounds off a figure, relative: unit/√12, of a uniform error."""
    size = {"loss": run.losses, "gradient norm": run.gradient_norms}.get(figure, {}).get(step, 1.0)
    return other.units.get(figure, 0.0) / math.sqrt(12) / max(abs(size), 1e-30)


def _as_normal(scores: np.ndarray, figures: int) -> np.ndarray:
    """Return Φ⁻¹(Φ(score)^√m) in fp64: normal if the score is the largest of √m independent normal figures.

    Args:
        scores: any shape.
        figures: m.
    """
    log_p = math.sqrt(figures) * stats.norm.logcdf(scores)
    # The tail that is small, so that neither rounds to 1.
    return np.where(log_p > -math.log(2), stats.norm.isf(-np.expm1(log_p)), stats.norm.ppf(np.exp(log_p)))


def _z_values(tested: np.ndarray, sample: np.ndarray, is_log: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Return each figure's standard normal quantile: of being larger for log-distances, of either sign for the others.

    Args:
        tested: (…, figures).
        sample: (draws, twins, figures); the quantiles are averaged over the draws.
        is_log: (figures,), which of them are log-distances.
        least: (figures,), least standard deviation.
    """
    count = sample.shape[1]
    spread = np.maximum(sample.std(axis=1, ddof=1), least)
    with np.errstate(invalid="ignore"):
        t = (tested[..., None, :] - sample.mean(axis=1)) / (spread * math.sqrt(1 + 1 / count))
    t = np.where(np.isfinite(t), t, np.inf)
    p = stats.t.sf(np.where(is_log, t, np.abs(t)), count - 1) * np.where(is_log, 1, 2)
    return np.clip(stats.norm.isf(np.maximum(p, 1e-300)), _LEAST, _LARGEST).mean(axis=-2)


def _parameter(
    run: Trajectory, twins: Sequence[Trajectory], other: Trajectory, first: int
) -> tuple[str | None, float | None]:
    """Return the parameter that exceeds the twins most, at the first step from ``first`` on with weights."""
    steps = [step for step in sorted(run.sketches.keys() & other.sketches.keys()) if step >= max(first, 1)]
    if not steps:
        return None, None
    step = steps[0]
    usual = [run.difference(twin, step) for twin in twins]
    ratios = {
        name: value / math.exp(float(np.mean([math.log(max(_FLOOR, known[name])) for known in usual])))
        for name, value in run.difference(other, step).items()
    }
    name = max(ratios, key=ratios.__getitem__)
    return name, ratios[name]


def _excess(value: float, usual: Sequence[float], figure: str, least: float) -> float | None:
    if figure == "weights":
        return math.exp(value - float(np.mean(usual)))
    size = max(float(np.sqrt(np.mean(np.square(usual)))), least)
    return abs(value) / size if math.isfinite(value) else None


def amplification(run: Trajectory, twins: Sequence[Trajectory]) -> dict[int, float]:
    """Return steps done → how many times one ulp has grown: the median over twins that moved each weight by one ulp.

    The figure is ‖W - W_twin‖/‖W‖ over all parameters, divided by its value before the first step.
    """
    growth: dict[int, float] = {}
    for step in sorted(run.sketches):
        ratios = [_distance(run, twin, step) / _distance(run, twin, 0) for twin in twins]
        growth[step] = float(np.median(ratios))
    return growth


def _distance(run: Trajectory, twin: Trajectory, step: int) -> float:
    """Return ‖W - W_twin‖ over all parameters, relative to ‖W‖."""
    mine, theirs = run.sketches[step], twin.sketches[step]
    apart = math.sqrt(sum(float(np.square(mine[name] - theirs[name]).sum()) for name in mine))
    return apart / math.sqrt(sum(float(np.square(weight).sum()) for weight in mine.values()))
