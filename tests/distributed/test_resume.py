"""A run that was stopped goes on where it was: bit by bit on the same processes, to rounding on others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.harness.running import small, write_documents

if TYPE_CHECKING:
    from tests.distributed.pool import RankPool

STEPS, STOP_AFTER = 8, 5
RULES = {
    "sumo": ["optimizer=sumo", "optimizer.rank=8", "optimizer.refresh_interval=3", "optimizer.lr=0.01"],
    "sumo_official": [
        "optimizer=sumo_official",
        "optimizer.rank=8",
        "optimizer.refresh_interval=3",
        "optimizer.lr=0.01",
    ],
    "galore": ["optimizer=galore", "optimizer.rank=8", "optimizer.refresh_interval=3", "optimizer.lr=0.01"],
    "muon": ["optimizer=muon", "optimizer.lr=0.01"],
    "adamw": ["optimizer=adamw", "optimizer.lr=0.003"],
    "torch.optim.AdamW": ["optimizer.target=torch.optim.AdamW", "optimizer.lr=0.003"],
}
SOAP = [
    "optimizer.target=pytorch_optimizer.SOAP",
    "optimizer.lr=0.003",
    "+optimizer.precondition_frequency=2",
]
ENGINES: dict[str, tuple[int, list[str]]] = {
    "single": (1, []),
    "ddp": (2, ["engine=ddp"]),
    "ddp of four": (4, ["engine=ddp"]),
    "ddp, split work": (2, ["engine=ddp", "engine.optimizer_work=split"]),
    "fsdp2": (2, ["engine=fsdp2"]),
    "fsdp2, columns": (2, ["engine=fsdp2", "engine.shard_axis=1"]),
    "hsdp": (4, ["engine=hsdp", "engine.replicas=2"]),
    "zero0": (2, ["engine=zero0"]),
    "zero1": (2, ["engine=zero1"]),
    "zero2": (2, ["engine=zero2"]),
    "zero3": (2, ["engine=zero3"]),
}
TOLERANCE = 2e-5
"""Relative ΔW over the few steps after a change of processes: sums of fp32 numbers in another order (1e-6 to 1e-5),
through a refresh of the basis; `tests/distributed/test_sharded.py` has the same bound."""

GROWN = 1e-3
"""The same over all steps of a run that changed engines: AdamW divides small gradients by their own size, so their
rounding (1e-6) comes out as large as the update in some elements. What is lost or misplaced gives more than 1e-2."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text"))


def attempt(
    rank: int, words: list[str], folder: Path, stop_after: int | None, change: str = ""
) -> dict[str, Any]:
    """One attempt at a run in this process, as `harness.run.execute` makes it, without a record.

    Args:
        rank: of this process.
        words: configuration.
        folder: of the run.
        stop_after: as if a signal came in the step after so many.
        change: what to do wrong when resuming.
    """
    from harness import engines
    from harness.checkpoint import contents, resuming
    from harness.checkpoint.saving import Checkpoints
    from harness.loop import Callbacks, train
    from harness.preparation import prepare
    from harness.run import assemble, build_probes
    from optimizers.named_state import StatePiece

    prepared = prepare(words, say=lambda text: None, worker=True, writes_folder=False)
    run = assemble(prepared, engines.start(prepared.config))
    run.stop.restore()
    rows: list[dict[str, Any]] = []
    if stop_after is not None:
        stand_in: Any = _StopAfter(run.state, stop_after)
        run = dataclasses.replace(run, stop=stand_in)
    probes = build_probes(run, prepared.data)
    said: list[str] = []
    try:
        choice = resuming.choose(run, _store(folder), identity=prepared.identity, attempt=1)
        checkpoints = Checkpoints(
            run, folder, prepared.hashes(), attempt=choice.attempt, say=said.append, probes=probes
        )
        with _wrong(change):
            first = resuming.resume(run, probes, checkpoints.store, choice, said.append)
        state = train(run, Callbacks(probes, [_Rows(rows)], checkpoints))
        weights = run.engine.full_weights()
        pieces: list[StatePiece] = [
            piece._replace(tensor=piece.tensor.detach().clone())
            for piece in contents.optimizer_state(run).pieces()
        ]
    finally:
        run.engine.release()
    return {"state": state, "first": first, "weights": weights, "pieces": pieces, "rows": rows, "said": said}


class _Rows:
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def write(self, row: dict[str, Any]) -> None:
        self._rows.append(row)


class _StopAfter:
    """A stop signal that comes in a chosen step."""

    reason = "a test"

    def __init__(self, state: Any, steps: int) -> None:
        self._state, self._steps = state, steps

    @property
    def requested(self) -> bool:
        return self._state.step >= self._steps - 1


def _store(folder: Path) -> Any:
    from harness.checkpoint.store import Store

    return Store(folder)


def _wrong(change: str) -> Any:
    """Defects of other harnesses, put in on purpose."""
    from contextlib import nullcontext
    from unittest import mock

    from harness.checkpoint import contents

    if change == "no optimizer state":
        # What DeepSpeed does with state outside of its flat tensors, and GaLore's --continue_from with all of it.
        return mock.patch.object(contents.named_state, "load", return_value=None)
    if change == "data from the beginning":
        restore = contents.restore_counters

        def forgetful(run: Any, *args: Any) -> list[str]:
            lost = restore(run, *args)
            give, before = run.loader.micro_batches, run.state.step
            run.loader.micro_batches = lambda step: give(step - before)
            return lost

        return mock.patch.object(contents, "restore_counters", forgetful)
    if change == "no randomness":
        return mock.patch.object(contents, "set_randomness", return_value=None)
    return nullcontext()


def words_of(corpus: Path, folder: Path, engine: str, rule: list[str], *more: str) -> list[str]:
    world, chosen = ENGINES[engine]
    return small(
        corpus,
        folder,
        f"world_size={world}",
        f"steps={STEPS}",
        "moments.every=2",
        # Before and after the stop.
        "eval.every=4",
        "checkpoint.every=null",
        *chosen,
        *rule,
        *more,
    )


def run_on(
    pools: dict[int, RankPool], engine: str, words: list[str], folder: Path, *args: Any
) -> list[dict[str, Any]]:
    world = ENGINES[engine][0]
    if world == 1:
        return [attempt(0, words, folder, *args)]
    return pools[world].run(attempt, words, folder, *args)


@pytest.fixture
def pools(two_ranks: RankPool, four_ranks: RankPool) -> dict[int, RankPool]:
    return {2: two_ranks, 4: four_ranks}


def same_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a row says beside times and memory."""
    return [
        {
            k: v
            for k, v in row.items()
            if not k.startswith(("time/", "throughput/", "memory/", "balance/", "wall_s"))
        }
        for row in rows
    ]


def assert_identical(whole: list[dict[str, Any]], parts: list[list[dict[str, Any]]]) -> None:
    """The last attempt ended as the uninterrupted run did, in every bit of weights, state and metrics."""
    for rank, (expected, found) in enumerate(zip(whole, parts[-1])):
        assert expected["state"] == found["state"] == "finished"
        for name, tensor in expected["weights"].items():
            assert torch.equal(tensor, found["weights"][name]), f"rank {rank}: {name}"
        assert len(expected["pieces"]) == len(found["pieces"]) > 0
        for e, f in zip(expected["pieces"], found["pieces"]):
            assert e[:5] == f[:5]
            assert torch.equal(e.tensor, f.tensor), f"rank {rank}: {e.kind} of {e.name}"
    rows = [row for part in parts for row in part[0]["rows"]]
    assert same_rows(rows) == same_rows(whole[0]["rows"])


QUICK = {
    *(("single", rule, "fp32") for rule in ("sumo", "sumo_official", "adamw")),
    ("ddp", "sumo", "bf16"),
    ("ddp, split work", "muon", "fp32"),
    ("fsdp2", "galore", "fp32"),
    ("fsdp2", "torch.optim.AdamW", "bf16_pure"),
    ("fsdp2, columns", "sumo", "fp16"),
    ("hsdp", "sumo", "fp32"),
    ("zero1", "sumo", "bf16"),
    ("zero2", "torch.optim.AdamW", "fp32"),
    ("zero3", "sumo", "fp32"),
}
"""Cells that run every time: each way to shard, rule and precision. (The other cells are slow: the two engines that
are missing here replicate as DDP does.)"""


def cells() -> list[Any]:
    """Every rule on every engine in every precision that both can, the ones outside of `QUICK` marked slow."""
    found = []
    for engine in ENGINES:
        for rule in RULES:
            for precision in ("fp32", "bf16", "bf16_pure", "fp16"):
                # DeepSpeed's partitions keep fp32 masters, and know no fp16 on CPUs.
                if engine in ("zero1", "zero2", "zero3") and precision in ("bf16_pure", "fp16"):
                    continue
                cell = (engine, rule, precision)
                found.append(pytest.param(*cell, marks=[] if cell in QUICK else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("engine", "rule", "precision"), cells())
def test_a_stopped_run_ends_as_if_it_had_not_been(
    engine: str, rule: str, precision: str, corpus: Path, tmp_path: Path, pools: dict[int, RankPool]
) -> None:
    words = words_of(corpus, tmp_path, engine, RULES[rule], f"precision={precision}")
    whole = run_on(pools, engine, words, tmp_path / "whole", None)
    first = run_on(pools, engine, words, tmp_path / "cut", STOP_AFTER)
    assert first[0]["state"] == "interrupted"
    second = run_on(pools, engine, words, tmp_path / "cut", None)
    assert second[0]["first"] == STOP_AFTER
    assert_identical(whole, [first, second])


_HALF = ["optimizer.state_dtype=bfloat16", "optimizer.average_decay=0.8"]
AROUND = [
    ("single", "adamw", [*_HALF, "optimizer.weight_norm=fixed", "optimizer.weight_decay=0"]),
    ("ddp, split work", "muon", [*_HALF, "optimizer.split_heads=true", "optimizer.weight_norm=hyperball"]),
    ("fsdp2", "sumo", [*_HALF, "optimizer.weight_norm=hyperball"]),
    ("zero1", "galore", [*_HALF, "optimizer.weight_norm=fixed", "optimizer.update_rms=0.2"]),
    ("zero3", "adamw", [*_HALF, "optimizer.weight_norm=fixed", "optimizer.weight_decay=0"]),
]


@pytest.mark.parametrize(
    ("engine", "rule", "options"),
    [pytest.param(*cell, marks=[] if cell[0] == "zero1" else pytest.mark.slow) for cell in AROUND],
)
def test_options_around_a_rule_go_on(
    engine: str,
    rule: str,
    options: list[str],
    corpus: Path,
    tmp_path: Path,
    pools: dict[int, RankPool],
) -> None:
    """Norms, averages and bf16 moments are part of the state, in their own dtypes."""
    words = words_of(corpus, tmp_path, engine, RULES[rule], *options)
    whole = run_on(pools, engine, words, tmp_path / "whole", None)
    first = run_on(pools, engine, words, tmp_path / "cut", STOP_AFTER)
    second = run_on(pools, engine, words, tmp_path / "cut", None)
    assert second[0]["first"] == STOP_AFTER
    assert_identical(whole, [first, second])
    dtypes = {piece.kind: piece.tensor.dtype for piece in second[0]["pieces"]}
    assert dtypes["moment"] == torch.bfloat16
    assert (dtypes["average"], dtypes["weight_norm"]) == (torch.float32, torch.float64)
    assert "val/raw_loss" in second[0]["rows"][-1]


@pytest.mark.parametrize("engine", ["single", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_plug_in_with_lists_of_matrices_goes_on(
    engine: str, corpus: Path, tmp_path: Path, pools: dict[int, RankPool]
) -> None:
    pytest.importorskip("pytorch_optimizer")
    words = words_of(corpus, tmp_path, engine, SOAP)
    whole = run_on(pools, engine, words, tmp_path / "whole", None)
    first = run_on(pools, engine, words, tmp_path / "cut", STOP_AFTER)
    assert_identical(whole, [first, run_on(pools, engine, words, tmp_path / "cut", None)])


def test_dropout_draws_what_it_would_have_drawn(
    corpus: Path, tmp_path: Path, pools: dict[int, RankPool]
) -> None:
    """The step that a stop breaks off has drawn numbers already; resuming must not skip them."""
    words = words_of(corpus, tmp_path, "ddp", RULES["sumo"], "+model.config.attention_dropout=0.3")
    whole = run_on(pools, "ddp", words, tmp_path / "whole", None)
    first = run_on(pools, "ddp", words, tmp_path / "cut", STOP_AFTER)
    assert_identical(whole, [first, run_on(pools, "ddp", words, tmp_path / "cut", None)])


def test_control_without_its_randomness_dropout_differs(corpus: Path, tmp_path: Path) -> None:
    words = words_of(corpus, tmp_path, "single", RULES["sumo"], "+model.config.attention_dropout=0.3")
    whole = run_on({}, "single", words, tmp_path / "whole", None)
    run_on({}, "single", words, tmp_path / "cut", STOP_AFTER)
    second = run_on({}, "single", words, tmp_path / "cut", None, "no randomness")
    assert any(not torch.equal(t, second[0]["weights"][n]) for n, t in whole[0]["weights"].items())


def relative_change(expected: dict[str, Any], found: dict[str, Any], start: dict[str, Any]) -> float:
    """Largest relative difference of a parameter's change since `start`, Frobenius norms in fp64."""
    return max(
        float((found[n].double() - e.double()).norm() / (e.double() - start[n].double()).norm())
        for n, e in expected.items()
    )


MOVES = [
    ("single", "ddp of four"),
    ("ddp", "fsdp2, columns"),
    ("ddp of four", "single"),
    ("ddp, split work", "zero2"),
    ("fsdp2", "hsdp"),
    ("fsdp2, columns", "zero1"),
    ("hsdp", "zero3"),
    ("zero0", "ddp of four"),
    ("zero1", "fsdp2"),
    ("zero3", "single"),
]
QUICK_MOVES = {
    ("ddp", "fsdp2, columns"),
    ("ddp, split work", "zero2"),
    ("hsdp", "zero3"),
    ("zero0", "ddp of four"),
    ("zero1", "fsdp2"),
    ("zero3", "single"),
}
"""Of these every time: from and to each kind of layout (whole, split, sharded, flat), and both numbers of processes."""


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """For a rule: the whole run in one process, and the same up to the stop."""

    @cache
    def trained(rule: str) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("alone")
        words = words_of(corpus, folder, "single", RULES[rule])
        return [
            attempt(0, words, folder / name, stop) for name, stop in (("whole", None), ("start", STOP_AFTER))
        ]

    return trained


@pytest.mark.parametrize(
    ("before", "after", "rule"),
    [
        *(
            pytest.param(*move, "sumo", marks=[] if move in QUICK_MOVES else pytest.mark.slow)
            for move in MOVES
        ),
        *(
            pytest.param(*move, rule, marks=pytest.mark.slow)
            for move in MOVES
            for rule in ("adamw", "galore", "muon")
        ),
    ],
)
def test_a_run_goes_on_elsewhere(
    before: str,
    after: str,
    rule: str,
    corpus: Path,
    tmp_path: Path,
    pools: dict[int, RankPool],
    alone: Callable[[str], list[dict[str, Any]]],
) -> None:
    """Another engine, number of processes and accumulation: the same samples, the same update to rounding."""
    end = STOP_AFTER + 3
    assert end == STEPS
    words = words_of(corpus, tmp_path, before, RULES[rule])
    run_on(pools, before, words, tmp_path / "moved", STOP_AFTER)
    halves = ["micro_batch_size=2"] if ENGINES[after][0] < 4 else []
    gone_on = attempt(0, words_of(corpus, tmp_path, "single", RULES[rule]), tmp_path / "moved", None)
    moved = run_on(
        pools, after, words_of(corpus, tmp_path, after, RULES[rule], *halves), tmp_path / "moved", None
    )
    assert moved[0]["first"] == STOP_AFTER
    whole, start = alone(rule)
    assert relative_change(gone_on["weights"], moved[0]["weights"], start["weights"]) < TOLERANCE
    assert relative_change(whole["weights"], moved[0]["weights"], start["weights"]) < GROWN
    assert math.isclose(moved[0]["rows"][-1]["val/loss"], whole["rows"][-1]["val/loss"], rel_tol=1e-5)
    assert moved[0]["rows"][-1]["tokens"] == whole["rows"][-1]["tokens"]


@pytest.mark.parametrize("change", ["no optimizer state", "data from the beginning"])
def test_control_what_others_lose_is_seen(change: str, corpus: Path, tmp_path: Path) -> None:
    words = words_of(corpus, tmp_path, "single", RULES["sumo"])
    whole = run_on({}, "single", words, tmp_path / "whole", None)
    first = run_on({}, "single", words, tmp_path / "cut", STOP_AFTER)
    second = run_on({}, "single", words, tmp_path / "cut", None, change)
    error = relative_change(whole[0]["weights"], second[0]["weights"], first[0]["weights"])
    assert error > 100 * TOLERANCE
