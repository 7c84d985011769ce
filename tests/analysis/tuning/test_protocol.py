"""Why only fresh seeds are compared: studies of equally good optimizers, judged by the report's functions.

Every optimizer reaches the same lowest expected loss; they differ in how much they forgive. The forgiving one has five
settings that are as good as its best, the other one only a single one, the rest are clearly worse. So whatever names a
winner between them is wrong.
"""

from dataclasses import replace

import numpy as np
import pytest

from analysis.comparison import statistics
from analysis.comparison.statistics import ALPHA, Floats
from analysis.runs.tuning_ledger import Trial, select

STUDIES, TRIALS, SEEDS, SD = 4000, 5, 10, 0.01
FORGIVING = np.zeros(TRIALS)
DEMANDING = np.array([0.0, 1, 1, 1, 1])
MOST = ALPHA + 3 * (ALPHA * (1 - ALPHA) / STUDIES) ** 0.5
"""What a share of ALPHA does not exceed, three standard errors of it included."""


def chosen(losses: Floats) -> int:
    """Index of the setting that a study chooses by these losses."""
    trials = [
        Trial(n, {"lr": float(n)}, "finished", "", float(loss), 1.0, f"t{n}", f"i{n}")
        for n, loss in enumerate(losses, 1)
    ]
    found = select(trials)
    assert found is not None
    return found.number - 1


def named_winners(expected: list[Floats], *, fresh: bool) -> float:
    """Share of studies in which a winner is named.

    Args:
        expected: loss of every setting of every optimizer, shape (trials,) each.
        fresh: compare new runs of the chosen setting; else the very losses by whose mean it was chosen.
    """
    rng = np.random.default_rng(0)
    compared = np.empty((STUDIES, len(expected), SEEDS))
    for study in range(STUDIES):
        for arm, loss in enumerate(expected):
            runs = loss[:, None] + rng.normal(0, SD, (len(loss), SEEDS))
            index = chosen(runs.mean(1))
            compared[study, arm] = loss[index] + rng.normal(0, SD, SEEDS) if fresh else runs[index]
    tests = statistics.pairwise(compared)
    return float((statistics.winners(tests, len(expected)) >= 0).mean())


def test_fresh_seeds_name_no_winner_more_often_than_they_may() -> None:
    for other in (FORGIVING, DEMANDING):
        assert named_winners([FORGIVING, other], fresh=True) <= MOST


def test_the_trials_themselves_name_winners_among_equals() -> None:
    """Negative control: with equal budgets, too, as soon as one of the two forgives more."""
    assert named_winners([FORGIVING, DEMANDING], fresh=False) > MOST


def test_unequal_budgets_name_winners_on_the_trials_and_fresh_seeds_undo_it() -> None:
    """Negative control: the same optimizer twice, twenty trials against one."""
    budgets = [np.zeros(20), np.zeros(1)]
    assert named_winners(budgets, fresh=False) > 3 * ALPHA
    assert named_winners(budgets, fresh=True) <= MOST


def test_the_best_of_noisy_trials_is_lower_than_what_its_setting_gives() -> None:
    """Of five equal normal losses the smallest lies 1.163 standard deviations below the mean (Tippett 1925)."""
    rng = np.random.default_rng(1)
    losses = rng.normal(0, SD, (STUDIES, TRIALS))
    lowest = np.array([row[chosen(row)] for row in losses])
    assert lowest.mean() / SD == pytest.approx(-1.163, abs=0.05)


def test_the_metric_selects_the_highest_score_and_ties_go_to_the_earlier_trial() -> None:
    """Losses and accuracies disagree: loss would select the second trial."""
    trials = [
        Trial(number, {"lr": 0.1}, "finished", "", loss, 1.0, "", "", score=score)
        for number, (loss, score) in enumerate([(0.5, 0.8), (0.4, 0.7), (0.6, 0.8)], 1)
    ]
    assert select(trials) is trials[0]
    assert select([replace(trial, score=None) for trial in trials]) == replace(trials[1], score=None)
    assert select([replace(trials[0], score=float("nan"))]) is None
