"""Validation with an average of the weights: what is measured, on every engine, and that training goes on untouched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.harness.running import Trained, small, train_weights, trained, write_documents

if TYPE_CHECKING:
    from tests.distributed.pool import RankPool

BETA = 0.6
RULE = ("optimizer=sumo", "optimizer.rank=8", "optimizer.lr=0.02")
AVERAGE = f"optimizer.average_decay={BETA}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text"))


def _ranked(rank: int, words: list[str]) -> Trained:
    return trained(rank, words)


class _Rows:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


def test_the_loss_is_that_of_the_averaged_weights(corpus: Path, tmp_path: Path) -> None:
    """The average is formed here, from the weights after each step, and put into the model by hand."""
    path: list[dict[str, torch.Tensor]] = []
    losses: list[float] = []

    def watch(run: Any) -> None:
        from harness.probes.validation import Evaluation

        step, measure = run.optimizer.step, Evaluation._loss

        def stepped(*args: Any) -> None:
            step(*args)
            path.append({name: p.detach().double().clone() for name, p in run.model.named_parameters()})

        def own(self: Any) -> float:
            if len(losses) == 0 and len(path) == 4:
                shares = [(1 - BETA) * BETA ** (3 - i) / (1 - BETA**4) for i in range(4)]
                kept = {name: p.detach().clone() for name, p in run.model.named_parameters()}
                with torch.no_grad():
                    for name, p in run.model.named_parameters():
                        p.copy_(sum(share * weights[name] for share, weights in zip(shares, path)))
                    losses.append(measure(self))
                    for name, p in run.model.named_parameters():
                        p.copy_(kept[name])
            return measure(self)

        run.optimizer.step = stepped
        patch.setattr(Evaluation, "_loss", own)

    patch, sink = pytest.MonkeyPatch(), _Rows()
    try:
        train_weights(small(corpus, tmp_path, *RULE, AVERAGE), change=watch, sinks=[sink])
    finally:
        patch.undo()
    last = sink.rows[-1]
    assert last["val/loss"] == pytest.approx(losses[0], rel=1e-6)
    assert abs(last["val/raw_loss"] - last["val/loss"]) > 1e-3


QUICK = [("fsdp2", "fp32"), ("zero1", "bf16")]
OTHERS = [("ddp", "fp32"), ("fsdp2", "bf16_pure"), ("zero3", "bf16"), ("zero3", "fp32")]
CELLS = [*QUICK, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in OTHERS)]


@pytest.mark.parametrize(("engine", "precision"), CELLS)
def test_training_does_not_notice_it(
    engine: str, precision: str, corpus: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    """Raw losses, weights and training losses are bit by bit those of the run without an average."""
    words = small(corpus, tmp_path, *RULE, f"engine={engine}", f"precision={precision}", "world_size=2")
    bare = two_ranks.run(_ranked, words)[0]
    found = two_ranks.run(_ranked, [*words, AVERAGE])[0]
    assert [row["val/raw_loss"] for row in found.rows] == [row["val/loss"] for row in bare.rows]
    assert [row["train/loss"] for row in found.rows] == [row["train/loss"] for row in bare.rows]
    assert all(torch.equal(found.after[name], weight) for name, weight in bare.after.items())
    alone = trained(0, small(corpus, tmp_path, *RULE, AVERAGE))
    # The first average is the weight itself; afterwards it lags behind.
    assert found.rows[0]["val/loss"] == pytest.approx(found.rows[0]["val/raw_loss"], rel=1e-6)
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for mine, theirs in zip(alone.rows, found.rows, strict=True):
        assert theirs["val/loss"] == pytest.approx(mine["val/loss"], rel=tolerance)
        if mine["step"] > 1:
            assert abs(mine["val/loss"] - mine["val/raw_loss"]) > 1e-3
