"""A run from a file: replayed, changed by words, and refused with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config import checks, compose
from harness.config.schema import RunConfig
from harness.errors import InputError

RUNS = [
    [],
    ["model=gpt2_tiny", "optimizer=muon", "seed=3"],
    ["optimizer=torch.optim.SGD", "optimizer.lr=0.1", "optimizer.momentum=0.9"],
    ["optimizer=sumo", "optimizer.rank=8", "name=007", "data=jsonl", "data.files=[a.jsonl,'b c.jsonl']"],
    ["experiment=quickstart", "schedule=wsd", "max_grad_norm=null", "time_limit=2h30m"],
    [
        "schedule.name=wsd",
        "model.name=mine",
        "model.model_type=qwen3",
        "model.config={num_key_value_heads:4}",
    ],
]


def checked(words: list[str]) -> RunConfig:
    return checks.check(compose.load(words), environ={}, devices=0)


def write(folder: Path, content: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
def test_a_replayed_configuration_is_the_same_run(words: list[str], tmp_path: Path) -> None:
    run = checked(words)
    replayed = checked([write(tmp_path, compose.to_yaml(run), "config.yaml")])
    assert replayed == run
    assert compose.identity(replayed, "corpus", "tokenizer") == compose.identity(run, "corpus", "tokenizer")


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
@pytest.mark.parametrize(
    "change",
    [["steps=77"], ["seed=9"], ["world_size=2"], ["batch_size=32"], ["model=llama_9m"], ["optimizer=muon"]],
)
def test_words_after_a_replayed_file_act_as_in_the_first_command(
    words: list[str], change: list[str], tmp_path: Path
) -> None:
    """What the checks derived from other keys follows the change; nothing of the replaced group stays."""
    key = change[0].partition("=")[0]
    if key == "model" and words and words[0].startswith(("model", "schedule.name")):
        pytest.skip("two models in one command")
    kept = [word for word in words if word.split("=")[0].split(".")[0] != key]
    replayed = checked([write(tmp_path, compose.to_yaml(checked(words)), "config.yaml"), *change])
    assert replayed == checked([*kept, *change])


def test_the_difference_alone_is_a_run_too(tmp_path: Path) -> None:
    import yaml

    run = checked(["optimizer=sumo", "optimizer.rank=8", "seq_len=64", "model.config.hidden_size=64"])
    path = write(tmp_path, yaml.safe_dump(compose.difference(run)), "config.diff.yaml")
    assert checked([path]) == run


def test_a_file_by_hand(tmp_path: Path) -> None:
    text = "model: llama_9m\noptimizer:\n  name: sumo\n  lr: 1e-3\n  rank: 16\nsteps: 50\neval.every: 5\nname: no\n"
    path = write(tmp_path, text)
    words = [
        "model=llama_9m",
        "optimizer=sumo",
        "optimizer.lr=1e-3",
        "optimizer.rank=16",
        "steps=50",
        "eval.every=5",
    ]
    assert compose.load([path]) == compose.load([*words, "name=no"])
    assert compose.load([path, "steps=60", "optimizer.rank=8"]).steps == 60
    assert compose.load(["optimizer=adamw", path]).optimizer.options == {}


def test_a_file_may_choose_as_an_experiment_does(tmp_path: Path) -> None:
    path = write(
        tmp_path, "# @package _global_\ndefaults:\n  - override /model: llama_9m\n  - _self_\nsteps: 3\n"
    )
    assert compose.load([path]) == compose.load(["model=llama_9m", "steps=3"])


def test_a_model_of_its_own_has_no_preset_below_it(tmp_path: Path) -> None:
    path = write(tmp_path, "model:\n  name: m\n  model_type: qwen3\n  config: {hidden_size: 64}\n")
    assert compose.load([path]).model.config == {"hidden_size": 64}


@pytest.mark.parametrize(
    ("content", "line", "part"),
    [
        ("steps: 5\nstepz: 6\n", 2, "did you mean steps?"),
        ("optimizer:\n  name: sumo\n  rnk: 4\n", 3, "did you mean optimizer.rank?"),
        ("steps: 5\n\nprecision: half\n", 3, "did you mean fp16?"),
        ("model:\n  config:\n    hiden_size: 4\n", 3, "hidden_size"),
        ("steps: 1\nsteps: 2\n", 2, "duplicate key steps"),
        ("steps: 1\nname: [a\n", 3, "not YAML"),
        ("steps: 1\noptimizer: sumoo\n", 2, "did you mean sumo?"),
        ("steps: 1\nname: ${oc.env:MY_API_KEY}\n", 2, "MY_API_KEY"),
        ("defaults:\n  - nothing\n", 1, "chooses no group"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(
    content: str, line: int, part: str, tmp_path: Path
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(InputError) as caught:
        compose.load([path])
    message = str(caught.value)
    assert path in message
    assert f"line {line}" in message
    assert part in message


@pytest.mark.parametrize(
    "content",
    [
        "",
        "- a\n",
        "just text\n",
        "a: &a {b: *a}\n",
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"{x}: &{x} [*{y},*{y},*{y},*{y},*{y},*{y},*{y},*{y}]\n" for x, y in zip("bcdefgh", "abcdefg")
        ),
        "a: " + "[" * 5000,
        "steps: !!python/object/apply:os.system [true]\n",
        "\x00",
        "model: [1, 2]\n",
        "optimizer: {name: {a: 1}}\n",
        "? [a, b]\n: 1\n",
        "1: 2\n",
        "steps: " + "9" * 5000 + "\n",
    ],
    ids=lambda text: text[:20],
)
def test_a_damaged_file_is_one_line(content: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    with pytest.raises(InputError) as caught:
        compose.load([path])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [["missing.yaml"], ["a.yaml", "b.yaml"]])
def test_one_existing_file(words: list[str]) -> None:
    with pytest.raises(InputError, match=r"does not exist|two files"):
        compose.load(words)
