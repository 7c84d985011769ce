"""Greedy decoding in padded batches with a cache gives what one prompt gives alone, without either, on every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from tests.distributed.pool import RankPool
from tests.harness.running import small, write_documents

NEW = 12
BATCH = 4
STEP = ("optimizer=adamw", "optimizer.lr=0.003")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text"))


def prompts(count: int = 11) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 512, int(length)) for length in generator.integers(1, 18, count)]


def with_run(rank: int, overrides: list[str], function: Any, *arguments: Any) -> Any:
    """Call a function with an assembled run; what its engine did to the process is undone."""
    from harness import engines
    from harness.preparation import prepare
    from harness.run import assemble

    prepared = prepare(overrides, say=lambda line: None, worker=True, writes_folder=False)
    run = assemble(prepared, engines.start(prepared.config))
    run.stop.restore()
    try:
        return function(run, *arguments)
    finally:
        run.engine.release()


def decoded(run: Any, rows: list[np.ndarray], eos: int, batch: int, **options: Any) -> list[list[int]]:
    from harness.tasks.generation import generate

    return generate(run.engine, run.model, rows, max_new_tokens=NEW, eos_id=eos, batch_size=batch, **options)


def expected(run: Any, rows: list[np.ndarray]) -> list[list[int]]:
    """Decode each prompt alone, reading it anew for every token; nothing ends an answer."""
    found = []
    with torch.no_grad():
        for row in rows:
            ids = torch.from_numpy(row)[None]
            for _ in range(NEW):
                ids = torch.cat([ids, run.model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            found.append(ids[0, len(row) :].tolist())
    return found


def until(answers: list[list[int]], eos: int) -> list[list[int]]:
    return [answer[: answer.index(eos)] if eos in answer else answer for answer in answers]


def frequent(answers: list[list[int]]) -> int:
    """Return the token that ends most answers before their time, if it is eos."""
    return max(range(512), key=lambda token: sum(token in answer for answer in answers))


def compare(run: Any, rows: list[np.ndarray]) -> None:
    from harness.tasks import generation

    attention = run.model.config._attn_implementation
    assert attention == generation.CAUSAL, "the case that needs another attention function"
    # Settings of a model's author must not sample, punish or end anything.
    settings = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=2.0, eos_token_id=[1, 2])
    run.model.generation_config = settings
    whole = expected(run, rows)
    eos = frequent(whole)
    cut = until(whole, eos)
    assert 1 < sum(len(answer) < NEW for answer in cut) < len(rows)
    state = torch.get_rng_state()
    run.model.train()
    for batch in (1, BATCH, len(rows)):
        assert decoded(run, rows, eos, batch) == cut
    assert decoded(run, rows, 511, BATCH) == until(whole, 511)
    assert decoded(run, [], eos, BATCH) == []
    assert run.model.training
    assert run.model.config._attn_implementation == attention
    assert run.model.generation_config is settings
    assert torch.equal(torch.get_rng_state(), state)

    # The wrong variant: attention that does not know padding on the left.
    generation.CAUSAL = "none"
    try:
        assert decoded(run, rows, eos, BATCH) != cut
    finally:
        generation.CAUSAL = attention


def test_batches_give_what_each_prompt_gives_alone(corpus: Path, tmp_path: Path) -> None:
    with_run(0, small(corpus, tmp_path, *STEP), compare, prompts())


def test_texts_end_answers_too(corpus: Path, tmp_path: Path) -> None:
    def check(run: Any) -> None:
        from harness.tasks.generation import cut_at

        def decode(rows: Any) -> list[str]:
            return ["".join(f"{token} " for token in row) for row in rows]

        rows = prompts()
        whole = expected(run, rows)
        first, second = next((a[3], a[4]) for a in whole if a[4] not in a[:4])
        stop = f"{first} {second}"
        found = decoded(run, rows, 511, BATCH, stop=[stop], decode=decode)
        texts = [cut_at(text, [stop]) for text in decode(found)]
        assert texts == [cut_at(text, [stop]) for text in decode(until(whole, 511))]
        assert any(len(answer) == 5 for answer in found), "nothing was ended early"
        # The end of the prompt is not part of the answer.
        ids = np.concatenate([rows[0], [first]])
        (answer,) = decoded(run, [ids], 511, 1, stop=[stop], decode=decode)
        (alone,) = expected(run, [ids])
        assert cut_at(decode([answer])[0], [stop]) == cut_at(decode([alone])[0], [stop])

    with_run(0, small(corpus, tmp_path, *STEP), check)


@pytest.mark.slow
def test_compiled_layers_decode_without_compiling(corpus: Path, tmp_path: Path) -> None:
    def check(run: Any) -> None:
        rows = prompts()[:3]
        torch._dynamo.reset()
        found = decoded(run, rows, 511, BATCH)
        assert torch._dynamo.utils.counters["stats"].get("unique_graphs", 0) == 0
        plain = with_run(0, small(corpus, tmp_path, *STEP), decoded, rows, 511, BATCH)
        assert found == plain

    with_run(0, small(corpus, tmp_path, *STEP, "model.compile=true"), check)


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("ddp", marks=pytest.mark.slow),
        "fsdp2",
        pytest.param("zero1", marks=pytest.mark.slow),
        pytest.param("zero3", marks=pytest.mark.slow),
    ],
)
def test_engines_decode_alike(engine: str, corpus: Path, tmp_path: Path, two_ranks: RankPool) -> None:
    _check_ranks(two_ranks, corpus, tmp_path, ["world_size=2", f"engine={engine}"])


@pytest.mark.slow
def test_shards_of_replicas_decode_alike(corpus: Path, tmp_path: Path, four_ranks: RankPool) -> None:
    _check_ranks(four_ranks, corpus, tmp_path, ["world_size=4", "engine=hsdp", "engine.replicas=2"])


def _check_ranks(ranks: RankPool, corpus: Path, tmp_path: Path, engine: list[str]) -> None:
    rows = prompts()
    whole = with_run(0, small(corpus, tmp_path, *STEP), decoded, rows, 511, BATCH)
    eos = frequent(whole)
    alone = until(whole, eos)
    assert {len(answer) for answer in alone} > {NEW}
    # Three batches, and one: a process has nothing to decode.
    for count in (len(rows), 2):
        found = ranks.run(
            with_run, small(corpus, tmp_path, *STEP, *engine), decoded, rows[:count], eos, BATCH
        )
        assert all(answers == alone[:count] for answers in found)
