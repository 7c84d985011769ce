"""Membership inference: can training rows be told from validation rows by a score, and how well.

Scores are higher for rows that look trained on: minus the mean loss (Yeom et al., CSF 2018), Min-K % (Shi et al.,
ICLR 2024: mean log-probability of the k % least likely tokens), and the loss of a reference model minus the loss
(Carlini et al., USENIX Security 2021).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from analysis.memorization.clusters import clustered_mean

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]
FALSE_POSITIVES = 0.01


class Separation(NamedTuple):
    """How well a score separates members.

    Attributes:
        auc: area under the ROC curve; 0.5: not at all.
        low, high: 95 % interval (variance over documents, on the logit scale); both are `auc` where that is 0 or 1, NaN
            where the rows of a group are of one document.
        tpr: share of members found at a false positive rate of at most 1 %.
    """

    auc: float
    low: float
    high: float
    tpr: float


def separation(
    members: Floats, others: Floats, member_documents: Ids | None = None, other_documents: Ids | None = None
) -> Separation:
    """Return how well a score tells members from others; fp64.

    The components of the variance are those of DeLong, DeLong and Clarke-Pearson (Biometrics 44 (1988) 837-845), from
    midranks; they are summed by document, since rows of a document resemble each other (Obuchowski, Biometrics 53
    (1997) 567-578).

    Args:
        members, others: scores of at least two rows each.
        member_documents, other_documents: document of each row; None: every row is of its own.
    """
    scores = np.concatenate([members, others])
    is_member = np.repeat([1, 0], [len(members), len(others)])
    auc = float(roc_auc_score(is_member, scores))
    positives, found, _ = roc_curve(is_member, scores, drop_intermediate=False)
    tpr = float(found[positives <= FALSE_POSITIVES].max())
    ranks = stats.rankdata(scores)
    # Share of the other class that each row beats, ties as halves.
    above = (ranks[: len(members)] - stats.rankdata(members)) / len(others)
    below = 1.0 - (ranks[len(members) :] - stats.rankdata(others)) / len(members)
    documents = [
        np.arange(len(part)) if given is None else given
        for part, given in ((above, member_documents), (below, other_documents))
    ]
    variance = sum(clustered_mean(part, given).variance for part, given in zip((above, below), documents))
    if not 0.0 < auc < 1.0:
        return Separation(auc, auc, auc, tpr)
    half = float(stats.norm.ppf(0.975)) * math.sqrt(variance) / (auc * (1.0 - auc))
    logit = math.log(auc / (1.0 - auc))
    return Separation(auc, _expit(logit - half), _expit(logit + half), tpr)


def min_k_scores(log_probs: Floats, share: float) -> Floats:
    """Return the mean of the lowest ``share`` of each row's token log-probabilities: (rows,) from (rows, tokens)."""
    count = max(1, round(share * log_probs.shape[1]))
    return np.partition(log_probs, count - 1, axis=1)[:, :count].mean(1)


def _expit(value: float) -> float:
    return float(1.0 / (1.0 + np.exp(-value)))
