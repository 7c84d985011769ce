"""bf16 weights with fp32 buffers: rotary angles against fp64, every family's buffers, DeepSpeed's casts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness import engines, model
from harness.config.schema import ModelConfig
from harness.engines.deepspeed import exact_buffers
from harness.errors import InputError
from harness.model.build import cast_parameters
from harness.preparation import prepare
from harness.run import assemble
from tests.harness.running import in_new_process, small, write_documents

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen3": {**SIZES, "num_key_value_heads": 2, "head_dim": 16},
    "gemma3_text": {**SIZES, "num_key_value_heads": 2, "head_dim": 16},
    "deepseek_v3": {**SIZES, **LATENT},
    "gptj": {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8},
    "mpt": {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 2},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2},
}
POSITIONS = 8192


def _config(kind: str) -> ModelConfig:
    return ModelConfig(model_type=kind, config=FAMILIES[kind], attention="eager" if kind == "mpt" else "sdpa")


def _worst_angle(network: Any) -> float:
    """Largest distance of (cos, sin) from the fp64 values, which is the angle's error for small errors."""
    rotary, width = network.model.rotary_emb, 16
    positions = torch.arange(POSITIONS)[None]
    cosine, sine = rotary(torch.zeros(1, POSITIONS, width), positions)
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = positions[0].double()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return float(torch.hypot(cosine[0].double() - angles.cos(), sine[0].double() - angles.sin()).max())


def test_rotary_angles_of_pure_bf16_equal_fp64_up_to_position_8191() -> None:
    network = model.build(_config("llama"), seed=0, precision="bf16_pure")
    # fp32 frequencies are off by 2^-24, times 8191; the fp32 product as much again.
    assert _worst_angle(network) < 2e-3
    # Control: what `Module.to` does to the frequencies turns the angles at random.
    assert _worst_angle(network.to(torch.bfloat16)) > 1.0


@pytest.mark.parametrize("kind", FAMILIES)
def test_parameters_are_cast_and_buffers_are_not(kind: str) -> None:
    exact = model.build(_config(kind), seed=0)
    rounded = model.build(_config(kind), seed=0, precision="bf16_pure")
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    for (name, whole), (_, other) in zip(exact.named_buffers(), rounded.named_buffers(), strict=True):
        assert whole.dtype == other.dtype, name
        assert torch.equal(whole, other), name
    ids = torch.randint(64, (2, 8))
    model.loss_sum(rounded(input_ids=ids).logits, ids).backward()


def test_a_persistent_buffer_comes_exact_from_a_folder(tmp_path: Path) -> None:
    network: Any = model.build(_config("deepseek_v3"), seed=0)
    bias = network.model.layers[0].mlp.gate.e_score_correction_bias
    bias.copy_(torch.tensor([1 + 2**-20, 0.1, -0.3, 0.7]))
    network.save_pretrained(tmp_path / "saved")
    loaded: Any = model.build(ModelConfig(path=str(tmp_path / "saved")), seed=0, precision="bf16_pure")
    again = loaded.model.layers[0].mlp.gate.e_score_correction_bias
    assert again.dtype == torch.float32
    assert torch.equal(again, bias)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_a_model_that_cannot_mix_dtypes_is_refused() -> None:
    """MiniMax multiplies hidden states with decay buffers, which pure bf16 would round."""
    config = ModelConfig(
        model_type="minimax",
        config={**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 2},
    )
    with pytest.raises(
        InputError, match=r"precision: bf16_pure does not work with minimax.*fix: precision=bf16"
    ):
        model.build(config, seed=0, precision="bf16_pure")
    model.build(config, seed=0)


def test_tied_weights_stay_tied() -> None:
    tied = ModelConfig(model_type="llama", config={**SIZES, "tie_word_embeddings": True})
    network: Any = model.build(tied, seed=0, precision="bf16_pure")
    assert network.lm_head.weight is network.model.embed_tokens.weight


def test_casts_of_a_library_are_undone() -> None:
    network = torch.nn.Module()
    network.register_buffer("slopes", torch.tensor([1 / 3, 0.1]))
    network.register_buffer("count", torch.tensor(3))
    network.weight = torch.nn.Parameter(torch.ones(2))
    with exact_buffers(network):
        network.to(torch.bfloat16)
    assert torch.equal(network.get_buffer("slopes"), torch.tensor([1 / 3, 0.1]))
    assert network.get_parameter("weight").dtype == torch.bfloat16
    cast_parameters(network, torch.float32)
    assert network.get_parameter("weight").dtype == torch.float32


@pytest.mark.parametrize(
    "engine",
    ["zero3", pytest.param("zero1", marks=pytest.mark.slow), pytest.param("fsdp2", marks=pytest.mark.slow)],
)
def test_engines_leave_buffers_exact(engine: str, tmp_path: Path) -> None:
    words = small(write_documents(tmp_path), tmp_path, f"engine={engine}", "precision=bf16")
    assert in_new_process(_worst_angle_on_engine, words) < 2e-3


def _worst_angle_on_engine(words: list[str]) -> float:
    prepared = prepare(words, say=lambda text: None, worker=True, writes_folder=False)
    run = assemble(prepared, engines.start(prepared.config))
    run.stop.restore()
    try:
        return _worst_angle(run.model)
    finally:
        run.engine.release()
