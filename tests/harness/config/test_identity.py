"""Which changes make another run, and which make another comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.config import checks, compose
from harness.config.identity import comparison_key, differing_keys, identity
from harness.config.schema import RunConfig


def make(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {"model": {"config": {"hidden_size": 64}}}
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return RunConfig.model_validate(values)


def keys_of(config: RunConfig, corpus: str = "c", tokenizer: str = "t") -> tuple[str, str]:
    return identity(config, corpus, tokenizer), comparison_key(config, corpus, tokenizer)


SAME = [
    {"world_size": 4},
    {"micro_batch_size": 2},
    {"engine__name": "ddp"},
    {"engine__name": "zero3"},
    {"engine__threads": 2},
    {"engine__optimizer_work": "split"},
    {"engine__check_replicas_every": 3},
    {"engine__shard_axis": 1},
    {"engine__replicas": 2},
    {"engine__reshard_after_forward": False},
    {"engine__reduce_every_micro_batch": False},
    {"engine__config_file": "x"},
    {"log_every": 3},
    {"eval__every": 3},
    {"moments__every": None},
    {"name": "x"},
    {"group": "x"},
    {"runs_dir": "x"},
    {"overwrite": True},
    {"wandb__mode": "disabled"},
    {"model__name": "x"},
    {"model__compile": True},
    {"model__attention": "eager"},
    {"data__name": "x"},
    {"data__cache_dir": "x"},
    {"optimizer__lr_source": "x"},
]
OTHER_COMPARISON = [
    {"steps": 7},
    {"batch_size": 8},
    {"seq_len": 64},
    {"precision": "bf16"},
    {"max_grad_norm": None},
    {"model__config": {"hidden_size": 65}},
    {"model__model_type": "gpt2"},
    {"data__mode": "padded"},
    {"schedule__name": "wsd"},
    {"schedule__warmup": 0.2},
    {"eval__tokens": 1000},
]
OTHER_RUN = [{"seed": 1}, {"optimizer__name": "sumo"}, {"optimizer__lr": 0.1}, {"optimizer__rank": 8}]


@pytest.mark.parametrize("change", SAME, ids=str)
def test_what_does_not_change_the_result(change: dict[str, Any]) -> None:
    assert keys_of(make(**change)) == keys_of(make())
    assert differing_keys(make(**change), make()) == []


@pytest.mark.parametrize("change", OTHER_COMPARISON, ids=str)
def test_what_makes_another_task(change: dict[str, Any]) -> None:
    changed, base = keys_of(make(**change)), keys_of(make())
    assert changed[0] != base[0]
    assert changed[1] != base[1]
    assert differing_keys(make(**change), make())


@pytest.mark.parametrize("change", OTHER_RUN, ids=str)
def test_what_makes_another_run_of_the_same_task(change: dict[str, Any]) -> None:
    changed, base = keys_of(make(**change)), keys_of(make())
    assert changed[0] != base[0]
    assert changed[1] == base[1]


def test_how_an_answer_ends_makes_another_task_and_how_often_it_is_generated_does_not() -> None:
    base = make(task__name="answer")
    for key, value in {"generate": "every", "generation_batch_size": 3}.items():
        assert keys_of(make(task__name="answer", **{f"task__{key}": value})) == keys_of(base)
    for key, value in {"stop": ["\n"], "max_new_tokens": 9, "extract": "text", "shots": 2}.items():
        changed = make(task__name="answer", **{f"task__{key}": value})
        assert keys_of(changed)[1] != keys_of(base)[1]
        assert differing_keys(changed, base) == [f"task.{key}"]


def test_corpus_and_tokenizer_count() -> None:
    base = keys_of(make())
    for other in (keys_of(make(), corpus="d"), keys_of(make(), tokenizer="u")):
        assert other[0] != base[0]
        assert other[1] != base[1]


def test_differing_keys_are_dotted() -> None:
    assert differing_keys(make(seed=1, optimizer__name="sumo"), make()) == ["optimizer.name", "seed"]


def test_identity_does_not_depend_on_the_order_of_keys() -> None:
    a = make(model__config={"hidden_size": 64, "vocab_size": 5})
    b = make(model__config={"vocab_size": 5, "hidden_size": 64})
    assert keys_of(a) == keys_of(b)


def test_starting_weights_count_by_content_not_by_path(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    first = keys_of(make(model__path=str(tmp_path / "a")))
    assert keys_of(make(model__path=str(tmp_path / "b"))) == first
    (tmp_path / "b" / "model.safetensors").write_bytes(b"Weights")
    assert keys_of(make(model__path=str(tmp_path / "b"))) != first


def checked(tmp_path: Path, devices: int, *words: str) -> RunConfig:
    overrides = [*words, "world_size=1", "precision=fp32", f"runs_dir={tmp_path}"]
    return checks.check(compose.load(overrides), environ={}, devices=devices)


def test_the_method_of_the_exact_factor_is_part_of_the_identity(tmp_path: Path) -> None:
    on_cpu, on_cuda = (checked(tmp_path, devices, "optimizer=sumo") for devices in (0, 1))
    # "auto", as ever: runs on CPUs keep their identity.
    assert on_cpu.optimizer.options["orthogonalizer"] == "auto"
    assert on_cuda.optimizer.options["orthogonalizer"] == "dwh"
    assert differing_keys(on_cpu, on_cuda) == ["optimizer.orthogonalizer"]
    assert keys_of(on_cpu)[0] != keys_of(on_cuda)[0]
    # Optimizers of one comparison are run on one kind of device, and the table names this option where arms differ.
    assert keys_of(on_cpu)[1] == keys_of(on_cuda)[1]
    # What a folder recorded is read the same on any machine, and checking it again changes nothing.
    assert checks.check(on_cuda, environ={}, devices=0) == on_cuda


@pytest.mark.parametrize(
    "words", [("optimizer=muon",), ("optimizer=adamw",), ("optimizer=sumo", "optimizer.orthogonalizer=gram")]
)
def test_only_a_method_that_is_left_to_the_device_is_written_out(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    on_cpu, on_cuda = (checked(tmp_path, devices, *words) for devices in (0, 1))
    assert keys_of(on_cpu) == keys_of(on_cuda)
