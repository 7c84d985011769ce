"""Classification and regression: the loss against `transformers`, equal weights on all engines, what is recorded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from harness import engines
from harness.errors import InputError
from harness.loop import Callbacks, Run, forward_backward, train
from harness.preparation import Prepared, prepare
from harness.run import assemble, build_probes, execute
from harness.tasks import metrics, predictions
from harness.worker import closing_lines
from tests.distributed.pool import RankPool
from tests.distributed.test_resume import attempt
from tests.harness.running import Trained, trained, update_error
from tests.harness.tasks.running import classifier

TOLERANCE = 1e-4
"""Of updates: fp32 rounding of sums in another order, which Adam's first steps amplify (tests/distributed)."""
ADAMW = ("optimizer=adamw", "optimizer.lr=0.003", "optimizer.eps=1e-4")
"""With an eps above the gradients' rounding; measured: 6e-6."""
SUMO = ("optimizer=sumo", "optimizer.lr=0.003", "optimizer.rank=8")
KINDS = [(True, False), (True, True), (False, False), (False, True)]
"""Encoder or decoder, numbers or classes."""


def _assembled(words: list[str]) -> tuple[Prepared, Run]:
    prepared = prepare(words, say=lambda text: None, worker=True, writes_folder=False)
    run = assemble(prepared, engines.start(prepared.config))
    run.stop.restore()
    return prepared, run


@pytest.mark.parametrize(("encoder", "numbers"), KINDS)
def test_gradients_are_those_of_transformers_own_loss_of_each_example_alone(
    encoder: bool, numbers: bool, tmp_path: Path
) -> None:
    """The oracle has no padding, no mask and no loss of ours: rows of one example, and the mean of their losses."""
    prepared, run = _assembled(classifier(tmp_path, "micro_batch_size=4", encoder=encoder, numbers=numbers))
    batches = run.loader.micro_batches(0)
    assert len(batches) == 2
    assert any(bool((batch[1] == 0).any()) for batch in batches), "nothing is padded"
    sums = forward_backward(run, batches, weight=1 / run.loader.loss_tokens(0))
    found = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
    run.model.zero_grad()
    network: Any = run.model
    losses = []
    data: Any = prepared.data
    from harness.tasks import task_of

    samples: Any = task_of(prepared.config).samples(prepared.config, data)
    for index in samples._order.take(0, 8).tolist():
        ids, types = torch.from_numpy(data.train.ids(index))[None], data.train.type_ids(index)
        extra = {} if types is None else {"token_type_ids": torch.from_numpy(types)[None]}
        label = torch.tensor([data.train.label(index)])
        outputs = network(input_ids=ids, attention_mask=torch.ones_like(ids), labels=label, **extra)
        (outputs.loss / 8).backward()
        losses.append(outputs.loss.item())
    assert sums.loss.item() == pytest.approx(sum(losses), rel=1e-5)
    expected = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # The gradient of a bias is a sum of terms of up to 0.5 that nearly cancel: fp32 leaves 1e-8 of them.
        assert float((found[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()) + 1e-8, name


def _error(reference: Trained, other: Trained) -> float:
    """Return `update_error` without the biases of keys.

    A softmax does not change if all its scores rise by the same number, so their gradient is rounding alone, of which
    Adam makes steps of full length.
    """
    kept = [name for name in reference.after if not name.endswith("key.bias")]
    first, second = (
        ({name: run.before[name] for name in kept}, {name: run.after[name] for name in kept})
        for run in (reference, other)
    )
    return update_error(first, second)


def _ranked(rank: int, words: list[str], change: str = "") -> Trained:
    return trained(
        rank, words, change={"": None, "no mask": _without_mask, "own tokens": _mean_per_token}[change]
    )


def _without_mask(run: Run) -> None:
    """The wrong variant: padding is attended to, so that weights depend on how the batch is cut."""
    objective: Any = run.objective
    inputs = objective.inputs
    objective.inputs = lambda batch: {k: v for k, v in inputs(batch).items() if k != "attention_mask"}


def _mean_per_token(run: Run) -> None:
    """The wrong variant: each process divides by its own tokens, scaled to the same size, instead of by examples."""
    loader: Any = run.loader
    share = run.config.batch_size // run.engine.world_size
    samples, first = loader._samples, run.engine.rank * share

    def own(step: int) -> float:
        start = step * run.config.batch_size
        whole = samples.tokens(start, run.config.batch_size)
        mine = samples.tokens(start + first, share)
        return run.config.batch_size * mine * run.engine.world_size / whole

    loader.loss_tokens = own


@pytest.mark.parametrize(("encoder", "numbers"), [KINDS[0], pytest.param(*KINDS[3], marks=pytest.mark.slow)])
def test_cut_padding_and_processes_change_no_weights(
    encoder: bool, numbers: bool, tmp_path: Path, two_ranks: RankPool
) -> None:
    def words(*more: str) -> list[str]:
        return classifier(tmp_path, *ADAMW, *more, encoder=encoder, numbers=numbers)

    alone = trained(0, words())
    assert alone.rows[-1]["tokens"] > alone.rows[0]["tokens"]
    for found in (
        trained(0, words("micro_batch_size=1")),
        two_ranks.run(_ranked, words("world_size=2", "micro_batch_size=2"))[0],
    ):
        assert _error(alone, found) < TOLERANCE
        for mine, theirs in zip(alone.rows, found.rows, strict=True):
            assert theirs["tokens"] == mine["tokens"]
            for key in ("train/loss", "val/loss", "grad_norm"):
                if key in mine:
                    assert theirs[key] == pytest.approx(mine[key], rel=1e-5), key


@pytest.mark.parametrize("change", ["no mask", "own tokens"])
def test_control_wrong_weights_are_caught(change: str, tmp_path: Path, two_ranks: RankPool) -> None:
    alone = trained(0, classifier(tmp_path, *ADAMW))
    wrong = two_ranks.run(
        _ranked, classifier(tmp_path, *ADAMW, "world_size=2", "micro_batch_size=2"), change
    )[0]
    assert _error(alone, wrong) > 10 * TOLERANCE


QUICK = ["fsdp2", "zero1"]
ENGINES = [
    *QUICK,
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero0", "zero2", "zero3")),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_trains_what_one_process_trains(
    engine: str, tmp_path: Path, two_ranks: RankPool
) -> None:
    alone = trained(0, classifier(tmp_path, *ADAMW))
    words = classifier(tmp_path, *ADAMW, f"engine={engine}", "world_size=2", "micro_batch_size=2")
    first, second = two_ranks.run(_ranked, words)
    assert _error(alone, first) < TOLERANCE
    assert first.rows[-1]["val/accuracy"] == alone.rows[-1]["val/accuracy"]
    assert first.rows[-1]["val/loss"] == second.rows[-1]["val/loss"]


@pytest.mark.slow
def test_replicas_of_shards_train_what_one_process_trains(tmp_path: Path, four_ranks: RankPool) -> None:
    alone = trained(0, classifier(tmp_path, *ADAMW))
    words = ("engine=hsdp", "engine.replicas=2", "world_size=4", "micro_batch_size=1")
    first = four_ranks.run(_ranked, classifier(tmp_path, *ADAMW, *words))[0]
    assert _error(alone, first) < TOLERANCE


def test_a_run_that_was_stopped_continues_bit_by_bit(tmp_path: Path) -> None:
    words = classifier(tmp_path, *SUMO, "checkpoint.every=null", "eval.every=1", "micro_batch_size=4")
    whole = attempt(0, words, tmp_path / "whole", None)
    part = attempt(0, words, tmp_path / "parts", 2)
    assert (part["state"], len(part["rows"])) == ("interrupted", 2)
    rest = attempt(0, words, tmp_path / "parts", None)
    assert rest["first"] == 2
    assert all(torch.equal(rest["weights"][name], weight) for name, weight in whole["weights"].items())
    for key in ("step", "tokens", "train/loss", "val/loss", "val/accuracy"):
        assert [row[key] for row in (*part["rows"], *rest["rows"])] == [row[key] for row in whole["rows"]]


def _executed(words: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    prepared = prepare(words, say=lambda text: None, worker=True)
    assert execute(prepared) == "finished"
    summary = json.loads((prepared.folder / "summary.json").read_text())
    return summary, pq.read_table(prepared.folder / predictions.FILE).to_pylist()


def test_what_is_recorded(tmp_path: Path) -> None:
    """15 batches of 2: every example once, with the loss and the class that the model gives it alone."""
    words = classifier(tmp_path, *ADAMW, "micro_batch_size=2", "steps=6", "checkpoint.every=null")
    summary, rows = _executed(words)
    assert [row["example"] for row in rows] == list(range(30))
    assert list(rows[0]) == [
        "example", "reference", "prediction", "correct", "loss", "probability", "text",
    ]  # fmt: skip
    truth, found = [row["reference"] for row in rows], [row["prediction"] for row in rows]
    assert [row["correct"] for row in rows] == [a == b for a, b in zip(truth, found)]
    assert all(row["text"] is None for row in rows)
    values = {name: entry["value"] for name, entry in summary["metrics"].items()}
    assert list(values) == ["accuracy", "f1", "matthews"]
    assert values["accuracy"] == pytest.approx(accuracy_score(truth, found))
    assert values["f1"] == pytest.approx(f1_score([x == "1" for x in truth], [x == "1" for x in found]))
    assert values["matthews"] == pytest.approx(matthews_corrcoef(truth, found))
    assert summary["metrics"]["accuracy"] == {
        "value": values["accuracy"],
        "better": "higher",
        "unit": "fraction",
    }
    assert summary["val/loss"] == pytest.approx(sum(row["loss"] for row in rows) / 30, rel=1e-12)
    assert (summary["task"], summary["labels"]) == ("classify", ["0", "1"])
    assert summary["best_metrics"]["accuracy"]["value"] >= values["accuracy"]
    (folder,) = (path.parent for path in tmp_path.rglob("summary.json"))
    assert closing_lines(folder, "finished", "done")[0] == (
        f"finished: done; validation loss {summary['val/loss']:.4f}, accuracy {values['accuracy']:.4f}"
    )
    for row in rows:
        # Two classes: the loss is −log of the reference's probability.
        p = row["probability"] if row["correct"] else 1 - row["probability"]
        assert row["loss"] == pytest.approx(-math.log(p), rel=1e-5)


def _predicted(rank: int, words: list[str], folder: Path) -> list[dict[str, Any]]:
    """Train in this process, which stays in its group, and return what rank 0 wrote."""
    prepared, run = _assembled(words)
    try:
        probes = build_probes(run, prepared.data, folder if rank == 0 else None)
        assert train(run, Callbacks(probes)) == "finished"
    finally:
        run.engine.release()
    return pq.read_table(folder / predictions.FILE).to_pylist() if rank == 0 else []


def test_processes_and_batches_do_not_change_the_predictions(tmp_path: Path, two_ranks: RankPool) -> None:
    """With one validation batch less on the second process, in which it repeats one."""
    words = (*ADAMW, "steps=2")
    alone = _predicted(0, classifier(tmp_path, *words), tmp_path)
    two = classifier(tmp_path, *words, "world_size=2", "micro_batch_size=2")
    rows, nothing = two_ranks.run(_predicted, two, tmp_path)
    assert nothing == []
    for key in ("example", "reference", "prediction"):
        assert [row[key] for row in rows] == [row[key] for row in alone]
    for mine, theirs in zip(alone, rows, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)


def test_the_metrics_are_those_of_the_averaged_weights(tmp_path: Path) -> None:
    words = classifier(tmp_path, "optimizer=adamw", "optimizer.lr=0.03", "optimizer.average_decay=0.9")
    row = trained(0, words).rows[-1]
    assert abs(row["val/raw_loss"] - row["val/loss"]) > 1e-3
    bare = trained(0, classifier(tmp_path, "optimizer=adamw", "optimizer.lr=0.03")).rows[-1]
    assert bare["val/loss"] == row["val/raw_loss"]


def test_the_record_names_all_metrics() -> None:
    from harness.record import schema

    assert schema.TASK_METRICS.keys() == metrics.METRICS.keys()
    assert {name: unit for name, (unit, _) in schema.TASK_METRICS.items()} == {
        name: metric.unit for name, metric in metrics.METRICS.items()
    }


@pytest.mark.parametrize(
    ("change", "key", "text"),
    [
        ("batch_size=65", "batch_size", "64 training examples"),
        ("task.metric=pearson", "task.metric", "is a metric of numbers"),
        ("task.metric=bleu", "task.metric", "is unknown"),
        ("model.config.vocab_size=300", "data.vocab_size", "larger than the model's vocabulary"),
        ("task.text=[sentence1,sentence3]", "task.text", "sentence3"),
        ("task.label=lable", "task.label", "lable"),
        ("task.labels=['0',other]", "task.label", "1"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    change: str, key: str, text: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=text) as refused:
        prepare(classifier(tmp_path, change), say=lambda line: None, writes_folder=False)
    assert refused.value.key == key


@pytest.mark.parametrize("split", ["train", "validation"])
def test_one_class_only_is_refused(split: str, tmp_path: Path) -> None:
    words = classifier(tmp_path)
    path = tmp_path / f"pairs.{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "label": 1}) + "\n" for row in rows))
    with pytest.raises(InputError, match="class") as refused:
        prepare(words, say=lambda line: None, writes_folder=False)
    assert refused.value.key in ("task.label", "task.metric")


def test_the_identity_holds_the_task(tmp_path: Path) -> None:
    def identity(*more: str) -> str:
        return prepare(classifier(tmp_path, *more), say=lambda line: None, writes_folder=False).identity

    assert identity() == identity("micro_batch_size=2") == identity("eval.every=3")
    others = [identity("task.metric=f1"), identity("seed=1"), identity("task.text=[sentence1]")]
    assert len({identity(), *others}) == 4
    assert identity("steps=4") == identity()
