"""How much nearer than unrelated images an attack comes, by optimizer and training step, and the baselines for it.

A score means little alone: the same figures are computed for held-out images, random directions and class means,
and the training set's own residual tells what recovery would look like.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import sem
from scipy.stats import t as student
from torch import Tensor

from analysis.comparison.statistics import holm, pairwise
from analysis.reconstruction import multipliers
from analysis.reconstruction.attack import GridPoint, InitialValues
from analysis.reconstruction.network import Network, smoothed
from analysis.reconstruction.scoring import Score, Target, score
from analysis.reconstruction.subjects import TableRow

SCOPE = (
    "A claim about small homogeneous ReLU networks trained far past separation on a few images, "
    "and about this attack: not about language models."
)
MEASURES = ("nn_top5", "nn_top5_margin", "ncc_top5")
ORACLE_LAMBDA_MIN = 1e-3
ORACLE_LR = 0.005
_Group = tuple[str, str, str, str, float, float]
"""Optimizer, objective, scale of the weights, prior, initial radius and believed offset of an attack."""


def rows(attack: Sequence[TableRow]) -> list[TableRow]:
    """Return a row per optimizer, step, objective, scale of the weights, attacker's radius and believed offset.

    The means and Student's 95 % intervals (fp64) are over sets of images; victims and attacks on one set are averaged
    first, and one set has no interval. `beats_truth`: share of attacks that fit the weights better than the training
    images themselves, by the objective.

    Args:
        attack: rows of the table `attack`.
    """
    out = []
    for (group, step), sets in _by_set(attack).items():
        optimizer, objective, weights, prior, radius, offset = group
        row: TableRow = {
            "optimizer": optimizer,
            "step": step,
            "objective": objective,
            "weights": weights,
            "prior": prior,
            "radius": radius,
            "offset": offset,
            "data_sets": len(sets),
            "seeds": min(int(values["victims"]) for values in sets.values()),
        }
        for name in MEASURES:
            mean, half = interval([values[f"advantage_{name}"] for values in sets.values()])
            row |= {f"advantage_{name}": mean, f"half_width_{name}": half}
        out.append(row | {"beats_truth": float(np.mean([values["beats_truth"] for values in sets.values()]))})
    return out


def paired(attack: Sequence[TableRow]) -> list[TableRow]:
    """Return differences within sets of images, of four contrasts.

    `training`: last against first step. `conventions`: that difference on raw weights against the one on scaled
    weights, so that "the outcome depends on the scale" is a test of its own. `optimizers`: each pair at the end.
    `offsets`: at the end, each offset that the attacker believes in against the first.

    Student's paired 95 % interval and the p-value of the paired t-test (fp64) are over sets, none for one set;
    `p_holm` corrects for all tests of one contrast at one objective, prior and radius. Training and offsets compare the
    figures themselves, optimizers are compared by their advantages. `leaks_more`: sets in which the first member of
    the pair (the later step, raw weights, the first optimizer, the other offset) is recovered better.

    Args:
        attack: rows of the table `attack`.
    """
    by_group: dict[_Group, dict[int, dict[int, dict[str, float]]]] = defaultdict(dict)
    for (group, step), sets in _by_set(attack).items():
        by_group[group][step] = sets
    out = []
    for group, steps in by_group.items():
        first, last = min(steps), max(steps)
        if first < last:
            for name in MEASURES[1:]:
                label = f"{group[0]}: step {last} − {first}"
                out.append(_pair("training", label, group, name, name, steps[last], steps[first]))
    groups = list(by_group)
    for raw in groups:
        scaled = (*raw[:2], "margin", *raw[3:])
        if raw[2] == "raw" and scaled in by_group and len(by_group[raw]) > 1:
            first, last = min(by_group[raw]), max(by_group[raw])
            label = f"{raw[0]}: step {last} − {first}"
            changes = [_changes(by_group[group][last], by_group[group][first]) for group in (raw, scaled)]
            both = (*raw[:2], "raw − margin", *raw[3:])
            out += [_pair("conventions", label, both, name, name, *changes) for name in MEASURES[1:]]
    first_of = {group[:5]: group for group in reversed(groups)}
    for one, other in itertools.combinations(groups, 2):
        if one[:5] == other[:5] and one == first_of[one[:5]]:
            for name in MEASURES[1:]:
                label = f"{one[0]}: offset {other[5]:g} − {one[5]:g}"
                ends = (by_group[other][max(by_group[other])], by_group[one][max(by_group[one])])
                out.append(_pair("offsets", label, other, name, name, *ends))
        if one[0] != other[0] and one[1:] == other[1:]:
            for name in MEASURES[1:]:
                label, key = f"{one[0]} − {other[0]}", f"advantage_{name}"
                ends = (by_group[one][max(by_group[one])], by_group[other][max(by_group[other])])
                out.append(_pair("optimizers", label, one, name, key, *ends))
    return _with_holm([row for row in out if row is not None])


def _changes(
    last: Mapping[int, Mapping[str, float]], first: Mapping[int, Mapping[str, float]]
) -> dict[int, dict[str, float]]:
    """Return set of images → change of each measure by training."""
    return {k: {name: last[k][name] - first[k][name] for name in MEASURES} for k in set(last) & set(first)}


def _with_holm(rows: list[TableRow]) -> list[TableRow]:
    families: dict[tuple[object, ...], list[TableRow]] = defaultdict(list)
    for row in rows:
        families[row["contrast"], row["objective"], row["prior"], row["radius"]].append(row)
    for family in families.values():
        # Differences that cannot be tested are NaN for Holm, which counts them, and missing in the table.
        adjusted = holm([math.nan if row["p"] is None else row["p"] for row in family])
        for row, p in zip(family, adjusted, strict=True):
            row["p_holm"] = None if math.isnan(p) else float(p)
    return rows


def _pair(
    contrast: str,
    label: str,
    group: _Group,
    measure: str,
    key: str,
    one: Mapping[int, Mapping[str, float]],
    other: Mapping[int, Mapping[str, float]],
) -> TableRow | None:
    common = sorted(set(one) & set(other))
    if not common:
        return None
    a, b = (np.array([values[k][key] for k in common]) for values in (one, other))
    test = pairwise(np.stack([a, b]))
    half, p = (None if math.isnan(v) else float(v) for v in (test.half_width[0], test.p[0]))
    nearer_is_less = not key.startswith("advantage") and not measure.startswith("ncc")
    return {
        "contrast": contrast,
        "pair": label,
        "objective": group[1],
        "weights": group[2],
        "prior": group[3],
        "radius": group[4],
        "offset": group[5],
        "measure": measure,
        "first": float(a.mean()),
        "second": float(b.mean()),
        "difference": float(test.mean[0]),
        "half_width": half,
        "p": p,
        "data_sets": len(common),
        "leaks_more": int((a < b).sum() if nearer_is_less else (a > b).sum()),
    }


def _by_set(attack: Sequence[TableRow]) -> dict[tuple[_Group, int], dict[int, dict[str, float]]]:
    """Return (group, step) → set of images → means over its victims and attacks.

    Of the grid points of one victim and initial value, the attacker's own criterion (least K, or greatest alignment)
    chooses; the training images do not.
    """
    chance: dict[tuple[object, ...], TableRow] = {}
    chosen: dict[tuple[_Group, int, int], dict[tuple[int, int], TableRow]] = defaultdict(dict)
    for row in attack:
        if row["kind"] == "heldout":
            chance[_victim(row)] = row
        if row["kind"] == "attack":
            group = (
                row["optimizer"],
                row["objective"],
                row["weights"],
                row["prior"],
                row["radius"],
                row["offset"],
            )
            runs = chosen[group, row["step"], row["data_set"]]
            run = (row["seed"], row["attack_seed"])
            if run not in runs or _is_better(row, runs[run]):
                runs[run] = row
    out: dict[tuple[_Group, int], dict[int, dict[str, float]]] = defaultdict(dict)
    for (group, step, data_set), runs in chosen.items():
        values: dict[str, list[float]] = defaultdict(list)
        for row in runs.values():
            base = chance.get(_victim(row))
            if base is None:
                continue
            values["beats_truth"].append(row["beats_truth"])
            for name in MEASURES:
                values[name].append(row[name])
                values[f"advantage_{name}"].append(advantage(name, row[name], chance_level(name, base)))
        if values:
            means = {key: float(np.mean(group_values)) for key, group_values in values.items()}
            out[group, step][data_set] = {**means, "victims": len({seed for seed, _ in runs})}
    return out


def _victim(row: TableRow) -> tuple[object, ...]:
    return (row["optimizer"], row["step"], row["data_set"], row["seed"], row["candidates"])


def _is_better(row: TableRow, than: TableRow) -> bool:
    if row["objective"] == "l2":
        return row["residual"] < than["residual"]
    return row["alignment"] > than["alignment"]


def chance_level(name: str, heldout_row: TableRow) -> float:
    """Return what held-out images get by chance; on the margin, the nearer of the images as they are and rescaled.

    Rescaling moves held-out images away from the training images, so rescaled ones alone would flatter an attack.
    """
    if name == "nn_top5_margin":
        return min(heldout_row["nn_top5"], heldout_row["nn_top5_margin"])
    return heldout_row[name]


def advantage(name: str, value: float, chance: float) -> float:
    """Return how far a value is from chance to perfect: 0 is what held-out images get, 1 is the image itself."""
    if name.startswith("ncc"):
        return (value - chance) / (1 - chance)
    return (chance - value) / chance


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the half width of its 95 % Student interval; None for fewer than two values."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    return mean, float(student.ppf(0.975, len(values) - 1) * sem(values))


def heldout(
    target: Target, pool: Tensor, pool_labels: Tensor, labels: Tensor, draws: int, seed: int
) -> list[Score]:
    """Score public images that were not trained on, drawn with the candidates' labels (m,), `draws` times.

    More candidates are nearer by chance alone, so their number must be the attack's.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(draws):
        rows = torch.empty(len(labels), dtype=torch.long)
        for label in labels.unique():
            members = (pool_labels == label).nonzero()[:, 0]
            is_label = labels == label
            count = int(is_label.sum())
            # A pool that is smaller than the number of candidates is gone through more than once.
            rounds = -(-count // len(members))
            order = torch.cat([torch.randperm(len(members), generator=generator) for _ in range(rounds)])
            rows[is_label] = members[order[:count]]
        scores.append(score(target, pool[rows], labels)[0])
    return scores


def gaussians(target: Target, labels: Tensor, typical_norm: float, draws: int, seed: int) -> list[Score]:
    """Score random directions at the images' typical norm."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(labels), target.x.shape[1])
    scores = []
    for _ in range(draws):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        scores.append(score(target, x / x.norm(dim=1, keepdim=True) * typical_norm, labels)[0])
    return scores


def pair_means(target: Target, count: int, draws: int, seed: int) -> list[Score]:
    """Score means of two training images of one class: knowledge of averages, not of images."""
    generator = torch.Generator().manual_seed(seed)
    values = target.labels.unique()
    scores = []
    for _ in range(draws):
        rows, labels = [], []
        for i in range(count):
            label = values[i % len(values)]
            members = (target.labels == label).nonzero()[:, 0]
            pair = members[torch.randperm(len(members), generator=generator)[:2]]
            rows.append(target.x[pair].mean(0))
            labels.append(label)
        scores.append(score(target, torch.stack(rows), torch.stack(labels))[0])
    return scores


def duplicate_rows(attack: Sequence[TableRow]) -> list[TableRow]:
    """Return how often a training image has a candidate nearly equal to it, by attacks and by chance.

    A row per optimizer, step, kind (attack, held-out images, Gaussians), objective, weights, radius and believed
    offset: means over sets of images of the shares within 10, 25 and 50 % of the image's norm, with Student's 95 %
    half widths.
    """
    keys = ("optimizer", "step", "kind", "objective", "weights", "radius", "offset")
    groups: dict[tuple[Any, ...], dict[int, list[TableRow]]] = defaultdict(lambda: defaultdict(list))
    for row in attack:
        if row["kind"] in ("attack", "heldout", "gaussian"):
            groups[*(row.get(k) for k in keys), row["candidates"]][row["data_set"]].append(row)
    sizes = {key[-1] for key in groups if key[2] == "attack"}
    out = []
    for (*values, count), sets in groups.items():
        # The pool of all grid points has baselines of its own, which no single attack compares with.
        if count not in sizes:
            continue
        row: TableRow = {**dict(zip(keys, values)), "candidates": count, "data_sets": len(sets)}
        for name in ("hits_10", "hits_25", "hits_50"):
            mean, half = interval([float(np.mean([r[name] for r in group])) for group in sets.values()])
            row |= {name: mean, f"half_width_{name}": half}
        out.append(row)
    return out


def true_residual(task: str, network: Network, x: Tensor, labels: Tensor, alpha: float) -> float:
    """Return K of the training set itself at the same smoothing with the best λ: what recovery would look like.

    As the attack has it, an image has one multiplier, for its least margin, however many classes there are.
    """
    return multipliers.fit(task, network, x, labels, smoothed(alpha), only_strongest=True).residual ** 2


def oracle(target: Target, alpha: float, lambda_init: float, seed: int) -> tuple[GridPoint, InitialValues]:
    """Return an attack that starts at the training images with random λ: the practical ceiling.

    It drifts off, because for finitely trained weights the truth is not a minimizer of the smoothed objective.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(target.x)
    lambdas = lambda_init * torch.rand(n, generator=generator, dtype=torch.float64)
    point = GridPoint(alpha, ORACLE_LAMBDA_MIN, lambda_init, 1.0, n, ORACLE_LR, seed)
    return point, InitialValues(target.x, target.labels, lambdas)
