"""What a score means: the same figures for images that no attack found, and the true set's own residual."""

from __future__ import annotations

import torch
from torch import Tensor

from analysis.reconstruction import attack, multipliers
from analysis.reconstruction.attack import Point, Prior, Settings, Start
from analysis.reconstruction.network import Network, smoothed
from analysis.reconstruction.scoring import Score, Target, score

ORACLE_LAMBDA_MIN = 1e-3
ORACLE_LR = 0.005


def heldout(
    target: Target, pool: Tensor, pool_labels: Tensor, labels: Tensor, draws: int, seed: int
) -> list[Score]:
    """Scores of public images that were not trained on, drawn with the candidates' labels (m,), `draws` times.

    More candidates are nearer by chance alone, so their number must be the attack's.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(draws):
        chosen = torch.empty(len(labels), dtype=torch.long)
        for label in labels.unique():
            members = (pool_labels == label).nonzero()[:, 0]
            wanted = labels == label
            count = int(wanted.sum())
            # A pool that is smaller than the number of candidates is gone through more than once.
            rounds = -(-count // len(members))
            order = torch.cat([torch.randperm(len(members), generator=generator) for _ in range(rounds)])
            chosen[wanted] = members[order[:count]]
        found.append(score(target, pool[chosen], labels)[0])
    return found


def gaussians(target: Target, labels: Tensor, typical_norm: float, draws: int, seed: int) -> list[Score]:
    """Scores of random directions at the images' typical norm."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(labels), target.x.shape[1])
    found = []
    for _ in range(draws):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        found.append(score(target, x / x.norm(dim=1, keepdim=True) * typical_norm, labels)[0])
    return found


def pair_means(target: Target, count: int, draws: int, seed: int) -> list[Score]:
    """Scores of means of two training images of one class: knowing averages, not images."""
    generator = torch.Generator().manual_seed(seed)
    values = target.labels.unique()
    found = []
    for _ in range(draws):
        rows, labels = [], []
        for i in range(count):
            label = values[i % len(values)]
            members = (target.labels == label).nonzero()[:, 0]
            pair = members[torch.randperm(len(members), generator=generator)[:2]]
            rows.append(target.x[pair].mean(0))
            labels.append(label)
        found.append(score(target, torch.stack(rows), torch.stack(labels))[0])
    return found


def true_residual(task: str, network: Network, x: Tensor, labels: Tensor, alpha: float) -> float:
    """K of the training set itself at the same smoothing, with the best λ: what recovery would look like."""
    return multipliers.fit(task, network, x, labels, smoothed(alpha)).residual ** 2


def oracle(
    target: Target, prior: Prior, settings: Settings, alpha: float, lambda_init: float, seed: int
) -> attack.Candidates:
    """The attack started at the training images with random λ: the practical ceiling.

    It drifts off, because for finitely trained weights the truth is no minimizer of the smoothed objective.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(target.x)
    lambdas = lambda_init * torch.rand(n, generator=generator, dtype=torch.float64)
    point = Point(alpha, ORACLE_LAMBDA_MIN, lambda_init, 1.0, n, ORACLE_LR, seed)
    (found,) = attack.run(target.network, prior, [point], settings, Start(target.x, target.labels, lambdas))
    return found
