"""A word of another program, or a value in another notation, earns a suggestion that works as it is written."""

from __future__ import annotations

import shlex

import pytest

from harness.config import aliases, compose, sources, suggestions
from harness.config.schema import all_keys, run_keys
from harness.errors import InputError

MEANT = [
    # words as typed, what the error says to type instead
    ("steps=10k", "steps=10000"),
    ("steps=2.5M", "steps=2500000"),
    ("steps=1,000", "steps=1000"),
    ("steps=2^10", "steps=1024"),
    ("seq_len=4k", "seq_len=4096"),
    ("batch_size=10k", "batch_size=10000"),
    ("eval.tokens=1Mi", "eval.tokens=1048576"),
    ("optimizer.lr=5%", "optimizer.lr=0.05"),
    ("optimizer.lr=0,001", "optimizer.lr=0.001"),
    ("optimizer.lr=3e−4", "optimizer.lr=0.0003"),
    ("max_grad_norm=None", "max_grad_norm=null"),
    ("micro_batch_size=auto", "micro_batch_size=null"),
    ("precision=float16", "precision=fp16"),
    ("precision=half", "precision=fp16"),
    ("precision=bf16_mixed", "precision=bf16"),
    ("precision=torch.bfloat16", "precision=bf16"),
    ("precision=BF16", "precision=bf16"),
    ("dtype=float32", "precision=fp32"),
    ("--bf16", "precision=bf16"),
    ("data=std.jsonl", "data=jsonl data.files=std.jsonl"),
    ("data=shards/0.jsonl.gz", "data=jsonl data.files=shards/0.jsonl.gz"),
    ("data=books.parquet", "data=parquet data.files=books.parquet"),
    ("data='my notes.txt'", "data=text 'data.files=\"my notes.txt\"'"),
    ("data=org/corpus", "data.source=datasets data.dataset=org/corpus"),
    ("--dataset kjv", "data=kjv"),
    ("resume=auto", "resume=true"),
    ("--resume", "resume=true"),
    ("lr=0.1", "optimizer.lr=0.1"),
    ("--learning_rate 0.1", "optimizer.lr=0.1"),
    ("model_name=llama_60m", "model=llama_60m"),
    ("model=60m", "model=llama_60m"),
    ("model=some/folder", "model.path=some/folder"),
    ("--steps 100", "steps=100"),
    ("--max-steps=100", "steps=100"),
    ("num_layers=3", "model.config.num_hidden_layers=3"),
    ("model.d_model=64", "model.config.hidden_size=64"),
    ("gpus=2", "world_size=2"),
    ("warmup_steps=20", "schedule.warmup=20"),
    ("lr_scheduler=linear", "schedule=linear"),
    ("optimizer=SGD", "optimizer=torch.optim.SGD optimizer.lr=0.001"),
    ("optimizer=Adam", "optimizer=adamw"),
    ("engine=fsdp", "engine=fsdp2"),
    ("engine=zero_3", "engine=zero3"),
    ("--zero_stage 2", "engine=zero2"),
    ("engine=ds.json", "engine=zero2 engine.config_file=ds.json"),
    ("wandb=offline", "wandb.mode=offline"),
    ("wandb.mode=off", "wandb.mode=disabled"),
    ("checkpoint=100", "checkpoint.every=100"),
    ("eval=never", "eval.every=null"),
    ("--no-wandb", "wandb.mode=disabled"),
    ("config=quickstart", "experiment=quickstart"),
]


def refusal(line: str) -> InputError:
    with pytest.raises(InputError) as caught:
        compose.load(shlex.split(line))
    return caught.value


@pytest.mark.parametrize(("line", "meant"), MEANT, ids=[line for line, _ in MEANT])
def test_the_fix_is_what_was_meant_and_is_accepted(line: str, meant: str) -> None:
    assert refusal(line).fix == meant
    compose.load(shlex.split(meant))


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("--config my.yaml", "optbench train my.yaml"),
        ("--config-file=my.yaml", "optbench train my.yaml"),
        ("config='my run.yaml'", "optbench train 'my run.yaml'"),
        ("-c my.yaml", "optbench train my.yaml"),
        ("experiment=my.yaml", "optbench train my.yaml"),
        ("resume=runs/default/x", "optbench train runs/default/x/config.yaml"),
        ("resume=runs/a/b/checkpoints/step_00000010", "optbench train runs/a/b/config.yaml"),
        ("--resume_from_checkpoint runs/a/b", "optbench train runs/a/b/config.yaml"),
        ("runs/a/b", "optbench train runs/a/b/config.yaml"),
        ("steps=5 --help", "optbench train --help"),
        ("-h", "optbench train --help"),
        ("experiment=margin_head", "optbench margin experiment=margin_head"),
        ("experiment=reconstruct_digits", "optbench reconstruct experiment=reconstruct_digits"),
    ],
)
def test_a_command_is_named_where_a_key_cannot_help(line: str, command: str) -> None:
    assert refusal(line).fix == command


@pytest.mark.parametrize("line", ["gradient_accumulation_steps=4", "--grad_accum 4"])
def test_what_follows_from_other_keys_is_explained(line: str) -> None:
    assert "batch_size" in str(refusal(line).fix)


@pytest.mark.parametrize("line", ["steps=abc", "steps=10q", "precision=int4", "optimizer=zzzqq", "zzqx=1"])
def test_control_no_suggestion_where_nothing_is_near(line: str) -> None:
    assert refusal(line).suggestion is None


def test_tables_name_what_exists() -> None:
    known = [*all_keys(["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"])]
    known += sources.GROUPS
    assert {target for target in aliases.KEYS.values() if target not in known} == set()
    schema = run_keys()
    for name, table in aliases.VALUES.items():
        assert all(schema[name].accepts(value) for value in table.values()), name
    for group, table in aliases.OPTIONS.items():
        missing = {option for option in table.values() if not sources.find(group, option)}
        assert all(option.startswith("torch.optim.") for option in missing), group


@pytest.mark.parametrize(
    ("text", "whole", "number"),
    [
        ("1e400", False, None),
        ("9" * 5000, True, None),
        ("10^99", True, None),
        ("1.5", True, None),
        ("12 000", True, "12000"),
        ("3x10^-4", False, "0.0003"),
        ("", True, None),
    ],
)
def test_numbers_of_other_notations(text: str, whole: bool, number: str | None) -> None:
    value = suggestions.number("steps", text, whole=whole)
    assert value == number or (number is None and value == "inf")


def test_help_offers_only_what_train_can_run() -> None:
    offered = sources.options_of_runs("experiment")
    assert "quickstart" in offered
    for name in offered:
        compose.load([f"experiment={name}"])
    assert {sources.command_of(name) for name in sources.options("experiment")} == {
        "train",
        "margin",
        "reconstruct",
    }
