"""Per-example results of a set of runs: how far the examples carry a difference, and where two optimizers disagree.

All runs of a set answer the same validation examples, so that every comparison is paired by seed and by example.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from analysis.comparison import resampling
from analysis.comparison.statistics import ExampleVariance, Floats, Interval, Pairwise, two_level
from analysis.runs.measure import Measure
from analysis.runs.run import LoadedRun
from harness.tasks.metrics import METRICS, score

Runs = Sequence[Mapping[int, LoadedRun]]
"""Seed → finished run, a mapping per arm."""


@dataclass(frozen=True)
class McNemar:
    """Exact test of two runs of one seed on the same examples (McNemar 1947; binomial, two-sided).

    It asks whether these two trained models differ on further examples, not whether the optimizers do.
    """

    seed: int
    only_first: int
    """Examples that the first run alone answers correctly."""
    only_second: int
    p: float


@dataclass(frozen=True)
class Agreement:
    """How often two runs of one seed predict the same, averaged over seeds."""

    share: float
    kappa: float
    """Cohen's kappa (1960): agreement beyond that of independent predictions; NaN where a run is constant."""


class ExampleResults:
    """The predictions of all finished runs of a set, aligned by example.

    Attributes:
        rows: row of each example in the source, shape (examples,).
        references: what was asked for, one per example.
        answers: predictions by arm and seed, in the order of ``rows``.
    """

    def __init__(self, runs: Runs, measure: Measure, labels: Sequence[str] | None = None) -> None:
        """Align the predictions.

        Args:
            runs: with predictions that `find_problem` accepts.
            measure: the metric of the task.
            labels: classes in order; None: derived from the references where needed.
        """
        self.measure, self.labels = measure, labels
        self.answers = [
            {seed: run.predictions for seed, run in arm.items() if run.predictions is not None}
            for arm in runs
        ]
        first = next(answers for arm in self.answers for answers in arm.values())
        self.rows, self.references = first.examples, first.references
        self._draws = self._resampled()

    def __len__(self) -> int:
        return len(self.rows)

    def correct(self, arm: int, seed: int) -> NDArray[np.bool_]:
        """Return which examples a run answers correctly; only where `has_correct`."""
        correct = self.answers[arm][seed].correct
        assert correct is not None
        return correct

    def recomputed(self, arm: int, seed: int) -> float:
        """Return the metric of a run from its predictions."""
        if METRICS[self.measure.name].is_mean:
            return float(self.correct(arm, seed).mean())
        return score(self.measure.name, self.references, self.answers[arm][seed].predictions, self.labels)

    @property
    def has_correct(self) -> bool:
        """True unless the predictions are numbers, which are neither right nor wrong."""
        return METRICS[self.measure.name].kind != "number"

    def common_seeds(self, first: int, second: int) -> list[int]:
        """Return the seeds that both arms have finished."""
        return sorted(self.answers[first].keys() & self.answers[second].keys())

    def _resampled(self) -> list[dict[int, Floats]]:
        """Return the metric of each run in each resample of the examples; all runs share the resamples."""
        pieces: list[dict[int, list[Floats]]] = [{seed: [] for seed in arm} for arm in self.answers]
        is_mean = METRICS[self.measure.name].is_mean
        for counts in resampling.resample(len(self)):
            for arm, parts in enumerate(pieces):
                for seed, part in parts.items():
                    if is_mean:
                        part.append(resampling.share(counts, self.correct(arm, seed).astype(float)))
                    else:
                        own = self.answers[arm][seed].predictions
                        part.append(
                            resampling.resampled_score(
                                self.measure.name, counts, self.references, own, self.labels
                            )
                        )
        return [{seed: np.concatenate(part) for seed, part in parts.items()} for parts in pieces]

    def _variance(self, draws: Sequence[Floats]) -> tuple[float, float]:
        """Return the variances over examples of the mean over seeds, and of one seed; shape (resamples,) each."""
        if not draws:
            return math.nan, math.nan
        stacked = np.stack(draws)
        return float(np.var(stacked.mean(0), ddof=1)), float(np.var(stacked, axis=1, ddof=1).mean())

    def variance_of_pairs(self, tests: Pairwise) -> ExampleVariance:
        """Return the example variance of each pair's difference over common seeds."""
        parts = [
            self._variance([self._draws[i][seed] - self._draws[j][seed] for seed in self.common_seeds(i, j)])
            for i, j in tests.pairs
        ]
        shared, single = np.array(parts, float).reshape(-1, 2).T
        return ExampleVariance(shared, single, len(self))

    def half_widths(self, arm: int, final: Interval) -> tuple[float, float]:
        """Return the 95 % half widths of an arm's mean: over examples alone, and over seeds and examples."""
        shared, single = self._variance(list(self._draws[arm].values()))
        alone = float(stats.t.ppf(0.975, max(len(self) - 1, 1))) * math.sqrt(shared)
        variance = ExampleVariance(np.array(shared), np.array(single), len(self))
        return alone, float(two_level(final.n, final.mean, final.sd, variance)[0])

    def mcnemar(self, first: int, second: int) -> list[McNemar]:
        """Return the exact test of each common seed; empty for numbers."""
        if not self.has_correct:
            return []
        tests = []
        for seed in self.common_seeds(first, second):
            a, b = self.correct(first, seed), self.correct(second, seed)
            tests.append(
                McNemar(seed, *(counts := (int((a & ~b).sum()), int((b & ~a).sum()))), mcnemar_p(*counts))
            )
        return tests

    def agreement(self, first: int, second: int) -> Agreement:
        """Return the agreement of two arms over common seeds, or of different seeds of one arm."""
        if first == second:
            seeds = sorted(self.answers[first])
            pairs = [(first, a, first, b) for k, a in enumerate(seeds) for b in seeds[k + 1 :]]
        else:
            pairs = [(first, seed, second, seed) for seed in self.common_seeds(first, second)]
        if not pairs or not self.has_correct:
            return Agreement(math.nan, math.nan)
        values = [
            agreement(self.answers[i][a].predictions, self.answers[j][b].predictions) for i, a, j, b in pairs
        ]
        return Agreement(*(float(np.mean(part)) for part in zip(*values, strict=True)))

    def changed(self, right: int, wrong: int) -> list[int]:
        """Return the indices of the examples that every seed of one arm answers correctly and none of the other."""
        seeds = self.common_seeds(right, wrong)
        if not seeds or not self.has_correct:
            return []
        always = np.all([self.correct(right, seed) for seed in seeds], axis=0)
        never = ~np.any([self.correct(wrong, seed) for seed in seeds], axis=0)
        return np.flatnonzero(always & never).tolist()


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Return the two-sided exact p-value of McNemar's test; 1 where no example tells the runs apart."""
    discordant = only_first + only_second
    return float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0


def agreement(first: Sequence[str], second: Sequence[str]) -> tuple[float, float]:
    """Return the share of equal predictions, and Cohen's kappa (NaN if both are the same constant)."""
    observed = float(np.mean([a == b for a, b in zip(first, second, strict=True)]))
    shares = [
        {word: words.count(word) / len(words) for word in set(words)} for words in (list(first), list(second))
    ]
    expected = sum(share * shares[1].get(word, 0.0) for word, share in shares[0].items())
    return observed, (observed - expected) / (1 - expected) if expected < 1 else math.nan


def find_problem(runs: Runs, measure: Measure) -> str | None:
    """Return why the examples of these runs cannot be compared, as a clause; None if they can.

    Args:
        runs: finished runs by seed, a mapping per arm.
        measure: what they are compared by.
    """
    if measure.name not in METRICS:
        return f"{measure.name} is no metric whose examples can be resampled"
    everything = [run for arm in runs for run in arm.values()]
    if not everything:
        return "no run finished"
    answers = {run.where: run.predictions for run in everything if run.predictions is not None}
    if lacking := len(everything) - len(answers):
        return f"{lacking} of {len(everything)} runs have no readable predictions.parquet"
    (name, first), *others = answers.items()
    for other, own in others:
        if not np.array_equal(own.examples, first.examples) or own.references != first.references:
            return f"{name} and {other} were evaluated on different examples"
    for where, own in answers.items():
        if METRICS[measure.name].kind == "number":
            if not np.isfinite([_float(value) for value in (*own.references, *own.predictions)]).all():
                return f"{where} predicts what is not a finite number"
        elif own.correct is None:
            return f"{where} does not say which predictions are correct"
    return None


def _float(text: object) -> float:
    try:
        return float(str(text))
    except ValueError:
        return math.nan
