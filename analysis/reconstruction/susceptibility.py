"""Optimizer × training step → how much nearer than unrelated images an attack comes, with an interval over seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student

from analysis.reconstruction.tables import Row

SCOPE = (
    "A claim about small homogeneous ReLU networks trained far past separation on a few images, "
    "and about this attack: not about language models."
)
MEASURES = ("nn_top5", "nn_top5_margin", "ncc_top5")


def rows(attack: Sequence[Row]) -> list[Row]:
    """One row per optimizer, step, objective and attacker's radius, from the rows of the table `attack`.

    Of the grid points of one victim and initial value, the attacker's own criterion (least K, or greatest
    alignment) chooses; the training images don't. Advantage = (held out − attack)/held out for distances, and
    (attack − held out)/(1 − held out) for NCC: 0 is chance, 1 is the image itself. The interval is Student's, 95 %,
    over victims' seeds; None for one seed. `beats_truth`: share of attacks that fit the weights better than the
    training images themselves, by the objective.
    """
    chance: dict[tuple[object, ...], Row] = {}
    found: dict[tuple[object, ...], dict[int, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in attack:
        where = (row["optimizer"], row["step"], row["seed"], row["candidates"])
        if row["kind"] == "heldout":
            chance[where] = row
        if row["kind"] == "attack":
            key = (row["optimizer"], row["step"], row["objective"], row["prior"], row["radius"])
            seeds = found[key][row["seed"]]
            before = seeds.get(row["attack_seed"])
            if before is None or _is_better(row, before):
                seeds[row["attack_seed"]] = row
    return [row for key, by_seed in found.items() if (row := _row(key, by_seed, chance)) is not None]


def _is_better(row: Row, than: Row) -> bool:
    if row["objective"] == "l2":
        return row["residual"] < than["residual"]
    return row["alignment"] > than["alignment"]


def _row(
    key: tuple[object, ...], by_seed: dict[int, dict[int, Row]], chance: dict[tuple[object, ...], Row]
) -> Row | None:
    optimizer, step, objective, prior, radius = key
    advantages: dict[str, list[float]] = {name: [] for name in MEASURES}
    beats = []
    for seed, runs in by_seed.items():
        for name in MEASURES:
            values = []
            for row in runs.values():
                base = chance.get((optimizer, step, seed, row["candidates"]))
                if base is not None:
                    values.append(advantage(name, row[name], base[name]))
            if values:
                advantages[name].append(float(np.mean(values)))
        beats += [row["beats_truth"] for row in runs.values()]
    if not advantages[MEASURES[0]]:
        return None
    out: Row = {
        "optimizer": optimizer,
        "step": step,
        "objective": objective,
        "prior": prior,
        "radius": radius,
        "seeds": len(by_seed),
    }
    for name in MEASURES:
        mean, half = interval(advantages[name])
        out |= {f"advantage_{name}": mean, f"half_width_{name}": half}
    return {**out, "beats_truth": float(np.mean(beats))}


def advantage(name: str, value: float, chance: float) -> float:
    """0 where `value` is what held-out images get, 1 where it is perfect."""
    if name.startswith("ncc"):
        return (value - chance) / (1 - chance)
    return (chance - value) / chance


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95 % Student interval; None for fewer than two values."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, float(student.ppf(0.975, len(values) - 1)) * error
