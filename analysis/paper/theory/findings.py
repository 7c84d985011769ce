"""All results of `optbench paper sumo_theory`, and the sentences that they carry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import stats

from analysis.comparison.statistics import Interval, interval
from analysis.formatting import plural, significant
from analysis.paper.theory import moment_rank, polar_bound
from analysis.paper.theory.arms import TheoryArm, arms_of, scale_of
from analysis.paper.theory.moment_rank import RankRow
from analysis.paper.theory.paired_runs import PairedRow, paired_rows, pairs
from analysis.paper.theory.polar_bound import MUON, Band, BoundRow, BoundScan, RankFactor
from analysis.paper.theory.run_moments import (
    LINE,
    ConditionRow,
    ErrorRow,
    checkpoints_of,
    condition_rows,
    error_row,
    real_moments,
)
from analysis.runs import loading
from analysis.runs.reading import number
from analysis.runs.run import LoadedRun
from harness.checkpoint.store import DamagedCheckpoint

if TYPE_CHECKING:
    from analysis.paper.theory.one_step import StepRow

NAME = "sumo_theory"
TITLE = "SUMO's lemmas and figures, simulated and on moments of real runs"
ARXIV = "2505.24749"
QUESTION = (
    "Do SUMO's lemmas hold, and does the error of five Newton–Schulz steps come from the condition number?"
)
TOLERANCE = 1e-9
"""By how much a simulation may differ from its closed form: both are fp64, over at most 800 steps."""
_PROTOCOL = "steps=120 batch_size=8 seq_len=64 world_size=1 eval.every=40 eval.tokens=16384"
_PROBED = "moments.every=10 checkpoint.every=40 checkpoint.keep=3"
COMMANDS = (
    f"optbench compare sumo sumo_ns5 seeds=6 model=llama_tiny {_PROTOCOL} {_PROBED} sumo.lr=4e-3 sumo_ns5.lr=4e-3 "
    "sumo.aux_lr=1.6e-2 sumo_ns5.aux_lr=1.6e-2 sumo.refresh_interval=50 sumo_ns5.refresh_interval=50 "
    "runs_dir=runs/sumo_theory group=llama_tiny",
    f"optbench compare sumo seeds=6 model=llama_tiny {_PROTOCOL} checkpoint.every=null sumo.lr=3.6e-3 "
    "sumo.aux_lr=1.6e-2 sumo.refresh_interval=50 runs_dir=runs/sumo_theory group=llama_tiny_shorter",
    f"optbench compare sumo sumo_ns5 seeds=3 model=llama_9m {_PROTOCOL} {_PROBED} sumo.lr=2e-3 sumo_ns5.lr=2e-3 "
    "sumo.aux_lr=8e-3 sumo_ns5.aux_lr=8e-3 sumo.refresh_interval=50 sumo_ns5.refresh_interval=50 "
    "runs_dir=runs/sumo_theory group=llama_9m",
)
"""What makes the runs of the figures: two sizes at equal learning rates; and exact factors with steps of about the
length that five Newton-Schulz steps give, 0.9."""


class Check(NamedTuple):
    """A statement about this page's own numbers that has to be true.

    Attributes:
        name: what is compared.
        passed: whether it is true.
        detail: the numbers.
    """

    name: str
    passed: bool
    detail: str


class ErrorSummary(NamedTuple):
    """Figures over all moments of one arm; shares of the squared error are of its sum, and intervals are over seeds.

    Attributes:
        arm: of the runs.
        runs, moments: how many.
        condition: quantile → κ.
        inside: share of the moments without a direction below the band.
        small: mean share of directions below the band.
        measured: median error.
        measured_low, measured_high: 5 % and 95 % quantiles.
        small_energy: share of the squared error, summed over the moments, in directions below the band.
        small_energy_runs: of each seed, with the interval over them.
        length: share of the squared error, summed over the moments, that is a change of length.
        lifted: median error with those directions lifted to the band.
        replaced: condition number → median error with a geometric spectrum.
        rank_correlation: of error and κ over the moments of a run, over runs.
        deviation: largest difference of the measured error from the one of the singular values.
    """

    arm: TheoryArm
    runs: int
    moments: int
    condition: dict[str, float]
    inside: float
    small: float
    measured: float
    measured_low: float
    measured_high: float
    small_energy: float
    small_energy_runs: Interval
    length: float
    lifted: float
    replaced: dict[float, float]
    rank_correlation: Interval
    deviation: float


class StepSummary(NamedTuple):
    """What an arm's step loses against the exact one, over seeds (each the mean over its states and batches).

    Attributes:
        arm, split: of the runs, and on what the loss is.
        states: checkpoints × batches.
        gain: mean of before - after with the exact factor, nats per token.
        difference: of after(newton_schulz) - after(exact) over seeds; positive: it is worse.
        shortened: of after(shortened) - after(exact).
        beyond_length: of after(newton_schulz) - after(shortened).
        length: mean c.
    """

    arm: TheoryArm
    split: str
    states: int
    gain: float
    difference: Interval
    shortened: Interval
    beyond_length: Interval
    length: float


@dataclass
class Theory:
    """Everything that the command computed.

    Attributes:
        ranks: Lemma 3.1.
        bounds, scans, rank_factor, band: Lemma 3.2.
        conditions: Figure 1(a).
        errors, error_summaries: of real moments.
        spectra: arm → median σ_i/σ₁ over the moments of the last checkpoint, Figure 1(b).
        paired: Figure 2.
        steps: of one step from equal states.
        runs: folders that were searched.
        runs_read: finished runs in them.
        scales: what was trained, a line for each scale.
        notes: what was left out.
    """

    ranks: list[RankRow]
    bounds: list[BoundRow]
    scans: dict[str, BoundScan]
    rank_factor: RankFactor
    band: Band
    conditions: list[ConditionRow] = field(default_factory=list)
    errors: list[ErrorRow] = field(default_factory=list)
    error_summaries: list[ErrorSummary] = field(default_factory=list)
    spectra: dict[str, list[float]] = field(default_factory=dict)
    paired: list[PairedRow] = field(default_factory=list)
    steps: list[StepSummary] = field(default_factory=list)
    runs: list[Path] = field(default_factory=list)
    runs_read: int = 0
    scales: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def checks(self) -> list[Check]:
        """Return the page's checks of itself, controls that must fail among them."""
        rank = max(row.deviation for row in self.ranks)
        bound = max(row.deviation for row in self.bounds)
        kept = [row.smallest for row in self.ranks if not row.holds and row.shares[max(row.shares)] < 0.1]
        faster = [
            r for r in self.ranks if r.fitted_decay is not None and r.fitted_decay > r.bounded_decay + 1e-6
        ]
        inverse, muon = self.scans["inverse"], self.scans[MUON.key]
        checks = [
            Check("Lemma 3.1: simulation against the closed form", rank <= TOLERANCE, f"{rank:.1e}"),
            Check("Lemma 3.1: no share decays more slowly than its bound", not faster, f"{len(faster)} do"),
            Check(
                "control: where 1 − ηλ₁ ≤ β the share stays above 0.1", not kept, f"{len(kept)} fall below"
            ),
            Check(
                "Lemma 3.2: iterated matrices against their singular values",
                bound <= TOLERANCE,
                f"{bound:.1e}",
            ),
            Check(
                "Lemma 3.2: holds for the recursion of its proof",
                inverse.holds,
                f"{inverse.violated} violations",
            ),
            Check(
                "control: Muon's coefficients violate the bound",
                not muon.holds,
                f"{muon.violated} of {muon.tested}",
            ),
        ]
        if self.error_summaries:
            # fp32 products of five steps on numbers of size 1: some 1e-6 a step.
            worst = max(row.deviation for row in self.error_summaries)
            checks.append(
                Check("real moments: fp32 steps against their singular values", worst <= 1e-4, f"{worst:.1e}")
            )
        return checks

    @property
    def passed(self) -> bool:
        """True if all checks are."""
        return all(check.passed for check in self.checks)


def compute(folders: Sequence[Path]) -> Theory:
    """Compute the lemmas, and from runs below `folders` the figures.

    Raises:
        InputError: a folder does not exist.
    """
    theory = Theory(
        moment_rank.rows(),
        polar_bound.bound_rows(),
        {iteration.key: polar_bound.scan(iteration) for iteration in polar_bound.ITERATIONS},
        polar_bound.rank_factor(),
        polar_bound.band(),
        runs=list(folders),
    )
    loaded = [run for folder in folders for run in loading.load(folder, theory.notes)]
    own = [run for run in loaded if not run.is_external]
    finished = [run for run in own if run.finished]
    theory.runs_read = len(finished)
    theory.notes += [f"{run.where}: not finished, left out" for run in own if not run.finished]
    if not finished:
        return theory
    # torch and transformers take seconds, which the lemmas do not need.
    from analysis.paper.theory import one_step

    arms = arms_of(finished)
    theory.scales = scales(finished)
    theory.conditions = condition_rows(finished, arms)
    for run in finished:
        try:
            theory.errors += [
                row
                for moment in real_moments(run, arms[run.folder])
                if (row := error_row(moment)) is not None
            ]
        except DamagedCheckpoint as error:
            theory.notes.append(f"{run.where}: no moments are read: {error}")
        if not checkpoints_of(run):
            theory.notes.append(f"{run.where}: no checkpoint, so no moments (checkpoint.every=N)")
    theory.error_summaries = error_summaries(theory.errors)
    theory.spectra = spectra(theory.errors)
    theory.paired = paired_rows(pairs(finished), arms)
    theory.steps = step_summaries(one_step.step_rows(finished, arms, theory.notes))
    return theory


def error_summaries(errors: Sequence[ErrorRow]) -> list[ErrorSummary]:
    """Return the figures of each arm."""
    found = []
    for arm in dict.fromkeys(row.arm for row in errors):
        rows = [row for row in errors if row.arm == arm]
        kappa = np.array([row.condition for row in rows])
        measured = np.array([row.measured for row in rows])
        # A run is a replicate; its moments at neighbouring steps are not independent of each other.
        correlations = []
        seeds = sorted({row.seed for row in rows})
        for seed in seeds:
            own = [row for row in rows if row.seed == seed]
            if len(own) > 2 and len({r.condition for r in own}) > 1 and len({r.measured for r in own}) > 1:
                ranks = stats.spearmanr([r.condition for r in own], [r.measured for r in own])
                correlations.append(float(np.asarray(ranks)[0]))
        found.append(
            ErrorSummary(
                arm,
                len(seeds),
                len(rows),
                {
                    name: float(np.quantile(kappa, q))
                    for name, q in (("5 %", 0.05), ("median", 0.5), ("95 %", 0.95), ("max", 1.0))
                },
                float(np.mean([row.small == 0.0 for row in rows])),
                float(np.mean([row.small for row in rows])),
                float(np.median(measured)),
                float(np.quantile(measured, 0.05)),
                float(np.quantile(measured, 0.95)),
                pooled(rows, "small_energy"),
                interval([pooled([r for r in rows if r.seed == seed], "small_energy") for seed in seeds]),
                pooled(rows, "length"),
                float(np.median([row.lifted for row in rows])),
                {k: float(np.median([row.replaced[k] for row in rows])) for k in rows[0].replaced},
                interval(correlations),
                max(abs(row.measured - row.computed) for row in rows),
            )
        )
    return found


def pooled(rows: Sequence[ErrorRow], part: str) -> float:
    """Return the share of a part ("small_energy" or "length") of the squared error, summed over moments."""
    return sum(getattr(row, part) * row.total for row in rows) / sum(row.total for row in rows)


def scales(runs: Sequence[LoadedRun]) -> list[str]:
    """Return what the runs of each scale trained: parameters, data, precision, device and number of runs."""
    found = []
    for scale in dict.fromkeys(map(scale_of, runs)):
        own = [run for run in runs if scale_of(run) == scale]
        facts = [{str(run.summary.get(key)) for run in own} for key in ("precision", "device")]
        parameters = {number(run.summary.get("parameters")) for run in own}
        size = "/".join(f"{count:,.0f}" for count in sorted(parameters) if math.isfinite(count))
        names = {str((run.config.get("data") or {}).get("name")) for run in own}
        words = [f"{size} parameters" if size else "", *("/".join(sorted(fact)) for fact in (names, *facts))]
        found.append(f"{scale} ({', '.join(word for word in words if word)}; {plural(len(own), 'run')})")
    return found


def scope(theory: Theory) -> str:
    """Return what the page rests on."""
    lemmas = "Lemmas: simulations and closed forms, fp64; the formula of Lemma 3.2 is reconstructed from its proof."
    if not theory.scales:
        return f"{lemmas} No run was read."
    return f"{lemmas} Figures: {'; '.join(theory.scales)}. They say nothing about other sizes, data and settings."


def spectra(errors: Sequence[ErrorRow]) -> dict[str, list[float]]:
    """Return arm → median of σ_i/σ₁ over the moments of the last checkpoint with the commonest rank."""
    found = {}
    for arm in dict.fromkeys(row.arm for row in errors):
        rows = [row for row in errors if row.arm == arm]
        last = max(row.step for row in rows)
        rows = [row for row in rows if row.step == last]
        sides = [row.side for row in rows]
        side = max(set(sides), key=sides.count)
        values = np.array([row.values for row in rows if row.side == side])
        found[f"{arm.label}, step {last}"] = np.median(values, axis=0).tolist()
    return found


def step_summaries(rows: Sequence[StepRow]) -> list[StepSummary]:
    """Return the differences by arm and split, over seeds."""
    found = []
    for arm in dict.fromkeys(row.arm for row in rows):
        own = [row for row in rows if row.arm == arm]
        for split in own[0].before:

            def over_seeds(first: str, second: str, own: list[StepRow] = own, split: str = split) -> Interval:
                means = [
                    np.mean([r.after[first][split] - r.after[second][split] for r in own if r.seed == seed])
                    for seed in sorted({row.seed for row in own})
                ]
                return interval(means)

            found.append(
                StepSummary(
                    arm,
                    split,
                    len(own),
                    float(np.mean([row.before[split] - row.after["exact"][split] for row in own])),
                    over_seeds("newton_schulz", "exact"),
                    over_seeds("shortened", "exact"),
                    over_seeds("newton_schulz", "shortened"),
                    float(np.mean([row.length for row in own])),
                )
            )
    return found


def within(value: Interval, digits: int = 2, *, percent: bool = False) -> str:
    """Format mean and half width of the 95 % interval, with signs."""
    if percent:
        return f"{100 * value.mean:.1f} ± {100 * value.half_width:.1f} %"
    if not math.isfinite(value.mean):
        return "–"
    if not math.isfinite(value.half_width):
        return f"{value.mean:+.{digits}g} (one seed)"
    return f"{value.mean:+.{digits}g} ± {value.half_width:.{digits}g}"


def excludes_zero(value: Interval) -> bool:
    """Return True if the 95 % interval does not contain 0."""
    return math.isfinite(value.half_width) and abs(value.mean) > value.half_width


def headline(theory: Theory) -> str:
    """Return the answer to the page's question in one sentence, as far as there are runs."""
    if not theory.error_summaries:
        band = theory.band
        return (
            f"Both lemmas hold under conditions that they do not state. Muon's five steps leave an error of up to "
            f"{band.largest_error:.2f} in every direction, whatever the condition number; no real moments were read."
        )
    parts = "; ".join(
        f"{row.arm.label} ({plural(row.runs, 'seed')}): {100 * row.small_energy:.1f} %"
        + (f" (by seed {within(row.small_energy_runs, percent=True)})" if row.runs > 1 else "")
        for row in theory.error_summaries
    )
    # The verdict of an arm is open where its seeds do not agree on a half.
    verdicts = {_source(row) for row in theory.error_summaries}
    source = verdicts.pop() if len(verdicts) == 1 else "the coefficients in some settings and not in others"
    return (
        f"The error of five Newton–Schulz steps comes mainly from {source}. Share of the squared error in directions "
        f"below the coefficients' band, where alone a larger condition number can raise an error beyond "
        f"{theory.band.largest_error:.2f}: {parts}."
    )


def _source(row: ErrorSummary) -> str:
    share, half = row.small_energy, row.small_energy_runs.half_width
    margin = half if math.isfinite(half) else 0.0
    if abs(share - 0.5) <= margin:
        return "neither part for certain"
    return "the coefficients" if share < 0.5 else "small singular values, hence the condition number"


def sentences(theory: Theory) -> list[str]:
    """Return what the numbers say, a sentence each."""
    found = [_lemma_31(theory), *_lemma_32(theory)]
    for row in theory.error_summaries:
        flat = ", ".join(f"{value:.2f} at κ = {kappa:g}" for kappa, value in row.replaced.items())
        found.append(
            f"{row.arm.label}: {row.moments:,} moments of {plural(row.runs, 'seed')}, κ "
            f"{significant(row.condition['5 %'])} to {significant(row.condition['95 %'])} (median "
            f"{significant(row.condition['median'])}); {100 * row.inside:.0f} % lie wholly inside the band. "
            f"Median error {row.measured:.3f}; {row.lifted:.3f} if every small direction is lifted into the band; with "
            f"geometric spectra at the same singular vectors {flat}. Rank correlation of error and κ "
            f"{within(row.rank_correlation)} over seeds. {100 * row.length:.0f} % of the squared error is a change of "
            "length, which a learning rate undoes."
        )
    for step in theory.steps:
        beyond = "more" if step.beyond_length.mean > 0 else "less"
        verdict = "" if excludes_zero(step.beyond_length) else ", which these seeds do not tell from zero"
        found.append(
            f"{step.arm.label}, one step from {step.states} states, loss on the {step.split}: the exact step gains "
            f"{step.gain:.4f} nats; Newton–Schulz ends {within(step.difference)} nats from it, of which "
            f"{within(step.shortened)} is its length ({step.length:.2f} of the exact one); beyond that it loses "
            f"{beyond}: {within(step.beyond_length)}{verdict}."
        )
    for row in theory.paired:
        if row.is_last:
            verdict = (
                "Newton–Schulz is " + ("worse" if row.difference.mean > 0 else "better")
                if excludes_zero(row.difference)
                else "no difference is shown"
            )
            found.append(
                f"{row.arm.label}, {plural(row.difference.n, 'paired seed')}: final loss {row.exact:.4f} exact "
                f"(lr {row.exact_lr:g}), {row.newton_schulz:.4f} Newton–Schulz (lr {row.newton_schulz_lr:g}), "
                f"difference {within(row.difference)}: {verdict}."
            )
    return found


def _lemma_31(theory: Theory) -> str:
    single = [row for row in theory.ranks if row.layer == "one term"]
    last = max(single[0].shares)
    holds = [row.shares[last] for row in single if row.holds]
    fails = [row.shares[last] for row in single if not row.holds]
    several = [row.limit for row in theory.ranks if row.layer != "one term"]
    return (
        f"Lemma 3.1 needs 1 − ηλ₁ > β, which it does not state: after {last} steps the best rank-one part leaves out "
        f"{min(holds):.2g} to {max(holds):.2g} where that holds, and {min(fails):.2g} to {max(fails):.2g} where it "
        f"does not. It needs a first eigenmatrix of rank one, too: with {moment_rank.TERMS} terms the share tends to "
        f"{max(several):.2g}, not to 0. It is about plain gradient descent with fixed coefficients."
    )


def _lemma_32(theory: Theory) -> list[str]:
    holds = [i.label for i in polar_bound.ITERATIONS if theory.scans[i.key].holds]
    fails = [i for i in polar_bound.ITERATIONS if not theory.scans[i.key].holds]
    ranges = "; ".join(
        f"{i.label} (excess up to {theory.scans[i.key].excess:.2f}, after five steps for κ from "
        f"{theory.scans[i.key].lowest:.3g} to {theory.scans[i.key].highest:.3g})"
        for i in fails
    )
    factor, band = theory.rank_factor, theory.band
    limits = ", ".join(f"{band.largest_kappa(k):.0f} at rank {k}" for k in (32, 80))
    return [
        f"Lemma 3.2 holds on all tested spectra for {'; '.join(holds)}. It is violated by {ranges}.",
        f"Its factor √r is wrong: AAᵀ with eigenvalues 1 and 63 times 0.1 has r = {factor.r} and "
        f"‖E₀‖_F = {factor.error:.2f}, where it allows {factor.claimed:.2f}; √k allows {factor.with_side:.2f}.",
        f"Muon's five steps map every σ/‖M‖_F from {band.start:.4f} to 1 into [{band.floor:.3f}, {band.top:.3f}]. "
        f"Up to κ = 1/({band.start:.4f}·√k) ({limits}) no direction of any matrix is below that band, and the error of "
        f"each is at most {band.largest_error:.3f}: a larger κ cannot raise this bound, a smaller one cannot lower it.",
    ]


LINE_LABEL = f"κ = {LINE:g}"
