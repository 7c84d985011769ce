"""A profile of real steps names the optimizer's parts; memory that really runs out is explained by kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from harness.config import checks, compose
from harness.probes import memory
from tests.faults.checkpoints import status
from tests.faults.forked import trained
from tests.harness.running import small, write_documents


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_profile_names_the_parts_of_the_optimizer(ranks: int, corpus: Path, tmp_path: Path) -> None:
    words = [
        "steps=8",
        "optimizer=sumo",
        "optimizer.rank=8",
        "profile=true",
        f"world_size={ranks}",
        "name=run",
    ]
    codes = trained(small(corpus, tmp_path, *words), ranks, tmp_path / "said.txt")
    assert codes == [0] * ranks
    folder = tmp_path / "default" / "run" / "profile"
    table = (folder / "table.txt").read_text()
    assert "aten::mm" in table
    names = {event["name"] for event in json.loads((folder / "trace.json").read_text())["traceEvents"]}
    assert {"optimizer/sumo", "optimizer/adamw", "sumo/rule", "sumo/apply", "forward_backward"} <= names
    assert "profile of 3 steps" in (tmp_path / "said.txt").read_text()


def test_a_profile_that_the_disk_refuses_is_a_failure_and_the_run_is_finished_without_it(
    corpus: Path, tmp_path: Path
) -> None:
    """The limit is above a checkpoint's 500 kB and below a trace's megabytes; the library itself says nothing."""
    words = small(corpus, tmp_path, "steps=8", "profile=true", "name=run")
    limits = {"RLIMIT_FSIZE": 1_000_000}
    said = tmp_path / "said.txt"
    assert trained(words, 1, said, limits=limits) == [3], said.read_text()
    run = tmp_path / "default" / "run"
    assert "the profile could not be written" in status(run)["attempts"][-1]["reason"]
    assert not (run / "DONE").exists()
    assert trained(words, 1, said) == [0]
    assert "warning: no profile" in said.read_text()
    assert (run / "DONE").exists()


def test_a_run_without_profile_has_none(corpus: Path, tmp_path: Path) -> None:
    assert trained(small(corpus, tmp_path, "name=run"), 1, tmp_path / "said.txt") == [0]
    assert not (tmp_path / "default" / "run" / "profile").exists()


def test_memory_that_runs_out_is_explained_by_kind_with_what_would_help(corpus: Path, tmp_path: Path) -> None:
    """The kernel refuses: logits of 64 × 256 × 200,000 numbers, 13 GB, in an address space of 8."""
    words = small(
        corpus,
        tmp_path,
        *("batch_size=64", "seq_len=256", "model.config.vocab_size=200000", "name=run"),
        "model.loss_chunk=null",
    )
    codes = trained(words, 1, tmp_path / "said.txt", limits={"RLIMIT_AS": 8 * 2**30})
    assert codes == [1]
    reason = status(tmp_path / "default" / "run")["attempts"][-1]["reason"]
    assert reason.startswith("out of memory: weights "), (tmp_path / "said.txt").read_text()[-2000:]
    assert "optimizer state" in reason
    assert (
        "try micro_batch_size=32, model.loss_chunk=auto, model.activation_checkpointing=full, precision=bf16"
        in reason
    )


@pytest.mark.parametrize(
    ("words", "kinds", "first"),
    [
        (["batch_size=8"], {"weights": 1, "activations and the rest": 9}, "micro_batch_size=4"),
        (
            ["batch_size=8", "world_size=2", "engine=ddp"],
            {"weights": 9, "activations and the rest": 1},
            "engine=fsdp2",
        ),
        (
            ["batch_size=8", "world_size=2", "engine=zero1"],
            {"optimizer state": 9, "activations and the rest": 1},
            "engine=zero3",
        ),
    ],
)
def test_the_largest_kind_decides_what_is_tried_first(
    words: list[str], kinds: dict[str, int], first: str
) -> None:
    config = checks.check(compose.load([*words, "steps=1"]), environ={}, devices=0)
    assert memory.remedies(config, kinds)[0] == first


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_say_that_memory_ran_out(error: BaseException, is_one: bool) -> None:
    assert memory.is_out_of_memory(error) is is_one
