"""Validation with an average of the weights: what is measured, on every engine, and that training goes on untouched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

import optimizers
from harness.probes.validation import averaged_weights, evaluate
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
        from harness.probes.validation import TokenLoss

        step, measure = run.optimizer.step, TokenLoss.figures

        def stepped(*args: Any) -> None:
            step(*args)
            path.append({name: p.detach().double().clone() for name, p in run.model.named_parameters()})

        def own(self: Any, *, is_last: bool) -> dict[str, float]:
            if len(losses) == 0 and len(path) == 4:
                shares = [(1 - BETA) * BETA ** (3 - i) / (1 - BETA**4) for i in range(4)]
                kept = {name: p.detach().clone() for name, p in run.model.named_parameters()}
                with torch.no_grad():
                    for name, p in run.model.named_parameters():
                        p.copy_(sum(share * weights[name] for share, weights in zip(shares, path)))
                    losses.append(measure(self, is_last=True)["val/loss"])
                    for name, p in run.model.named_parameters():
                        p.copy_(kept[name])
            return measure(self, is_last=is_last)

        run.optimizer.step = stepped
        patch.setattr(TokenLoss, "figures", own)

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
    # The raw loss costs a second pass: only the last evaluation makes it.
    assert found.rows[-1]["val/raw_loss"] == bare.rows[-1]["val/loss"]
    assert not any("val/raw_loss" in row for row in found.rows[:-1])
    assert [row["train/loss"] for row in found.rows] == [row["train/loss"] for row in bare.rows]
    assert all(torch.equal(found.after[name], weight) for name, weight in bare.after.items())
    alone = trained(0, small(corpus, tmp_path, *RULE, AVERAGE))
    # The first average is the weight itself; afterwards it lags behind.
    assert found.rows[0]["val/loss"] == pytest.approx(bare.rows[0]["val/loss"], rel=1e-6)
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for mine, theirs, raw in zip(alone.rows, found.rows, bare.rows, strict=True):
        assert theirs["val/loss"] == pytest.approx(mine["val/loss"], rel=tolerance)
        if mine["step"] > 1:
            assert abs(theirs["val/loss"] - raw["val/loss"]) > 1e-3


def test_blocks_that_stay_gathered_do_not_hide_the_average(
    corpus: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    """The raw pass gathers the blocks; the pass over the averages has to gather them anew."""
    words = small(corpus, tmp_path, *RULE, AVERAGE, "engine=fsdp2", "world_size=2")
    usual, gathered = (
        two_ranks.run(_ranked, [*words, f"engine.reshard_after_forward={word}"])[0].rows[-1]
        for word in ("true", "false")
    )
    assert gathered["val/raw_loss"] == usual["val/raw_loss"]
    assert gathered["val/loss"] == usual["val/loss"]
    assert abs(usual["val/raw_loss"] - usual["val/loss"]) > 1e-3


class _Failing:
    """An engine with a copy of the weights to compute with, whose forward pass fails under the averages."""

    world_size, rank, device = 1, 0, torch.device("cpu")

    def __init__(self, weight: torch.nn.Parameter) -> None:
        self.weight, self.copy = weight, weight.detach().clone()

    def sync_from_masters(self) -> None:
        self.copy.copy_(self.weight.detach())

    @contextmanager
    def inference(self) -> Iterator[Any]:
        def fail(**_: Any) -> None:
            assert not torch.equal(self.copy, RAW)
            raise RuntimeError("no memory")

        yield fail

    def autocast(self) -> Any:
        return nullcontext()


RAW = torch.eye(4) * 2


def test_a_failure_under_the_averages_leaves_the_weights() -> None:
    weight = torch.nn.Parameter(torch.eye(4))
    optimizer: Any = optimizers.build("adamw", [("w", weight)], lr=0.1, average_decay=0.5)
    for _ in range(2):
        weight.grad = torch.ones(4, 4)
        optimizer.step()
    with torch.no_grad():
        weight.copy_(RAW)
    engine, model = _Failing(weight), torch.nn.Dropout()
    run: Any = SimpleNamespace(optimizer=optimizer, engine=engine)
    stand_in: Any = SimpleNamespace(rows=lambda *_: None, inputs=lambda _: {})
    with pytest.raises(RuntimeError, match="no memory"), averaged_weights(run):
        evaluate(cast("Any", engine), model, stand_in, stand_in, rows=1, micro_batch_size=1)
    assert model.training
    assert torch.equal(weight, RAW)
    assert torch.equal(engine.copy, RAW)
