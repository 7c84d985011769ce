"""Command-line words and YAML files become a configuration, or an error that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config.checks import check
from harness.config.compose import difference, load, load_file, to_yaml
from harness.config.schema import RunConfig
from harness.errors import InputError

BAD_WORDS = [
    # words, what the message starts with, what else it holds
    (["sumo"], "sumo: is not an assignment", ["did you mean optimizer=sumo?", "fix: optimizer=sumo"]),
    (["optimizer.name", "muon"], "optimizer.name: is not an assignment", ["fix: optimizer.name=muon"]),
    (["--steps", "5"], "--steps: is not an assignment", ["did you mean steps=5?"]),
    (["--steps=5"], "--steps=5: is not an assignment", ["fix: steps=5"]),
    (["steps:5"], "steps:5: is not an assignment", ["fix: steps=5"]),
    (["--"], "--: is not an assignment", ["allowed: key=value"]),
    ([""], "'': is not an assignment", ["leave it out"]),
    (["=5"], "=5: is not an assignment", []),
    (["~optimizer"], "~optimizer: deletes a key", []),
    (["steps=(5"], "steps: (5 cannot be read", ["""fix: put it in quotes: 'steps="(5"'"""]),
    (["optimizer.lr=1,2"], "optimizer.lr: 1,2 is several values", ["fix: optimizer.lr=1"]),
    (["data.files=a,b"], "data.files: a,b is several values", ["data.files=[a,b]"]),
    (["steps=range(1,3)"], "steps: range(1,3) is several values", []),
    (["optimizer@model=sumo"], "optimizer@model: sumo moves a group", ["fix: optimizer=sumo"]),
    (["steps=5", "steps=6"], "steps: 5 and 6 are two values for one key", []),
    (["model.config={hidden_size:4}", "model.config.hidden_size=8"], "model.config.hidden_size: 4 and 8", []),
    (["optimizer=sumo", "optimizer=muon"], "optimizer: sumo and muon are two values", []),
    (["optimizer=sumo", "optimizer.name=muon"], "optimizer: sumo and muon are two choices", []),
    (["optimizer=sumo", "optimizer.target=a.B"], "optimizer: sumo and a.B are two choices", []),
    (
        ["optimizer=sumoo"],
        "optimizer: sumoo is wrong",
        ["did you mean sumo?", "allowed: adamuon, adamw, apollo", "=sumo"],
    ),
    (["model=lama_tiny"], "model: lama_tiny is wrong", ["fix: model=llama_tiny"]),
    (["experiment=quickstar"], "experiment: quickstar is wrong", ["fix: experiment=quickstart"]),
    (["engine=fsdp9"], "engine: fsdp9 is wrong", ["did you mean fsdp2?", "allowed: auto, ddp, fsdp2"]),
    (
        ["optimizer.lrr=0.1"],
        "optimizer.lrr: 0.1 is for an unknown key",
        ["did you mean optimizer.lr?", "=0.1"],
    ),
    (["rank=8"], "rank: 8 is for an unknown key", ["did you mean optimizer.rank?", "fix: optimizer.rank=8"]),
    (["stepss=5"], "stepss: 5 is for an unknown key", ["did you mean steps?", "fix: steps=5"]),
    (["optimizr=sumo"], "optimizr: sumo is for an unknown key", ["fix: optimizer=sumo"]),
    (["zzqx=1"], "zzqx: 1 is for an unknown key", ["allowed: steps, epochs, seed", "fix: remove zzqx"]),
    (["steps.x=3"], "steps.x: 3 is for an unknown key", []),
    (["optimizer.lr_source=me"], "optimizer.lr_source: me is for an unknown key", []),
    (["model.config.hiden_size=5"], "model.config.hiden_size: 5", ["did you mean model.config.hidden_size?"]),
    (["model.config.hidden_size.x=5"], "model.config.hidden_size.x: 5 is for an unknown key", []),
    (["model=gpt2_tiny", "model.config.rms_norm_eps=1"], "model.config.rms_norm_eps: 1", []),
    (["steps=abc"], "steps: abc is wrong", ["allowed: a whole number ≥ 1"]),
    (["steps=1.5"], "steps: 1.5 is wrong", ["a whole number"]),
    (["steps=true"], "steps: true is wrong", ["a whole number"]),
    (["steps=0"], "steps: 0 is wrong", []),
    (["steps="], "steps: is wrong", []),
    (["batch_size=0"], "batch_size: 0 is wrong", ["≥ 1", "fix: batch_size=16"]),
    (["world_size=0"], "world_size: 0 is wrong", ["or null"]),
    (["optimizer.lr=-1"], "optimizer.lr: -1 is wrong", ["a number > 0"]),
    (["optimizer.lr=inf"], "optimizer.lr: inf is wrong", []),
    (["optimizer.lr=nan"], "optimizer.lr: nan is wrong", []),
    (["optimizer.lr=true"], "optimizer.lr: true is wrong", []),
    (["precision=fp31"], "precision: fp31 is wrong", ["did you mean fp32?", "bf16_pure"]),
    (["eval.every=often"], "eval.every: often is wrong", ["or auto or null"]),
    (["eval.every=0"], "eval.every: 0 is wrong", []),
    (["eval=5"], "eval: 5 is a group of keys", ["every, tokens"]),
    (["data.files=true"], "data.files: true is wrong", ["fix: data.files=[true]"]),
    (["overwrite=maybe"], "overwrite: maybe is wrong", ["true, false"]),
    (["schedule.min_lr_ratio=2"], "schedule.min_lr_ratio: 2 is wrong", ["≥ 0 and ≤ 1"]),
]


@pytest.mark.parametrize(("words", "start", "parts"), BAD_WORDS, ids=[" ".join(w) for w, _, _ in BAD_WORDS])
def test_bad_words_are_refused_in_one_line(words: list[str], start: str, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load(words)
    message = str(caught.value)
    assert message.startswith(start)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_defaults() -> None:
    config = load([])
    assert (config.model.name, config.data.name, config.optimizer.name) == ("llama_tiny", "kjv", "adamw")
    assert config.model.config["hidden_size"] == 128
    assert difference(config) == {}


def test_groups_values_and_order_of_words_do_not_matter() -> None:
    words = [
        "optimizer.rank=128",
        "model=llama_60m",
        "optimizer=sumo",
        "steps=1000",
        "model.config.vocab_size=50",
    ]
    one, other = load(words), load(words[::-1])
    assert one == other
    assert one.optimizer.options == {"rank": 128}
    assert one.model.config["vocab_size"] == 50
    assert one.model.config["num_hidden_layers"] == 8


def test_values_of_every_kind() -> None:
    config = load(
        [
            "optimizer.lr=1e-3",
            "max_grad_norm=null",
            "overwrite=true",
            "data.files=[a/*.txt,'b c.txt']",
            "model.config={hidden_size:64,num_attention_heads:2}",
            "name='a b'",
            "eval.every=5",
            "optimizer=galore",
            "optimizer.betas=[0.8,0.9]",
            "+moments.every=null",
        ]
    )
    assert config.optimizer.lr == 1e-3
    assert config.max_grad_norm is None
    assert config.overwrite is True
    assert config.data.files == ["a/*.txt", "b c.txt"]
    assert config.model.config["hidden_size"] == 64
    assert config.model.config["vocab_size"] == 4096
    assert config.name == "a b"
    assert config.eval.every == 5
    assert config.optimizer.options == {"betas": [0.8, 0.9]}
    assert config.moments.every is None


@pytest.mark.parametrize("text", ["007", "1e3", "12", "true", "2024-01-01"])
def test_names_stay_as_typed(text: str) -> None:
    assert load([f"name={text}"]).name == text


def test_the_home_folder_is_expanded() -> None:
    assert load(["runs_dir=~/my_runs"]).runs_dir == str(Path.home() / "my_runs")


def test_the_same_value_twice_is_no_conflict() -> None:
    assert load(["steps=5", "steps=5"]).steps == 5


@pytest.mark.parametrize("word", ["experiment=quickstart", "+experiment=quickstart"])
def test_experiments(word: str) -> None:
    config = load([word])
    assert (config.model.name, config.world_size) == ("llama_tiny", 2)
    assert load([word, "world_size=3"]).world_size == 3


def test_an_optimizer_by_import_path_takes_any_option() -> None:
    config = load(["optimizer=torch.optim.SGD", "optimizer.lr=0.1", "optimizer.momentum=0.9"])
    assert (config.optimizer.name, config.optimizer.target) == ("SGD", "torch.optim.SGD")
    assert config.optimizer.options == {"momentum": 0.9}
    assert load(["optimizer.target=torch.optim.SGD"]).optimizer.name == "SGD"
    assert load(["optimizer.target=torch.optim.SGD", "optimizer.name=mine"]).optimizer.name == "mine"


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load(["optimizer=sumo", "optimizer.rank=8", "name=007", "data.files=[a]", "optimizer.lr=3e-5"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_file(path) == config
    assert isinstance(load_file(path), RunConfig)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("stepss: 5\n", "did you mean steps?"),
        ("optimizer: {lrr: 5}\n", "did you mean optimizer.lr?"),
        ("steps: many\n", "a whole number"),
        ("- a\n", "holds no keys"),
        ("a: [\n", "cannot be read"),
        (None, "does not exist"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str | None, part: str) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_file(path)
    assert str(path) in str(caught.value)
    assert part in str(caught.value)


def test_difference_leaves_out_what_the_checks_derive() -> None:
    checked = check(load(["optimizer=galore", "world_size=2"]), {}, 0)
    assert difference(checked) == {"optimizer.name": "galore", "world_size": 2}
    other = check(load(["micro_batch_size=2", "engine=ddp", "optimizer.lr=0.5", "world_size=2"]), {}, 0)
    assert difference(other) == {"optimizer.lr": 0.5, "world_size": 2, "micro_batch_size": 2}
    own = check(load(["optimizer=galore", "optimizer.aux_lr=0.5", "world_size=1"]), {}, 0)
    assert difference(own) == {"optimizer.name": "galore", "world_size": 1, "optimizer.aux_lr": 0.5}


def test_difference_names_what_was_changed() -> None:
    config = load(["optimizer=sumo", "optimizer.rank=8", "seq_len=64", "model.config.hidden_size=64"])
    assert difference(config) == {
        "model.config.hidden_size": 64,
        "optimizer.name": "sumo",
        "optimizer.rank": 8,
        "seq_len": 64,
    }
