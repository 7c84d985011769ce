"""Shapes and parameter counts without torch, against transformers' own models on the meta device."""

from __future__ import annotations

import dataclasses

import pytest

from harness.config.compose import load
from harness.config.model_checks import alignment_warning
from harness.config.model_facts import facts, full_config
from harness.config.model_keys import config_fields
from harness.config.schema import ModelConfig

SIZES = {
    "llama_60m": 58.07,
    "llama_130m": 134.11,
    "llama_350m": 367.97,
    "llama_1b": 1339.08,
    "llama_1b_5464": 1339.53,
    "llama_7b": 6738.42,
}


@pytest.mark.parametrize(("name", "millions"), SIZES.items())
def test_published_sizes(name: str, millions: float) -> None:
    """The five sizes of the GaLore protocol, to the two digits that are published."""
    parameters = facts(load([f"model={name}"]).model).parameters
    assert parameters is not None
    assert f"{parameters / 1e6:.2f}" == f"{millions:.2f}"


VARIANTS = [
    (
        "llama",
        {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    ("llama", {"head_dim": 16}),
    ("mistral", {"num_key_value_heads": 2}),
    ("qwen2", {"num_key_value_heads": 2}),
    ("qwen3", {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}),
    ("gpt2", {"n_inner": 100}),
    ("gpt2", {"tie_word_embeddings": False}),
]


@pytest.mark.parametrize(("kind", "extra"), VARIANTS)
def test_counts_and_shapes_equal_the_real_model(kind: str, extra: dict[str, object]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, object] = (
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
        if kind == "gpt2"
        else {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 172}
    )
    config = {"vocab_size": 300, **sizes, **extra}
    found = facts(ModelConfig(model_type=kind, config=config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    weights = dict(model.named_parameters())
    assert found.matrices is not None
    for name, shape in found.matrices.items():
        if name in weights:
            assert tuple(weights[name].shape) == shape
    hidden = {n for n, p in weights.items() if p.ndim == 2 and ".0." in n}
    assert {name.partition(" ")[0] for name in found.matrices} == hidden


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_fields_equal_the_real_class(kind: str) -> None:
    from transformers import AutoConfig

    declared = {field.name: field.default for field in dataclasses.fields(type(AutoConfig.for_model(kind)))}
    fields = config_fields(kind)
    assert fields is not None
    for name, default in fields.items():
        if isinstance(default, (bool, int, str)) and isinstance(declared.get(name), (bool, int, str)):
            assert declared[name] == default, name
    assert {"vocab_size", "tie_word_embeddings"} <= set(fields)
    assert "hiden_size" not in fields


def test_aliases_are_one_value() -> None:
    values = full_config(ModelConfig(model_type="gpt2", config={"hidden_size": 64}))
    assert values["n_embd"] == 64
    assert facts(ModelConfig(model_type="gpt2", config={"n_layer": 3})).layers == 3


def test_unknown_types_say_nothing() -> None:
    assert config_fields("no_such_model") is None
    assert facts(ModelConfig(model_type="no_such_model", config={"hidden_size": 64})).parameters is None


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (
            ["model=llama_1b", "precision=bf16"],
            "no multiples of 8 (5461) make bf16 products slow on GPUs; to compare",
        ),
        (["model=llama_1b_5464", "precision=bf16"], None),
        (["model=llama_1b", "precision=fp32"], None),
        (["model=llama_60m", "precision=bf16"], None),
        (["model=llama_60m", "precision=fp16", "model.config.vocab_size=32001"], "(32001) make fp16"),
    ],
)
def test_sizes_that_are_slow_on_gpus_are_said(words: list[str], part: str | None) -> None:
    line = alignment_warning(load(words))
    assert (line is None) == (part is None)
    assert part is None or part in str(line)
