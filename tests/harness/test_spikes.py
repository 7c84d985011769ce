"""A step whose loss jumps is left out, on every process and engine; without the guard it is not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from harness.config import compose
from harness.config.identity import identity
from harness.engines.skip_step import set_nonfinite
from tests.harness.running import small, trained, write_documents

if TYPE_CHECKING:
    from tests.distributed.pool import RankPool

BAD_STEP = 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text"))


def spoil(run: Any) -> None:
    """One batch whose labels are all the same rare token: its loss is far above the others'."""
    give = run.loader.micro_batches

    def step(number: int) -> list[Any]:
        batches = give(number)
        return (
            [(ids, torch.full_like(labels, 1)) for ids, labels in batches] if number == BAD_STEP else batches
        )

    run.loader.micro_batches = step


def spoiled(rank: int, words: list[str]) -> Any:
    return trained(rank, words, spoil)


WORDS = [
    "steps=8",
    "optimizer=adamw",
    "optimizer.lr=0.02",
    "log_every=1",
    "schedule=constant",
    "schedule.warmup=0",
]


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp2", "zero1", "zero3"])
def test_a_bad_batch_is_skipped_and_counted(
    engine: str, corpus: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    world = 1 if engine == "single" else 2
    words = small(corpus, tmp_path, *WORDS, f"world_size={world}", f"engine={engine}", "max_loss_rise=1.0")
    results = [spoiled(0, words)] if world == 1 else two_ranks.run(spoiled, words)
    for done in results:
        assert done.skipped == 1
    rows = results[0].rows
    assert [row["skipped_steps"] for row in rows] == [0] * BAD_STEP + [1] * (8 - BAD_STEP)
    assert rows[BAD_STEP]["train/loss"] > rows[BAD_STEP - 1]["train/loss"] + 1.0
    assert rows[BAD_STEP + 1]["train/loss"] < rows[BAD_STEP - 1]["train/loss"] + 0.1


def test_control_without_the_guard_it_is_trained_on(corpus: Path, tmp_path: Path) -> None:
    done = spoiled(0, small(corpus, tmp_path, *WORDS))
    guarded = spoiled(0, small(corpus, tmp_path, *WORDS, "max_loss_rise=1.0"))
    assert done.skipped == 0
    assert any(not torch.equal(done.after[name], guarded.after[name]) for name in done.after)


def test_a_loss_that_falls_is_no_spike(corpus: Path, tmp_path: Path) -> None:
    done = trained(0, small(corpus, tmp_path, *WORDS[1:], "steps=20", "max_loss_rise=0.5"))
    assert done.skipped == 0


def test_the_guard_is_part_of_a_run_s_identity_where_it_is_on() -> None:
    off, on, same = (
        identity(compose.load(words), "corpus", "tokenizer")
        for words in (["steps=3"], ["steps=3", "max_loss_rise=1.0"], ["steps=3", "max_loss_rise=null"])
    )
    assert on != off == same


@pytest.mark.parametrize("where", [True, False])
def test_a_gradient_is_voided_whatever_its_strides(where: bool) -> None:
    """Columns of a shard are not contiguous memory; an empty shard has no first element."""
    whole = torch.ones(4, 6)
    gradients = [whole[:, 2:4], torch.empty(0, 3), torch.ones(()), torch.ones(5, dtype=torch.bfloat16)]
    set_nonfinite(gradients, torch.tensor(where))
    assert [bool(g.isfinite().all()) for g in gradients] == [not where, True, not where, not where]
    assert int(whole.isfinite().sum()) == 24 - where
