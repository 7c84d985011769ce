"""One list of model keys: what transformers accepts and its models read; values of the right type and size."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import model
from harness.config import checks, compose, model_keys
from harness.config.model_facts import facts
from harness.config.schema import ModelConfig
from harness.errors import InputError

ROUTED = "num_experts_per_tok=2 moe_intermediate_size=16"
ACCEPTED = {
    "qwen3_moe": f"num_experts=4 head_dim=16 {ROUTED}",
    "mixtral": "num_experts=4 head_dim=16",
    "olmoe": "num_local_experts=4 num_experts_per_tok=2 num_key_value_heads=2",
    "gpt2": "hidden_size=32 num_hidden_layers=1 num_attention_heads=2 max_position_embeddings=64",
    "gemma": "head_dim=16 rope_theta=5000.0",
    "falcon": "hidden_size=32 num_attention_heads=2 alibi=true",
    "deepseek_v2": f"n_routed_experts=4 n_group=1 topk_group=1 {ROUTED} q_lora_rank=16 kv_lora_rank=16",
    "glm4_moe": f"num_local_experts=4 n_group=1 topk_group=1 head_dim=16 {ROUTED}",
    "llama": "rope_parameters.rope_theta=5000.0 rope_parameters.rope_type=default",
    "mpt": "attn_config.alibi=true hidden_size=32 n_heads=2 n_layers=1",
    "gemma3": "text_config.hidden_size=32 text_config.num_hidden_layers=1 text_config.intermediate_size=48",
}
SMALL = (
    "hidden_size=32 intermediate_size=48 num_hidden_layers=1 num_attention_heads=2 num_key_value_heads=2 "
    "vocab_size=64"
)


def _words(kind: str, *keys: str) -> list[str]:
    return [f"model.model_type={kind}", *(f"model.config.{key}" for key in keys)]


def _small(kind: str) -> list[str]:
    fields = model_keys.config_fields(kind) or {}
    own = ACCEPTED[kind].split()
    named = {key.partition("=")[0] for key in own}
    return [
        key for key in SMALL.split() if (name := key.partition("=")[0]) in fields and name not in named
    ] + own


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_the_first_check_accepts_the_model_has(kind: str) -> None:
    """The command line's list and that of `build` are one: what composes builds with the values given."""
    config = compose.load(_words(kind, *_small(kind))).model
    attention = "eager" if kind == "mpt" else "sdpa"
    network: Any = model.build(config.model_copy(update={"attention": attention}), seed=0, device="meta")
    for key in ACCEPTED[kind].split():
        name, _, text = key.partition("=")
        value: Any = network.config
        for part in name.split("."):
            value = value[part] if isinstance(value, dict) else getattr(value, part, None)
        if name != "rope_theta":
            assert str(value).lower() == text, name


def test_a_field_that_only_the_model_reads_shapes_it() -> None:
    config = compose.load(_words("qwen3_moe", *_small("qwen3_moe"))).model
    shapes = {
        name: tuple(p.shape) for name, p in model.build(config, seed=0, device="meta").named_parameters()
    }
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (32, 32)
    wider = config.model_copy(update={"config": {**config.config, "head_dim": 24}})
    shapes = {n: tuple(p.shape) for n, p in model.build(wider, seed=0, device="meta").named_parameters()}
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (48, 32)


@pytest.mark.parametrize(
    ("kind", "key", "meant"),
    [
        ("qwen3_moe", "num_expert=4", "num_experts"),
        ("llama", "hidden_dims=4", "hidden_size"),
        ("llama", "num_experts=4", None),
        ("falcon", "head_dim=16", None),
        ("llama", "hidden_size.x=4", None),
        ("gemma3", "text_config.hiden_size=4", "text_config.hidden_size"),
        ("mpt", "attn_config.alibbi=true", "attn_config.alibi"),
        ("gpt2", "classifier_dropout=0.1", None),
    ],
)
def test_what_the_model_does_not_have_is_refused_by_both(kind: str, key: str, meant: str | None) -> None:
    with pytest.raises(InputError, match="unknown key") as caught:
        compose.load(_words(kind, key))
    if meant is not None:
        assert f"model.config.{meant}" in str(caught.value)
    name, _, value = key.partition("=")
    if "." not in name:
        with pytest.raises(InputError, match="is not a key of"):
            model.build(ModelConfig(model_type=kind, config={name: value}), seed=0)


def test_two_names_of_one_field_are_one_key() -> None:
    given_other = compose.load(
        ["model=gpt2_tiny", "model.config.hidden_size=64", "model.config.n_layer=2"]
    ).model
    assert given_other.config["n_embd"] == 64
    assert "hidden_size" not in given_other.config
    assert (facts(given_other).hidden_size, facts(given_other).layers) == (64, 2)
    one = checks.check(compose.load(["model=gpt2_tiny", "model.config.hidden_size=64"]), {}, devices=0)
    two = checks.check(compose.load(["model=gpt2_tiny", "model.config.n_embd=64"]), {}, devices=0)
    assert compose.identity(one, "c", "t") == compose.identity(two, "c", "t")
    with pytest.raises(InputError, match="two values for one key"):
        compose.load(["model=gpt2_tiny", "model.config.hidden_size=64", "model.config.n_embd=32"])


@pytest.mark.slow
def test_every_causal_model_has_the_fields_of_its_class() -> None:
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    base = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    compared = 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        keys = model_keys.model_keys(kind)
        if keys is None:
            continue
        cls: Any = CONFIG_MAPPING[kind]
        real = {field.name for field in dataclasses.fields(cls)}
        assert real - base <= set(keys.fields), kind
        assert set(keys.fields) <= real, kind
        for alias, name in cls.attribute_map.items():
            assert {alias, name} & {*keys.fields, *keys.aliases}, (kind, alias)
        compared += 1
    assert compared > 190


WRONG = [
    "intermediate_size=x",
    "intermediate_size=0",
    "intermediate_size=-8",
    "intermediate_size=4.5",
    "intermediate_size=1e3",
    "intermediate_size=true",
    "intermediate_size=null",
    "intermediate_size=[4]",
    "intermediate_size={a:4}",
    "intermediate_size='4'",
    "intermediate_size=100000000000",
    "num_hidden_layers=100000000",
    "vocab_size=inf",
    "num_key_value_heads=0",
    "head_dim=-2",
    "rms_norm_eps=x",
    "rms_norm_eps=-1e-6",
    "rms_norm_eps=nan",
    "initializer_range=-0.1",
    "attention_dropout=1.5",
    "hidden_act=3",
    "attention_bias=1",
    "tie_word_embeddings=maybe",
    "pad_token_id=1.5",
    "intermediate_size=" + "9" * 4000,
    "intermediate_size=" + "9" * 5000,
    "intermediate_size=-" + "9" * 5000,
    "rms_norm_eps=" + "9" * 5000,
]


@pytest.mark.parametrize("key", WRONG, ids=[key[:40] for key in WRONG])
def test_a_wrong_value_is_one_clear_line(key: str) -> None:
    with pytest.raises(InputError) as caught:
        checks.check(compose.load(_words("llama", key)), {}, devices=0)
    line = str(caught.value)
    assert line.startswith(f"model.config.{key.partition('=')[0]}")
    assert "\n" not in line
    assert "fix:" in line
    assert len(line) < 800


VALUES = st.one_of(
    st.integers(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
NAMES = (
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "rope_parameters",
    "vocab_size",
)


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(["llama", "qwen3", "gpt2", "mixtral"]), name=st.sampled_from(NAMES), value=VALUES)
def test_any_value_is_accepted_or_refused_with_its_key(kind: str, name: str, value: Any) -> None:
    if not model_keys.has_key(kind, name):
        return
    assert _refused_key(ModelConfig(model_type=kind, config={name: value})).startswith("model.config.")


def _refused_key(config: ModelConfig) -> str:
    try:
        facts(config)
    except InputError as error:
        return error.key
    return "model.config.accepted"
