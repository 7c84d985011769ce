"""How much nearer than unrelated images an attack comes, by optimizer and training step, and the baselines for it.

A score means little alone: the same figures are computed for held-out images, random directions and class means,
and the training set's own residual tells what recovery would look like.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from analysis.reconstruction import attack, multipliers
from analysis.reconstruction.attack import AttackPrior, AttackSettings, GridPoint, InitialValues
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


def rows(attack: Sequence[TableRow]) -> list[TableRow]:
    """Return a row per optimizer, step, objective and attacker's radius, from the rows of the table `attack`.

    Of the grid points of one victim and initial value, the attacker's own criterion (least K, or greatest
    alignment) chooses; the training images do not. Advantage = (held out − attack)/held out for distances, and
    (attack − held out)/(1 − held out) for NCC: 0 is chance, 1 is the image itself. The interval is Student's, 95 %,
    over victims' seeds; None for one seed. `beats_truth`: share of attacks that fit the weights better than the
    training images themselves, by the objective.
    """
    chance: dict[tuple[object, ...], TableRow] = {}
    groups: dict[tuple[object, ...], dict[int, dict[int, TableRow]]] = defaultdict(lambda: defaultdict(dict))
    for row in attack:
        where = (row["optimizer"], row["step"], row["seed"], row["candidates"])
        if row["kind"] == "heldout":
            chance[where] = row
        if row["kind"] == "attack":
            key = (row["optimizer"], row["step"], row["objective"], row["prior"], row["radius"])
            seeds = groups[key][row["seed"]]
            before = seeds.get(row["attack_seed"])
            if before is None or _is_better(row, before):
                seeds[row["attack_seed"]] = row
    return [row for key, by_seed in groups.items() if (row := _row(key, by_seed, chance)) is not None]


def _is_better(row: TableRow, than: TableRow) -> bool:
    if row["objective"] == "l2":
        return row["residual"] < than["residual"]
    return row["alignment"] > than["alignment"]


def _row(
    key: tuple[object, ...],
    by_seed: dict[int, dict[int, TableRow]],
    chance: dict[tuple[object, ...], TableRow],
) -> TableRow | None:
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
    out: TableRow = {
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
    """Return how far a value lies from chance to perfect: 0 is what held-out images get, 1 is the image itself."""
    if name.startswith("ncc"):
        return (value - chance) / (1 - chance)
    return (chance - value) / chance


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the half width of its 95 % Student interval; None for fewer than two values."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, float(student.ppf(0.975, len(values) - 1)) * error


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


def true_residual(task: str, network: Network, x: Tensor, labels: Tensor, alpha: float) -> float:
    """Return K of the training set itself at the same smoothing with the best λ: what recovery would look like."""
    return multipliers.fit(task, network, x, labels, smoothed(alpha)).residual ** 2


def oracle(
    target: Target, prior: AttackPrior, settings: AttackSettings, alpha: float, lambda_init: float, seed: int
) -> attack.Candidates:
    """Run the attack from the training images with random λ: the practical ceiling.

    It drifts off, because for finitely trained weights the truth is not a minimizer of the smoothed objective.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(target.x)
    lambdas = lambda_init * torch.rand(n, generator=generator, dtype=torch.float64)
    point = GridPoint(alpha, ORACLE_LAMBDA_MIN, lambda_init, 1.0, n, ORACLE_LR, seed)
    (candidates,) = attack.run(
        target.network, prior, [point], settings, InitialValues(target.x, target.labels, lambdas)
    )
    return candidates
