"""The published protocols of fine-tuning: each composes, with the settings that its source prints."""

from __future__ import annotations

import pytest

from harness.config import checks
from harness.config.compose import load
from harness.config.schema import RunConfig
from harness.errors import InputError

# Tables 10 (rank 4) and 11 (rank 8) of arXiv 2505.24749: task → learning rates.
RATES = {
    "mnli": (1e-5, 1e-5),
    "sst2": (1e-5, 2e-5),
    "mrpc": (3e-5, 2e-5),
    "cola": (3e-5, 1e-5),
    "qnli": (1e-5, 1e-5),
    "qqp": (1e-5, 2e-5),
    "rte": (1e-5, 2e-5),
    "stsb": (1e-5, 3e-5),
}
METRICS = {"cola": "matthews", "stsb": "pearson", "mrpc": "f1"}
RANDOM = ["model.path=null", "world_size=1"]


def composed(*words: str) -> RunConfig:
    return checks.check(load([*words, *RANDOM]), environ={}, devices=0)


@pytest.mark.parametrize("task", RATES)
def test_glue_of_galore(task: str) -> None:
    higher = composed("experiment=glue_galore", f"data.name={task}", "optimizer.rank=8")
    config = composed("experiment=glue_galore", f"data.name={task}")
    for found, scale, rate in zip((config, higher), (4.0, 2.0), RATES[task], strict=True):
        assert (found.optimizer.lr, found.optimizer.options["alpha"]) == (rate, scale)
        assert found.optimizer.options["refresh_interval"] == 500
    assert (config.epochs, config.batch_size, config.seq_len) == (30, 32 if task == "cola" else 16, 512)
    assert (config.schedule.name, config.schedule.warmup, config.max_grad_norm) == ("linear", 0, None)
    assert (config.data.subset, config.task.metric) == (task, METRICS.get(task, "accuracy"))
    assert config.task.target == ("number" if task == "stsb" else "auto")


def test_optimizers_of_the_paper_take_the_rates_and_others_their_own() -> None:
    for name in ("sumo_paper", "sumo_ns5", "sumo", "sumo_official"):
        options = composed("experiment=glue_galore", "data.name=cola", f"optimizer={name}").optimizer
        assert (options.lr, options.options["rank"], options.options["alpha"]) == (3e-5, 4, 4.0)
        inner = ["query", "key", "value", "intermediate.dense"]
        assert options.options["matrix_modules"] == (inner if name == "sumo_official" else None)
    adamw = composed("experiment=glue_galore", "optimizer=adamw").optimizer
    assert adamw.lr_source != "given"
    assert composed("experiment=glue_galore", "optimizer=muon", "optimizer.lr=1e-3").optimizer.lr == 1e-3


def test_glue_of_frugal_and_ldadam() -> None:
    # scripts/glue/rank_8 at c7ebe4c: rate, batch, epochs.
    rows = {"mrpc": (2e-4, 16, 30), "cola": (5e-4, 256, 80), "rte": (2e-4, 32, 80), "sst2": (5e-5, 128, 60)}
    for task, row in rows.items():
        config = composed("experiment=glue_frugal", f"data.name={task}", "precision=fp32")
        assert (config.optimizer.lr, config.batch_size, config.epochs) == row
        assert config.schedule.warmup == 0.06
    config = composed("experiment=glue_ldadam")
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.options["rank"]) == (
        "ldadam",
        1e-5,
        8,
    )
    assert (config.epochs, config.seq_len, config.batch_size) == (3, 128, 16)
    assert list(config.optimizer.options["betas"]) == [0.908, 0.99]
    assert config.data.validation_split == "validation_matched"


@pytest.mark.parametrize(
    "preset", ["glue_frugal data.name=qnli", "glue_ldadam data.name=rte", "glue data.name=wnli"]
)
def test_a_task_that_the_source_does_not_have_is_refused(preset: str) -> None:
    with pytest.raises(InputError, match=r"data\.name: (qnli|rte|wnli) has no row in"):
        composed(*f"experiment={preset}".split(), "precision=fp32")


def test_answers_of_sumo() -> None:
    config = composed("experiment=gsm8k_sumo", "optimizer=galore", "task.shots=8")
    assert (config.batch_size, config.epochs, config.optimizer.options["rank"]) == (32, 10, 64)
    assert (config.task.extract, config.task.shots, config.data.dataset) == ("hashes", 8, "openai/gsm8k")
    assert config.task.prompt == "Question: {question}\nAnswer: "
    config = composed(
        "experiment=mawps_sumo", "optimizer.rank=128", "data.files=[t.json]", "data.validation_files=[v.json]"
    )
    assert (config.task.extract, config.optimizer.options["rank"], config.data.source) == (
        "last_number",
        128,
        "json",
    )


def test_the_board_of_peft() -> None:
    # default_training_params.json at 405490e; the rate of full fine-tuning is that of its experiment.
    config = composed("experiment=peft_metamath", "data.files=[t.jsonl]", "data.validation_files=[v.jsonl]")
    assert (config.steps, config.batch_size, config.seq_len, config.max_grad_norm) == (5000, 4, 768, 1.0)
    assert (config.precision, config.schedule.name, config.schedule.min_lr_ratio) == (
        "bf16_pure",
        "cosine",
        0.0,
    )
    assert (config.optimizer.lr, config.optimizer.options["weight_decay"]) == (1e-5, 0.1)
    assert config.task.prompt == "Question: {query} Think step by step.\nAnswer:"


@pytest.mark.parametrize(
    "preset", ["glue", "glue_galore", "glue_frugal", "glue_ldadam", "gsm8k_sumo", "mawps_sumo"]
)
def test_the_pretrained_model_is_asked_for(preset: str) -> None:
    """Random weights under a protocol of fine-tuning would train, and say nothing."""
    words = [f"experiment={preset}", "world_size=1", "precision=fp32"]
    if preset == "mawps_sumo":
        words += ["data.files=[train.json]", "data.validation_files=[test.json]"]
    with pytest.raises(InputError, match=r"model\.path: models/"):
        checks.check(load(words), environ={}, devices=0)
