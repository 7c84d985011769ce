"""The loop: clipping, non-finite steps, precisions, stop flags, and that it calls everything when it should."""

from __future__ import annotations

import gc
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import engines
from harness.loop import Callbacks, Run, set_lr, train
from harness.preparation import prepare
from harness.run import assemble
from tests.distributed.pool import RankPool
from tests.harness.running import small, train_weights, trained, update_error, write_documents


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text"))


def _run(overrides: list[str]) -> Run:
    prepared = prepare(overrides, say=lambda text: None, worker=True, writes_folder=False)
    run = assemble(prepared, engines.start(prepared.config))
    run.stop.restore()
    return run


def _poison(run: Run, at: int) -> None:
    """Make the gradient of one parameter NaN in one step, after the backward pass."""
    engine: Any = run.engine
    clip, count = engine.clip, iter(range(10**6))

    def poisoned(max_norm: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        if next(count) == at:
            gradient = next(p for p in run.model.parameters() if p.ndim == 2 and p.grad is not None).grad
            assert gradient is not None
            gradient[0, 0] = math.nan
        return clip(max_norm)

    engine.clip = poisoned


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "galore", "sumo"])
def test_a_step_with_a_nan_gradient_leaves_everything_as_it_was(
    optimizer: str, corpus: Path, tmp_path: Path
) -> None:
    words = [
        "steps=1",
        f"optimizer={optimizer}",
        "optimizer.lr=0.01",
        "schedule=constant",
        "schedule.warmup=0",
    ]
    run = _run(small(corpus, tmp_path, *words))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    _poison(run, at=0)
    assert train(run, Callbacks()) == "finished"
    assert run.state.skipped == 1
    for name, p in run.model.named_parameters():
        assert torch.equal(before[name], p), name
    for state in run.optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                assert not value.any()
            else:
                assert value == 0


def test_control_a_nan_that_is_not_skipped_reaches_the_weights(corpus: Path, tmp_path: Path) -> None:
    run = _run(small(corpus, tmp_path, "steps=1", "optimizer=sumo", "optimizer.lr=0.01"))
    _poison(run, at=0)
    engine: Any = run.engine
    update = engine.update
    engine.update = lambda nonfinite: update(torch.zeros_like(nonfinite))
    train(run, Callbacks())
    assert not all(torch.isfinite(p).all() for p in run.model.parameters())


def _poisoned_rank(rank: int, overrides: list[str]) -> tuple[int, dict[str, torch.Tensor]]:
    run = _run(overrides)
    forward = run.engine.backward
    count = iter(range(10**6))

    def backward(loss: torch.Tensor) -> None:
        forward(loss * (math.nan if rank == 1 and next(count) == 1 else 1.0))

    run.engine.backward = backward
    assert train(run, Callbacks()) == "finished"
    return run.state.skipped, {name: p.detach().clone() for name, p in run.model.named_parameters()}


def test_a_nan_on_one_rank_masks_the_step_on_all(corpus: Path, tmp_path: Path, two_ranks: RankPool) -> None:
    words = small(
        corpus, tmp_path, "world_size=2", "optimizer=sumo", "optimizer.lr=0.003", "optimizer.rank=8"
    )
    (skipped, weights), (skipped_too, others) = two_ranks.run(_poisoned_rank, words)
    assert (skipped, skipped_too) == (1, 1)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_clipping_scales_the_gradient_and_logs_the_raw_norm(corpus: Path, tmp_path: Path) -> None:
    run = _run(small(corpus, tmp_path, "steps=1"))
    for p in run.model.parameters():
        p.grad = torch.ones_like(p)
    count = sum(p.numel() for p in run.model.parameters())
    engine: Any = run.engine
    norm, nonfinite = engine.clip(0.5)
    assert norm.item() == pytest.approx(math.sqrt(count), rel=1e-6)
    assert nonfinite.item() == 0.0
    clipped = torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])
    assert clipped.norm().item() == pytest.approx(0.5, rel=1e-4)  # the factor is max_norm / (norm + 1e-6)
    engine.clip(10.0)
    unclipped = torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])
    assert torch.equal(unclipped, clipped)


def test_learning_rates_follow_the_schedule_except_where_they_are_fixed() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD(
        [{"params": weights[:1], "lr": 0.4}, {"params": weights[1:], "lr": 0.1, "scheduled": False}]
    )
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]


# Weights of two runs differ by the rounding of the arithmetic: 8 bits of bf16, 11 of fp16 in each product, on a
# gradient that Adam's first steps normalize; pure bf16 also rounds the weights (2^-9 relative).
@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.3), ("fp16", 0.1), ("bf16_pure", 1.0)])
def test_precisions_train_close_to_fp32(precision: str, bound: float, corpus: Path, tmp_path: Path) -> None:
    words = ["optimizer=sumo", "optimizer.lr=0.003", "optimizer.rank=8", "steps=4"]
    exact = train_weights(small(corpus, tmp_path, *words))
    other = train_weights(small(corpus, tmp_path, *words, f"precision={precision}"))
    dtype = torch.bfloat16 if precision == "bf16_pure" else torch.float32
    assert all(weights.dtype == dtype for weights in other[1].values())
    assert 0 < update_error(exact, other) < bound


def test_fp16_overflow_skips_and_lowers_the_scale(corpus: Path, tmp_path: Path) -> None:
    run = _run(
        small(corpus, tmp_path, "precision=fp16", "optimizer=sumo", "optimizer.rank=8", "optimizer.lr=0.003")
    )
    scaler = run.engine._scaler  # pyright: ignore[reportAttributeAccessIssue]
    scaler._init_scale = 2.0**40  # far beyond fp16's 65504: the first backward passes must overflow
    assert train(run, Callbacks()) == "finished"
    assert run.state.skipped >= 1
    assert scaler.get_scale() < 2.0**40
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


@pytest.mark.slow  # the compiler takes most of a minute
def test_compiled_model_trains_the_same_weights(corpus: Path, tmp_path: Path) -> None:
    words = ["steps=2", "optimizer.lr=0.003"]
    eager = train_weights(small(corpus, tmp_path, *words))
    compiled = train_weights(small(corpus, tmp_path, *words, "model.compile=true"))
    # Inductor fuses and reorders fp32 sums; Adam's first, sign-like steps amplify that in elements near its eps.
    assert update_error(eager, compiled) < 1e-3


def test_rows_come_when_a_probe_is_due(corpus: Path, tmp_path: Path) -> None:
    rows = trained(
        0, small(corpus, tmp_path, "steps=9", "log_every=4", "eval.every=6", "moments.every=null")
    ).rows
    assert [row["step"] for row in rows] == [1, 4, 6, 8, 9]
    assert [row["step"] for row in rows if "val/loss" in row] == [6, 9]
    assert not any("moments/condition_number/median" in row for row in rows)
    assert [row["tokens"] for row in rows] == [row["step"] * 8 * 32 for row in rows if row["step"]]
    for row in rows:
        parts = sum(value for key, value in row.items() if key.startswith("time/") and value is not None)
        assert parts > 0


def test_the_same_words_give_the_same_losses(corpus: Path, tmp_path: Path) -> None:
    losses = []
    for _ in range(2):
        rows = trained(0, small(corpus, tmp_path, "steps=3", "log_every=1", "optimizer=muon")).rows
        losses.append([row["train/loss"] for row in rows])
    assert losses[0] == losses[1]
    rows = trained(0, small(corpus, tmp_path, "steps=3", "log_every=1", "optimizer=muon", "seed=1")).rows
    assert [row["train/loss"] for row in rows] != losses[0]


def test_a_plug_in_by_import_path_trains(corpus: Path, tmp_path: Path) -> None:
    words = ["optimizer.target=torch.optim.Adagrad", "optimizer.lr=0.01", "optimizer.eps=1e-8"]
    before, after = train_weights(small(corpus, tmp_path, *words))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_stop_vote_ends_the_run_on_the_next_step(corpus: Path, tmp_path: Path) -> None:
    run = _run(small(corpus, tmp_path, "steps=50"))
    run.stop.signal = signal.SIGTERM
    assert train(run, Callbacks()) == "interrupted"
    assert run.state.step == 1


def test_probes_come_every_so_many_steps(corpus: Path, tmp_path: Path) -> None:
    words = ["steps=8", "log_every=8", "eval.every=null", "moments.every=3", "optimizer=muon"]
    rows = trained(0, small(corpus, tmp_path, *words)).rows
    assert [row["step"] for row in rows if "moments/condition_number/median" in row] == [1, 3, 6, 8]


@pytest.mark.parametrize("optimizer", ["adamw", "sumo"])
def test_no_step_leaves_tensors_to_the_collector_of_cycles(
    optimizer: str, corpus: Path, tmp_path: Path
) -> None:
    """The loop collects every 50 steps only: tensors in cycles would be held until then."""
    steps = 12
    run = _run(small(corpus, tmp_path, f"steps={steps}", f"optimizer={optimizer}", "optimizer.lr=0.01"))
    held: list[int] = []

    class Observer:
        problem = ""

        def step(self) -> None:
            held.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))

    assert train(run, Callbacks(observer=Observer())) == "finished"
    # The first steps make the optimizer's state; samples that are read ahead come and go.
    assert held[-1] - held[2] < steps - 3, held
