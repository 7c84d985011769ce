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
from analysis.comparison.statistics import interval

Floats = NDArray[np.float64]
Result = Mapping[str, Any]
PRIMARY = ("exposure_1", "exposure_4")
"""Measures whose differences are tested: secrets that training holds once and a few times. Others are descriptive."""
BASELINE = "adamw"
"""Preset that every other optimizer is tested against. Pairs without it are descriptive."""


class MemorizationMeasure(NamedTuple):
    """A number of a checkpoint that optimizers are compared by.

    Attributes:
        key: in the JSON document.
        title: in tables and plots, with its unit.
        value: reads it from a result.
        is_chance: what the measure is of a model that saw nothing, which says nothing about optimizers.
    """

    key: str
    title: str
    value: Callable[[Result], float]
    is_chance: bool = False


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
    found = [MemorizationMeasure(f"exposure_{n}", f"exposure ×{n} (bits)", _exposure(n)) for n in copies]
    found.append(MemorizationMeasure("auc", "membership AUC", lambda r: r["membership"]["auc"]))
    found.append(
        MemorizationMeasure("min_k_auc", "membership AUC, Min-K %", lambda r: r["membership"]["min_k"]["auc"])
    )
    if "reference" in results[0]["membership"]:
        title = "membership AUC, reference"
        found.append(
            MemorizationMeasure("reference_auc", title, lambda r: r["membership"]["reference"]["auc"])
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
        ("head_margin", "signed head margin (of the feature's norm)"),
        ("embedding_radius", "embedding radius, upper bound (of an embedding's norm)"),
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

    p-values are of paired t-tests over common seeds. Planned are pairs with `BASELINE` in the measures of `PRIMARY`;
    "p_holm" is adjusted by Holm over these, at all levels, and None for every other pair.
    ``canaries_low`` and ``canaries_high`` are a 95 % t-interval of the difference over canaries, paired by canary, each
    averaged over the common seeds.

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
    planned = []
    for entry in entries:
        for pair in entry["pairs"]:
            with_baseline = (pair["a"] in baselines) != (pair["b"] in baselines)
            pair |= {"planned": with_baseline and entry["measure"] in PRIMARY, "p_holm": None}
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
                "low": _number(found.mean - found.half_width),
                "high": _number(found.mean + found.half_width),
                "seeds": found.n,
            }
        )
    tests = statistics.pairwise(table)
    pairs = []
    for index, (i, j) in enumerate([] if measure.is_chance else tests.pairs):
        mean, half = float(tests.mean[index]), float(tests.half_width[index])
        pair = {
            "a": names[i],
            "b": names[j],
            "difference": _number(mean),
            "low": _number(mean - half),
            "high": _number(mean + half),
            "p": _number(tests.p[index]),
            "seeds": int(tests.n[index]),
        }
        if measure.key.startswith("exposure_"):
            pair |= _over_canaries(curves, (names[i], names[j]), level, int(measure.key.rpartition("_")[2]))
        pairs.append(pair)
    return {
        "val_loss": level,
        "measure": measure.key,
        "title": measure.title,
        "optimizers": arms,
        "pairs": pairs,
    }


def _over_canaries(
    curves: Sequence[RunCurve], names: tuple[str, str], level: float, copies: int
) -> dict[str, float | None]:
    by_run = {(curve.optimizer, curve.seed): curve for curve in curves}
    common = [s for name, s in by_run if name == names[0] and (names[1], s) in by_run]
    chosen = [c["name"] for c in curves[0].results[0]["canaries"] if c["copies"] == copies]
    differences = []
    for canary in chosen:
        value = _of_canary(canary)
        first, second = ([by_run[name, seed].at(level, value) for seed in common] for name in names)
        differences.append(np.mean(np.subtract(first, second)) if common else math.nan)
    found = interval(differences)
    ends = found.mean - found.half_width, found.mean + found.half_width
    return {"canaries_low": _number(ends[0]), "canaries_high": _number(ends[1])}


def _of_canary(name: str) -> Callable[[Result], float]:
    return lambda result: next(c["exposure"] for c in result["canaries"] if c["name"] == name)


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
