"""Keys of tasks, and runs whose length is given in epochs."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config import checks, compose, derived_defaults, task_checks
from harness.config.schema import RunConfig
from harness.errors import InputError

ROWS = ("data=jsonl", "data.files=[train.jsonl]", "data.validation_files=[dev.jsonl]")
CLASSIFY = (*ROWS, "task=classify", "task.text=[premise,hypothesis]", "task.label=label")
ANSWER = (*ROWS, "task=answer", 'task.prompt="{question} "', 'task.answer="{answer}"')


def checked(*words: str) -> RunConfig:
    return checks.check(compose.load(words), {}, 0)


@pytest.mark.parametrize("words", [CLASSIFY, ANSWER, ("task=pretrain",), (*CLASSIFY, "task.metric=accuracy")])
def test_a_task_with_its_keys_is_taken(words: tuple[str, ...]) -> None:
    assert f"task={checked(*words).task.name}" in words


@pytest.mark.parametrize(
    ("words", "key", "fix"),
    [
        (("task.text=[a]",), "task.text", "task=classify, or leave out task.text"),
        ((*CLASSIFY, "task.shots=2"), "task.shots", "task=answer, or leave out task.shots"),
        ((*ANSWER, "task.label=x"), "task.label", "task=classify, or leave out task.label"),
        ((*ROWS, "task=classify", "task.label=x"), "task.text", "task.text=[sentence]"),
        ((*ROWS, "task=classify", "task.text=[x]"), "task.label", "task.label=label"),
        ((*ROWS, "task=answer", 'task.prompt="{x}"'), "task.answer", "task.answer="),
        ((*CLASSIFY, "task.generate=every"), "task.generate", "task=answer, or leave out task.generate"),
        ((*ANSWER, 'task.stop=[""]'), "task.stop", r'task.stop=["\n\n"]'),
        ((*CLASSIFY, "eval.tokens=4096"), "eval.tokens", "eval.tokens=auto"),
        (
            (*CLASSIFY, "model.model_type=mixtral", "model.config.output_router_logits=true"),
            "model.config.output_router_logits",
            "model.config.output_router_logits=false",
        ),
        ((*CLASSIFY, "task.labels=[a,b,a]"), "task.labels", "each class once"),
        ((*CLASSIFY, "task.labels=[a,b]", "task.target=number"), "task.labels", "task.labels=null"),
    ],
)
def test_keys_that_the_task_does_not_read_or_lacks_are_refused(
    words: tuple[str, ...], key: str, fix: str
) -> None:
    with pytest.raises(InputError) as refused:
        checked(*words)
    assert refused.value.key == key
    assert fix in str(refused.value.fix)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ((*CLASSIFY, "task.text=[a,b,c]"), "task.text"),
        ((*CLASSIFY, "task.labels=[a]"), "task.labels"),
        ((*ANSWER, "task.shots=-1"), "task.shots"),
        ((*ANSWER, "task.max_new_tokens=0"), "task.max_new_tokens"),
        ((*ANSWER, "task.extract=regex"), "task.extract"),
        ((*ANSWER, "task.generate=never"), "task.generate"),
        ((*ANSWER, "task.generation_batch_size=0"), "task.generation_batch_size"),
        (("task=classfy",), "task"),
        (("epochs=0",), "epochs"),
        (("epochs=nan",), "epochs"),
    ],
)
def test_values_out_of_bounds_are_refused(words: tuple[str, ...], key: str) -> None:
    with pytest.raises(InputError) as refused:
        compose.load([*words])
    assert refused.value.key == key


@pytest.mark.parametrize(
    ("epochs", "examples", "batch_size", "steps"),
    [
        (1, 100, 10, 10),
        (1, 101, 10, 11),
        (3, 2490, 16, 467),
        (0.5, 100, 10, 5),
        (0.3, 10, 3, 1),
        (1e-9, 5, 4, 1),
    ],
)
def test_steps_of_epochs(epochs: float, examples: int, batch_size: int, steps: int) -> None:
    assert task_checks.steps_of(epochs, examples, batch_size) == steps


def test_what_follows_from_the_steps_is_found_once_they_are_known() -> None:
    # 300 steps of warm-up do not fit the default of 200 steps, but three epochs of 2000 samples.
    config = checked("epochs=3", "schedule.warmup=300", "batch_size=16")
    assert (config.epochs, config.eval.tokens) == (3, "auto")
    config = checks.with_epochs(config, 2000)
    assert config.steps == 375
    assert config.eval.tokens == derived_defaults.default_evaluation_tokens(config)
    with pytest.raises(InputError, match="longer than the run"):
        checks.with_epochs(config, 1000)


def test_steps_and_epochs_in_one_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two lengths"):
        compose.load(["steps=3", "epochs=2"])
    path = tmp_path / "run.yaml"
    path.write_text("steps: 3\nepochs: 2\n")
    with pytest.raises(InputError, match="two lengths"):
        compose.load([str(path)])


def test_the_place_that_is_read_last_decides_the_length(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("epochs: 2\n")
    assert compose.load([str(path)]).epochs == 2
    config = compose.load([str(path), "steps=7"])
    assert (config.steps, config.epochs) == (7, None)


def test_a_recorded_run_may_hold_both(tmp_path: Path) -> None:
    config = checks.with_epochs(checked("epochs=3"), 2000)
    path = tmp_path / "config.yaml"
    path.write_text(compose.to_yaml(config))
    again = compose.load([str(path)])
    assert (again.steps, again.epochs) == (375, 3)
    assert compose.load([str(path), "steps=7"]).epochs is None
    longer = compose.load([str(path), "epochs=4"])
    assert checks.with_epochs(checks.check(longer, {}, 0), 2000).steps == 500
    assert "steps" not in compose.difference(config)


@pytest.mark.parametrize(
    ("words", "examples", "every"),
    [
        (("epochs=3",), 1600, 100),
        (("epochs=20",), 1600, 200),
        (("steps=50",), None, 5),
        (("epochs=1",), 1600, 10),
    ],
)
def test_tasks_are_evaluated_once_an_epoch_or_ten_times(
    words: tuple[str, ...], examples: int | None, every: int
) -> None:
    config = checked(*CLASSIFY, *words, "batch_size=16")
    if examples is not None:
        config = checks.with_epochs(config, examples)
    assert config.eval.tokens == "auto"
    assert derived_defaults.evaluation_interval(config) == every


def test_evaluations_of_tasks_keep_to_a_tenth_of_the_compute() -> None:
    # Training costs 3 × 800 forward passes; of 240 that evaluations may take, one of 60 examples takes 60.
    config = checked(*CLASSIFY, "steps=50", "batch_size=16")
    assert derived_defaults.evaluation_interval(config, 60) == 13
    assert derived_defaults.evaluation_interval(config, 20) == 5
    assert derived_defaults.evaluation_interval(config, 10_000) == 50


def test_default_rates_are_not_tuned_for_tasks() -> None:
    config = checked(*CLASSIFY, "model=llama_tiny", "optimizer=sumo")
    assert not config.optimizer.lr_tuned
    assert "pretraining" in str(config.optimizer.lr_source)
    assert checked("model=llama_tiny", "optimizer=sumo").optimizer.lr_tuned
