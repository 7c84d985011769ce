"""Answers: the loss against `transformers`, equal weights and answers on all engines, what is recorded."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer

from harness import engines, model
from harness.config.schema import ModelConfig
from harness.errors import InputError
from harness.loop import Callbacks, Run, train
from harness.preparation import Prepared, prepare
from harness.run import assemble, build_probes, execute
from harness.tasks import task_of
from harness.tasks.answer import AnswerBatches
from harness.tasks.extraction import extract
from tests.distributed.pool import RankPool
from tests.harness.running import SMALL_MODEL, Trained, trained, update_error

TOLERANCE = 1e-5
"""Of updates of gradient descent: fp32 rounding of sums in another order. Measured: 1e-6."""
SGD = ("optimizer.target=torch.optim.SGD", "optimizer.lr=0.5", "max_grad_norm=null", "schedule=constant")


def sums(count: int, seed: int, *, steps: bool = True) -> list[dict[str, str]]:
    """Additions with answers of different lengths, as GSM8K writes them."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = draw.randrange(5), draw.randrange(5)
        worked = f"{a} and {b} make <<{a}+{b}={a + b}>>{a + b}.\n" if steps and a > 2 else ""
        rows.append(
            {"question": f"{a} plus {b}" if b else f"{a} and nothing", "answer": f"{worked}#### {a + b}"}
        )
    return rows


def answering(folder: Path, *overrides: str, validation: list[dict[str, str]] | None = None) -> list[str]:
    """Overrides of a run that takes a second, with ``overrides`` winning."""
    (folder / "train.json").write_text(json.dumps(sums(64, 1)))
    (folder / "validation.json").write_text(json.dumps(sums(14, 2) if validation is None else validation))
    base = [
        *SMALL_MODEL,
        "task=answer",
        'task.prompt="{question} = "',
        'task.answer="{answer}"',
        "task.max_new_tokens=12",
        "task.generation_batch_size=4",
        "data=json",
        f"data.files=[{folder / 'train.json'}]",
        f"data.validation_files=[{folder / 'validation.json'}]",
        "data.vocab_size=290",
        *SGD,
        "steps=4",
        "batch_size=8",
        "seq_len=64",
        "eval.every=2",
        "log_every=1",
        "wandb.mode=disabled",
        "moments.every=null",
        f"runs_dir={folder}",
        "name=run",
        "world_size=1",
    ]
    keys = {word.split("=")[0].lstrip("+") for word in overrides}
    return [word for word in base if word.split("=")[0] not in keys] + list(overrides)


def _prepared(words: list[str]) -> Prepared:
    return prepare(words, say=lambda line: None)


def _assembled(words: list[str]) -> tuple[Prepared, Run]:
    prepared = prepare(words, say=lambda line: None, worker=True, writes_folder=False)
    run = assemble(prepared, engines.start(prepared.config))
    run.stop.restore()
    return prepared, run


def _plain_loop(words: list[str], *, on_prompts: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train as transformers' users do: one batch, labels −100 on prompts and padding, the model's own loss."""
    # The head that computes the loss takes the labels that transformers would.
    prepared, run = _assembled([word for word in words if not word.startswith("model.loss_chunk")])
    data: Any = prepared.data
    samples: Any = task_of(prepared.config).samples(prepared.config, data)
    network: Any = run.model
    network.set_attn_implementation("sdpa")
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    network.train()
    for step in range(prepared.config.steps):
        indices = samples._order.take(step * 8, 8).tolist()
        rows = [torch.from_numpy(data.train.ids(index)) for index in indices]
        longest = max(map(len, rows))
        ids = torch.full((8, longest), data.pad_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for place, (row, index) in enumerate(zip(rows, indices)):
            start = 0 if on_prompts else data.train.prompt_length(index)
            ids[place, : len(row)], mask[place, : len(row)] = row, 1
            labels[place, start : len(row)] = row[start:]
        network.zero_grad()
        network(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        with torch.no_grad():
            for p in network.parameters():
                p -= 0.5 * p.grad
    return before, {name: p.detach().clone() for name, p in network.named_parameters()}


@pytest.mark.parametrize("cut", [("micro_batch_size=8",), ("micro_batch_size=2", "model.loss_chunk=7")])
def test_weights_are_those_of_a_plain_loop_with_masked_prompts(cut: tuple[str, ...], tmp_path: Path) -> None:
    words = answering(tmp_path, *cut, "eval.every=null")
    found = trained(0, words)
    assert update_error(_plain_loop(words), (found.before, found.after)) < TOLERANCE
    # The wrong variant learns prompts, too.
    wrong = _plain_loop(words, on_prompts=True)
    assert update_error(wrong, (found.before, found.after)) > 1000 * TOLERANCE


@pytest.mark.parametrize(
    "engine",
    [
        "fsdp2",
        pytest.param("ddp", marks=pytest.mark.slow),
        pytest.param("zero1", marks=pytest.mark.slow),
        pytest.param("zero3", marks=pytest.mark.slow),
    ],
)
def test_engines_train_and_answer_alike(engine: str, tmp_path: Path, two_ranks: RankPool) -> None:
    # Generating between steps must leave training as it was: 14 prompts are four batches for two processes.
    words = answering(
        tmp_path, "task.generate=every", "micro_batch_size=2", "optimizer=adamw", "optimizer.lr=0.01"
    )
    words = [word for word in words if not word.startswith("optimizer.target")]
    quiet = trained(0, [word for word in words if word != "task.generate=every"])
    alone = trained(0, words)
    assert all(torch.equal(alone.after[name], weights) for name, weights in quiet.after.items())
    ranked = [word for word in words if word != "world_size=1"]
    pair = two_ranks.run(_trained, [*ranked, "world_size=2", f"engine={engine}"])
    assert update_error((alone.before, alone.after), (pair[0].before, pair[0].after)) < 1e-4
    measured = [row for row in alone.rows if "val/exact_match" in row]
    assert [row["step"] for row in measured] == [2, 4]
    for row, other in zip(alone.rows, pair[0].rows, strict=True):
        assert row.get("val/exact_match") == other.get("val/exact_match")
        assert ("val/loss" in row) == ("val/loss" in other)
        assert row.get("val/loss", 0.0) == pytest.approx(other.get("val/loss", 0.0), rel=1e-5)


def _trained(rank: int, words: list[str]) -> Trained:
    return trained(rank, words)


@pytest.mark.parametrize("chunk", ["auto", "5"])
def test_what_is_recorded_of_each_example(chunk: str, tmp_path: Path) -> None:
    words = answering(tmp_path, f"model.loss_chunk={chunk}", "eval.every=3", "micro_batch_size=4")
    prepared = _prepared(words)
    assert execute(prepared) == "finished"
    rows = [json.loads(line) for line in (tmp_path / "default/run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val/loss" in row] == [3, 4]
    assert [row["step"] for row in rows if "val/exact_match" in row] == [4]
    summary = json.loads((tmp_path / "default/run/summary.json").read_text())
    table = pq.read_table(tmp_path / "default/run/predictions.parquet").to_pylist()
    assert [row["example"] for row in table] == list(range(14))
    assert [row["reference"] for row in table] == [extract(row["answer"], "hashes") for row in sums(14, 2)]

    # Again, from the weights in the end: each example alone, by transformers' loss and without a cache.
    found = trained(0, words)
    data: Any = prepared.data
    network: Any = model.build(prepared.config.model, seed=0)
    network.load_state_dict(found.after, strict=False)
    network.eval()
    network.tie_weights()
    tokenizer = Tokenizer.from_file(str(data.tokenizer_folder / "tokenizer.json"))
    total = tokens = 0
    for index, row in enumerate(table):
        ids, prompt = torch.from_numpy(data.validation.ids(index)), data.validation.prompt_length(index)
        labels = torch.where(torch.arange(len(ids)) < prompt, -100, ids)
        with torch.no_grad():
            mean = network(input_ids=ids[None], labels=labels[None]).loss.item()
            answer: list[int] = []
            while len(answer) < 12 and data.eos_id not in answer:
                seen = torch.cat([ids[:prompt], torch.tensor(answer, dtype=torch.int64)])
                answer.append(int(network(input_ids=seen[None]).logits[0, -1].argmax()))
        assert row["loss"] == pytest.approx(mean * (len(ids) - prompt), rel=1e-4)
        assert row["text"] == tokenizer.decode(answer)
        assert row["prediction"] == (extract(row["text"], "hashes") or None)
        assert row["correct"] == (row["prediction"] == row["reference"])
        total, tokens = total + row["loss"], tokens + len(ids) - prompt
    assert summary["val/loss"] == pytest.approx(total / tokens)
    share = sum(row["correct"] for row in table) / 14
    assert summary["metrics"] == {"exact_match": {"value": share, "better": "higher", "unit": "fraction"}}
    assert summary["longest_answer"]["validation"] == max(
        len(data.validation.ids(index)) - data.validation.prompt_length(index) for index in range(14)
    )


def test_labels_are_answers_alone(tmp_path: Path) -> None:
    data: Any = _prepared(answering(tmp_path)).data
    indices = list(range(9))
    ids, labels, mask = AnswerBatches(data.train, data.pad_id, 64)(indices)
    assert ids.shape == labels.shape == mask.shape
    assert ids.shape[1] % 8 == 0
    for place, index in enumerate(indices):
        whole, prompt = data.train.ids(index), data.train.prompt_length(index)
        count = len(whole) - 1
        assert ids[place, :count].tolist() == whole[:-1].tolist()
        assert mask[place].tolist() == [1] * count + [0] * (len(mask[place]) - count)
        assert labels[place, prompt - 1 : count].tolist() == whole[prompt:].tolist()
        assert whole[-1] == data.eos_id
        assert set(labels[place, : prompt - 1]) | set(labels[place, count:]) <= {-100}
    samples: Any = task_of(_prepared(answering(tmp_path)).config).samples(
        _prepared(answering(tmp_path)).config, data
    )
    _, labels, _ = samples.rows(56, 8)
    assert samples.loss_tokens(56, 8) == int((labels != -100).sum())


def test_routers_balance_prompts_and_no_padding() -> None:
    config = ModelConfig(
        model_type="mixtral",
        config={
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "output_router_logits": True,
        },
    )
    network: Any = model.build(config, seed=0)
    objective = model.CausalLMObjective(network, is_padded=True)
    row = torch.randint(1, 64, (1, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for width, real in ((11, 11), (30, 11), (30, 30)):
        ids, labels = torch.zeros(1, width, dtype=torch.int64), torch.full((1, width), -100)
        mask = (torch.arange(width) < real).long()[None]
        ids[:, :11], labels[:, 8:11] = row[:, :-1], row[:, 9:]
        batch = (ids, labels, mask)
        losses.append(objective.losses(network(**objective.inputs(batch)), batch))
    alone, padded, wrong = losses
    assert alone.loss.item() == pytest.approx(padded.loss.item(), rel=1e-5)
    assert alone.aux is not None
    assert padded.aux is not None
    assert wrong.aux is not None
    assert alone.aux.item() == pytest.approx(padded.aux.item(), rel=1e-5)
    assert abs(wrong.aux.item() / alone.aux.item() - 1) > 1e-3


@pytest.mark.parametrize(
    ("change", "key", "says"),
    [
        (("task.stop=[make]",), "task.stop", "the training data, which would end there"),
        (("task.metric=accuracy",), "task.metric", "exact_match"),
        (("task.metric=bleu",), "task.metric", "exact_match"),
        (("batch_size=65",), "batch_size", "batch_size=64"),
        (("task.extract=hashes", 'task.answer="{question}"'), "task.extract", "train.json, item 1"),
        (("seq_len=12",), "seq_len", "task.truncate=left"),
    ],
)
def test_what_cannot_be_trained_or_measured_is_refused(
    change: tuple[str, ...], key: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as refused:
        _prepared(answering(tmp_path, *change))
    assert refused.value.key == key
    assert says in str(refused.value)
    assert not (tmp_path / "default").exists()


def test_a_stop_ends_answers_and_the_log_tells_of_long_ones(tmp_path: Path) -> None:
    # A blank line ends what a base model answers, and is no part of its answers.
    words = answering(tmp_path, r'task.stop=["\n\n"]', "task.max_new_tokens=4", "steps=1")
    prepared = _prepared(words)
    longer = sum("\n" in row["answer"] for row in sums(14, 2))
    said = task_of(prepared.config).describe(prepared.config, prepared.data)
    assert f"{longer} validation answers are longer than task.max_new_tokens=4" in said
    _, run = _assembled(words)
    data: Any = prepared.data
    probe: Any = build_probes(run, data)[0]
    blank = _ids_of(data, "#### 1\n\n####")
    seen: list[list[int]] = []

    def forced(*prompts: Any, **options: Any) -> list[list[int]]:
        seen.append(options["stop"])
        return [blank] * len(data.validation)

    import harness.tasks.answering as answering_module

    original: Callable[..., Any] = answering_module.generate
    answering_module.generate = forced
    try:
        assert probe._evaluator._answers() == ["#### 1"] * 14
    finally:
        answering_module.generate = original
    assert seen == [["\n\n"]]


def _ids_of(data: Any, text: str) -> list[int]:
    return Tokenizer.from_file(str(data.tokenizer_folder / "tokenizer.json")).encode(text).ids


def test_worked_examples_precede_the_prompts_of_evaluations(tmp_path: Path) -> None:
    data: Any = _prepared(answering(tmp_path, "task.shots=1", "seq_len=128")).data
    tokenizer = Tokenizer.from_file(str(data.tokenizer_folder / "tokenizer.json"))
    prompts = [
        tokenizer.decode(data.validation.ids(index)[: data.validation.prompt_length(index)].tolist())
        for index in range(14)
    ]
    (worked,) = {prompt.rpartition("\n\n")[0] for prompt in prompts}
    assert worked in {f"{row['question']} = {row['answer']}" for row in sums(64, 1)}
    assert [prompt.rpartition("\n\n")[2] for prompt in prompts] == [
        f"{row['question']} = " for row in sums(14, 2)
    ]


def _answers(rank: int, words: list[str]) -> list[dict[str, Any]]:
    """Train and return the predictions, which rank 0 writes."""
    prepared, run = _assembled(words)
    folder = Path(prepared.config.runs_dir)
    try:
        probes = build_probes(run, prepared.data, folder if rank == 0 else None)
        assert train(run, Callbacks(probes)) == "finished"
    finally:
        run.engine.release()
    return pq.read_table(folder / "predictions.parquet").to_pylist() if rank == 0 else []


@pytest.mark.slow
def test_a_small_model_learns_to_add_on_every_engine(tmp_path: Path, two_ranks: RankPool) -> None:
    words = answering(
        tmp_path, "optimizer=adamw", "optimizer.lr=0.01", "schedule=linear", "steps=200", "batch_size=50"
    )
    # One form of answers, and every sum several times.
    for name, count in (("train", 200), ("validation", 40)):
        (tmp_path / f"{name}.json").write_text(json.dumps(sums(count, count, steps=False)))
    words = [word for word in words if not word.startswith(("optimizer.target", "world_size"))]
    alone = _answers(0, [*words, "world_size=1"])
    assert np.mean([row["correct"] for row in alone]) > 0.9
    for engine in ("ddp", "fsdp2"):
        pair = two_ranks.run(_answers, [*words, "world_size=2", f"engine={engine}"])[0]
        assert [row["text"] for row in pair] == [row["text"] for row in alone]
