"""Replicas that stop being equal are found, with their name; equal ones are not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from harness.config import compose
from harness.errors import InputError
from harness.probes import replicas
from tests.harness.running import small, trained, write_documents

if TYPE_CHECKING:
    from tests.distributed.pool import RankPool

WORDS = ["steps=4", "log_every=1", "eval.every=null", "engine.check_replicas_every=2"]


def nudge(run: Any) -> None:
    """Change the last bit of one weight of the last process, in the third step."""
    give = run.loader.micro_batches

    def step(number: int) -> Any:
        if number == 2 and run.engine.rank == run.engine.world_size - 1:
            weight = run.engine.parameter_layout().weight(list(run.engine.named_parameters().values())[1])
            weight.detach().view(-1)[:1].view(torch.int32).bitwise_xor_(1)
        return give(number)

    run.loader.micro_batches = step


def checked(rank: int, words: list[str], is_nudged: bool) -> tuple[list[Any], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = trained(rank, words, nudge if is_nudged else None).rows
    found = [str(w.message) for w in caught if "replicas of" in str(w.message)]
    return [row.get("replicas/differing") for row in rows], found


@pytest.mark.parametrize("is_nudged", [True, False])
def test_a_replica_that_drifts_is_named(is_nudged: bool, tmp_path: Path, two_ranks: RankPool) -> None:
    words = [*WORDS, "world_size=2", "engine=ddp"]
    (rows, found), (_, others) = two_ranks.run(
        checked, small(write_documents(tmp_path), tmp_path, *words), is_nudged
    )
    assert others == []
    if not is_nudged:
        # The other gradient reaches other parameters only in the fourth step, where it is the same for all.
        assert (rows, found) == ([None, 0, None, 0], [])
        return
    assert rows[:3] == [None, 0, None]
    assert rows[3] == 1
    assert len(found) == 1
    assert "step 4: the replicas of model.layers.0.self_attn.q_proj.weight are no longer equal" in found[0]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hsdp", "zero0", "fsdp2"])
def test_other_engines_with_and_without_replicas(engine: str, tmp_path: Path, two_ranks: RankPool) -> None:
    words = ["steps=4", "log_every=1", "eval.every=null", "world_size=2", f"engine={engine}"]
    if engine == "hsdp":
        words.append("engine.replicas=2")
    if engine != "fsdp2":
        words.append("engine.check_replicas_every=2")
    is_nudged = engine != "fsdp2"
    (rows, found), _ = two_ranks.run(checked, small(write_documents(tmp_path), tmp_path, *words), is_nudged)
    assert rows == ([None, 0, None, 1] if is_nudged else [None] * 4)
    assert len(found) == is_nudged


def test_one_process_has_no_replicas(tmp_path: Path) -> None:
    rows, found = checked(0, small(write_documents(tmp_path), tmp_path, *WORDS), False)
    assert (rows, found) == ([None] * 4, [])


def test_bits_are_summed_exactly_in_any_order_and_dtype() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8):
        tensor = (torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
        assert replicas.bit_sum(tensor) == replicas.bit_sum(tensor.flip(0))
        changed = tensor.clone()
        changed.view(torch.uint8)[0] ^= 1
        assert replicas.bit_sum(tensor) != replicas.bit_sum(changed)
    assert replicas.bit_sum(torch.empty(0, 3)) == 0
    columns = torch.randn(4, 6)[:, 1:3]
    assert replicas.bit_sum(columns) == replicas.bit_sum(columns.contiguous())


@pytest.mark.parametrize("value", ["0", "-1", "often"])
def test_bad_intervals_are_refused(value: str) -> None:
    with pytest.raises(InputError, match="check_replicas_every"):
        compose.load([f"engine.check_replicas_every={value}"])
