"""Another package's optimizer by import path: SOAP of pytorch_optimizer, in the harness's own training path."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.pool import RankPool
from tests.harness.running import small, train_weights, update_error, write_documents

pytestmark = pytest.mark.skipif(
    find_spec("pytorch_optimizer") is None, reason="pytorch_optimizer is not installed (extra: oracles)"
)

SOAP = (
    "optimizer.target=pytorch_optimizer.SOAP",
    "optimizer.lr=0.01",
    "optimizer.precondition_frequency=5",
    "schedule.warmup=0",
    "log_every=1",
    "moments.every=null",
)
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text"))


class Rows:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


def soap(rank: int, words: list[str]) -> tuple[Weights, Weights, list[float], list[float], str, set[str]]:
    """Weights before and after, training and validation losses, the optimizer's class, and its kinds of state."""
    rows = Rows()
    optimizers: list[torch.optim.Optimizer] = []

    def watch(run: Any) -> None:
        optimizers.append(run.optimizer)

    before, after = train_weights(words, change=watch, sinks=[rows])
    kinds = {kind for state in optimizers[0].state.values() for kind in state}
    train, validation = ([r[k] for r in rows.rows if k in r] for k in ("train/loss", "val/loss"))
    return before, after, train, validation, type(optimizers[0]).__module__, kinds


def test_soap_trains(corpus: Path, tmp_path: Path) -> None:
    before, after, train, validation, module, kinds = soap(0, small(corpus, tmp_path, *SOAP, "steps=30"))
    assert module.startswith("pytorch_optimizer.")
    assert {"GG", "Q"} <= kinds  # its preconditioners and their eigenbases: this is not an Adam
    assert len(train) == 30
    assert all(math.isfinite(loss) for loss in train + validation)
    # ln 512 = 6.24 nats is a uniform guess; the unigram entropy of the corpus lies about one nat below.
    assert validation[-1] < validation[0] - 0.5
    assert all(not torch.equal(before[name], after[name]) for name in after)


# The gradient of the 512 embeddings has rank 32: in the 480 empty directions an eigenbasis is arbitrary, and Adam in it
# makes full steps out of rounding (two equal runs then end 0.8 apart; 0.07 where only a renewed basis reorders its
# columns). With the long side left alone and one basis for the whole run, SOAP amplifies the rounding of a sum in
# another order in 8 steps to 7e-5 on one CPU and to 0.4 on another (AMX).
STABLE = ("optimizer.max_precondition_dim=64", "optimizer.precondition_frequency=100")
TOLERANCE = 1e-3


def test_two_processes_train_what_one_trains(corpus: Path, tmp_path: Path, two_ranks: RankPool) -> None:
    words = small(corpus, tmp_path, *SOAP[:2], *SOAP[3:], *STABLE, "steps=8")
    # Micro-batches of the samples that one of two processes has: their sum is that of the processes, in the same order.
    alone = soap(0, [*words, "micro_batch_size=4"])
    first, second = two_ranks.run(soap, [*(w for w in words if w != "world_size=1"), "world_size=2"])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    assert update_error(alone[:2], first[:2]) < TOLERANCE
    # Negative control: what a batch cut in half without averaging over the processes would train.
    half = soap(0, [*(w for w in words if not w.startswith("batch_size=")), "batch_size=4"])
    assert update_error(alone[:2], half[:2]) > 100 * TOLERANCE
