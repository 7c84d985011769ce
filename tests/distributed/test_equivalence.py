"""One process, two processes and accumulation train the same weights, for every optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.loop import Run
from tests.distributed.pool import RankPool
from tests.harness.running import small, train_weights, update_error, write_documents

# fp32 rounding of a few hundred summed products, amplified by the first steps of Adam (sign-like: an element of
# the gradient near eps = 1e-8 turns with its rounding) and by the polar factor (condition number of the moment).
# Measured: 2e-6 to 2e-5. Wrong weighting of tokens moves the weights by 1e-2 and more, as the control below shows.
TOLERANCE = 1e-4

OPTIMIZERS = {
    "adamw": ("optimizer=adamw", "optimizer.lr=0.003"),
    # bf16 Newton–Schulz rounds by 3 % whatever the order of summation; fp32 shows that the rest is equal.
    "muon": ("optimizer=muon", "optimizer.lr=0.01", "optimizer.orthogonalizer_dtype=float32"),
    "galore": ("optimizer=galore", "optimizer.lr=0.01", "optimizer.rank=8"),
    "sumo": ("optimizer=sumo", "optimizer.lr=0.003", "optimizer.rank=8"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text"))


def _ranked(
    rank: int, overrides: list[str], wrong: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return train_weights(overrides, change=_mean_per_rank if wrong else None)


def _mean_per_rank(run: Run) -> None:
    """The wrong variant: every process divides by its own tokens, and the means are averaged."""
    loader: Any = run.loader
    share, rank, world = (
        run.config.batch_size // run.engine.world_size,
        run.engine.rank,
        run.engine.world_size,
    )

    def own_tokens(step: int) -> int:
        return loader._samples.loss_tokens(step * run.config.batch_size + rank * share, share) * world

    loader.loss_tokens = own_tokens


QUICK = {("sumo", "padded"), ("galore", "packed"), ("muon", "padded"), ("adamw", "packed")}
"""Every rule once, each way of the data twice; the other pairs are slow."""


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(name, mode, marks=[] if (name, mode) in QUICK else pytest.mark.slow)
        for name in OPTIMIZERS
        for mode in ("packed", "padded")
    ],
)
def test_one_process_equals_two_equals_accumulation(
    name: str, mode: str, corpus: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    chosen = (*OPTIMIZERS[name], f"data.mode={mode}")
    alone = train_weights(small(corpus, tmp_path, *chosen))
    accumulated = train_weights(small(corpus, tmp_path, *chosen, "micro_batch_size=2"))
    pair = two_ranks.run(
        _ranked, small(corpus, tmp_path, *chosen, "world_size=2", "micro_batch_size=2"), False
    )
    assert update_error(alone, accumulated) < TOLERANCE
    assert update_error(alone, pair[0]) < TOLERANCE
    for parameter, weights in pair[0][1].items():
        assert torch.equal(weights, pair[1][1][parameter]), f"replicas differ in {parameter}"


def test_control_mean_of_per_rank_means_is_caught(corpus: Path, tmp_path: Path, two_ranks: RankPool) -> None:
    chosen = (*OPTIMIZERS["sumo"], "data.mode=padded")
    alone = train_weights(small(corpus, tmp_path, *chosen))
    pair = two_ranks.run(_ranked, small(corpus, tmp_path, *chosen, "world_size=2"), True)
    assert update_error(alone, pair[0]) > 10 * TOLERANCE


def test_initialization_does_not_depend_on_the_world(
    corpus: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    overrides = small(corpus, tmp_path, "steps=1")
    alone, _ = train_weights(overrides)
    pair = two_ranks.run(_ranked, small(corpus, tmp_path, "steps=1", "world_size=2"), False)
    for before, _ in pair:
        assert all(torch.equal(alone[name], weights) for name, weights in before.items())
