"""Memorization of optimizers at equal validation loss, with paired tests over seeds.

A run's checkpoints give each measure as a function of the validation loss, linear between checkpoints. Used is the part
up to the lowest loss: checkpoints that do not improve on all earlier ones are left out, so that the function is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.comparison import statistics
from analysis.comparison.statistics import ExampleVariance, Pairwise, interval
from analysis.memorization import exposure

Floats = NDArray[np.float64]
Result = Mapping[str, Any]
BASELINE = "adamw"
"""Preset that every other optimizer is tested against. Pairs without it are descriptive."""


class MemorizationMeasure(NamedTuple):
    """A number of a checkpoint that optimizers are compared by.

    Attributes:
        key: in the JSON document.
        title: in tables and plots, with its unit.
        value: reads it from a result.
        is_chance: what the measure is of a model that saw nothing, which says nothing about optimizers.
        copies: of the canaries whose exposure it is; None for other measures.
        limits: the least and largest value, at which intervals of means end.
    """

    key: str
    title: str
    value: Callable[[Result], float]
    is_chance: bool = False
    copies: int | None = None
    limits: tuple[float, float] = (-math.inf, math.inf)


class RunCurve(NamedTuple):
    """The checkpoints of a run up to its lowest validation loss.

    Attributes:
        optimizer, seed: of the run.
        preset: that the optimizer's label belongs to.
        losses: (points,) strictly falling, nats/token.
        results: one per point.
    """

    optimizer: str
    seed: int
    preset: str
    losses: Floats
    results: tuple[Result, ...]

    def at(self, val_loss: float, value: Callable[[Result], float]) -> float:
        """Return a measure at a validation loss, interpolated linearly; NaN outside of the run's range."""
        values = np.array([value(result) for result in self.results])
        if not self.losses[-1] <= val_loss <= self.losses[0]:
            return math.nan
        return float(np.interp(val_loss, self.losses[::-1], values[::-1]))


def measures(results: Sequence[Result]) -> list[MemorizationMeasure]:
    """Return the measures that all results have, exposures by copies first."""
    copies = [group["copies"] for group in results[0]["exposure"] if group["copies"]]
    bits, share = (0.0, exposure.largest(exposure.ALTERNATIVES)), (0.0, 1.0)
    found = [
        MemorizationMeasure(f"exposure_{n}", f"exposure ×{n} (bits)", _exposure(n), copies=n, limits=bits)
        for n in copies
    ]
    found.append(MemorizationMeasure("auc", "membership AUC", lambda r: r["membership"]["auc"], limits=share))
    title = "membership AUC, Min-K %"
    found.append(
        MemorizationMeasure("min_k_auc", title, lambda r: r["membership"]["min_k"]["auc"], limits=share)
    )
    if "reference" in results[0]["membership"]:
        title = "membership AUC, reference"
        found.append(
            MemorizationMeasure(
                "reference_auc", title, lambda r: r["membership"]["reference"]["auc"], limits=share
            )
        )
    if all(result["membership"].get("chance") for result in results):
        title = "membership AUC of a bigram model that saw neither (chance)"
        found.append(
            MemorizationMeasure("chance_auc", title, lambda r: r["membership"]["chance"]["auc"], True)
        )
    title = "tokens right, training minus validation"
    found.append(
        MemorizationMeasure("extraction", title, lambda r: r["extraction"]["difference"]["tokens_right"])
    )
    for key, title in (
        ("head_margin", "signed head margin (share of the feature's norm)"),
        ("embedding_radius", "embedding radius (share of an embedding's norm)"),
    ):
        found.append(MemorizationMeasure(key, title, _robustness(key)))
    return found


def _robustness(key: str) -> Callable[[Result], float]:
    return lambda result: result["robustness"][key]["median"]


def _exposure(copies: int) -> Callable[[Result], float]:
    return lambda result: next(g["mean"] for g in result["exposure"] if g["copies"] == copies)


def run_curves(results: Sequence[Result]) -> list[RunCurve]:
    """Return a curve per run, in order of appearance."""
    by_run: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        by_run.setdefault((result["optimizer"], result["seed"]), []).append(result)
    found = []
    for (optimizer, seed), of_run in by_run.items():
        best, kept = math.inf, []
        for result in sorted(of_run, key=lambda r: r["step"]):
            if result["val_loss"] < best:
                best = result["val_loss"]
                kept.append(result)
        losses = np.array([result["val_loss"] for result in kept])
        found.append(RunCurve(optimizer, seed, kept[0]["preset"], losses, tuple(kept)))
    return found


def common_range(curves: Sequence[RunCurve]) -> tuple[float, float] | None:
    """Return the lowest and highest validation loss that every run has passed; None without such a range."""
    low, high = limiting(curves).losses[-1], min(c.losses[0] for c in curves)
    return (float(low), float(high)) if low <= high else None


def limiting(curves: Sequence[RunCurve]) -> RunCurve:
    """Return the run whose lowest validation loss is the highest: all others are compared at that loss."""
    return max(curves, key=lambda curve: curve.losses[-1])


def compare(results: Sequence[Result], levels: Sequence[float] | None) -> list[dict[str, Any]]:
    """Compare optimizers at equal validation loss.

    p-values are of paired t-tests. Planned are pairs with `BASELINE` in exposure, for each number
    of copies; "p_holm" is adjusted by Holm over these, at all levels, and None for every other pair.
    Intervals and p-values of differences in exposure are over seeds and canaries (`statistics.two_level`), those of
    other measures over seeds, with the same rows for all.

    Args:
        results: of all checkpoints.
        levels: validation losses; None: the lowest one that every run has reached.

    Returns:
        One entry per level and measure: "val_loss", "measure", "title", "optimizers" (mean over seeds with interval)
        and "pairs"; empty without a common range. Levels outside of it are left out.
    """
    curves = run_curves(results)
    reached = common_range(curves)
    if reached is None:
        return []
    used = (
        [reached[0]] if levels is None else [level for level in levels if reached[0] <= level <= reached[1]]
    )
    names = list(dict.fromkeys(curve.optimizer for curve in curves))
    baselines = {curve.optimizer for curve in curves if curve.preset == BASELINE}
    seeds = sorted({curve.seed for curve in curves})
    entries = [
        _entry(curves, names, seeds, level, measure) for level in used for measure in measures(results)
    ]
    exposures = {measure.key for measure in measures(results) if measure.copies is not None}
    planned = []
    for entry in entries:
        for pair in entry["pairs"]:
            with_baseline = (pair["a"] in baselines) != (pair["b"] in baselines)
            pair |= {"planned": with_baseline and entry["measure"] in exposures, "p_holm": None}
            planned += [pair] if pair["planned"] else []
    adjusted = statistics.holm([math.nan if pair["p"] is None else pair["p"] for pair in planned])
    for pair, p in zip(planned, adjusted):
        pair["p_holm"] = _number(p)
    return entries


def _entry(
    curves: Sequence[RunCurve], names: list[str], seeds: list[int], level: float, measure: MemorizationMeasure
) -> dict[str, Any]:
    table = np.full((len(names), len(seeds)), np.nan)
    for curve in curves:
        table[names.index(curve.optimizer), seeds.index(curve.seed)] = curve.at(level, measure.value)
    arms = []
    for name, values in zip(names, table):
        found = interval(values)
        arms.append(
            {
                "optimizer": name,
                "mean": _number(found.mean),
                "low": _number(max(found.mean - found.half_width, measure.limits[0])),
                "high": _number(min(found.mean + found.half_width, measure.limits[1])),
                "seeds": found.n,
            }
        )
    tests = statistics.pairwise(table)
    if measure.copies is not None:
        tests = statistics.with_examples(
            tests, _canary_variance(curves, names, seeds, level, measure.copies, tests)
        )
    pairs = []
    for index, (i, j) in enumerate([] if measure.is_chance else tests.pairs):
        mean, half = float(tests.mean[index]), float(tests.half_width[index])
        pairs.append(
            {
                "a": names[i],
                "b": names[j],
                "difference": _number(mean),
                "low": _number(mean - half),
                "high": _number(mean + half),
                "p": _number(tests.p[index]),
                "seeds": int(tests.n[index]),
            }
        )
    return {
        "val_loss": level,
        "measure": measure.key,
        "title": measure.title,
        "optimizers": arms,
        "pairs": pairs,
    }


def _canary_variance(
    curves: Sequence[RunCurve], names: list[str], seeds: list[int], level: float, copies: int, tests: Pairwise
) -> ExampleVariance:
    """Return what the choice of canaries adds to the variance of each pair's difference, NaN for a single canary."""
    count = sum(c["copies"] == copies for c in curves[0].results[0]["canaries"])
    table = np.full((len(names), len(seeds), count), np.nan)
    for curve in curves:
        place = names.index(curve.optimizer), seeds.index(curve.seed)
        table[place] = [curve.at(level, _of_canary(copies, number)) for number in range(count)]
    shared, single = np.full((2, len(tests.pairs)), np.nan)
    for index, (i, j) in enumerate(tests.pairs):
        differences = table[i] - table[j]
        differences = differences[np.isfinite(differences).all(1)]
        if count > 1 and len(differences):
            shared[index] = differences.mean(0).var(ddof=1) / count
            single[index] = differences.var(1, ddof=1).mean() / count
    return ExampleVariance(shared, single, count)


def _of_canary(copies: int, number: int) -> Callable[[Result], float]:
    return lambda result: [c["exposure"] for c in result["canaries"] if c["copies"] == copies][number]


def dose(results: Sequence[Result], level: float) -> list[dict[str, Any]]:
    """Return how the exposure at a validation loss changes when the rank of an optimizer's subspace doubles.

    The slope over log2(rank) is fitted for each seed that has all ranks; its mean and 95 % t-interval are over seeds.

    Args:
        results: of all checkpoints.
        level: validation loss.
    """
    ranks = {r["optimizer"]: r["rank"] for r in results if r["rank"] is not None}
    families: dict[str, list[str]] = {}
    for label in ranks:
        families.setdefault(label.partition(" (")[0], []).append(label)
    by_run = {(curve.optimizer, curve.seed): curve for curve in run_curves(results)}
    found = []
    for family, labels in families.items():
        if len({ranks[label] for label in labels}) < 2:
            continue
        seeds = [s for s in sorted({s for _, s in by_run}) if all((label, s) in by_run for label in labels)]
        x = np.log2([ranks[label] for label in labels])
        for measure in (m for m in measures(results) if not m.is_chance):
            slopes = [
                np.polyfit(x, [by_run[l, s].at(level, measure.value) for l in labels], 1)[0] for s in seeds
            ]
            slope = interval(slopes)
            found.append(
                {
                    "optimizer": family,
                    "ranks": sorted(ranks[label] for label in labels),
                    "measure": measure.key,
                    "per_doubling": _number(slope.mean),
                    "low": _number(slope.mean - slope.half_width),
                    "high": _number(slope.mean + slope.half_width),
                    "seeds": slope.n,
                }
            )
    return found


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
