"""Models: sizes, initialization, precision, families, folders, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness import model
from harness.config import compose
from harness.config.schema import ModelConfig
from harness.errors import InputError

# GaLore's protocol (arXiv 2403.03507, C4 configurations), embedding and head untied, in millions.
PUBLISHED = {
    "llama_60m": 58.07,
    "llama_130m": 134.11,
    "llama_350m": 367.97,
    "llama_1b": 1339.08,
    "llama_7b": 6738.42,
}


def _preset(name: str) -> ModelConfig:
    return compose.load([f"model={name}"]).model


@pytest.mark.parametrize(("name", "millions"), PUBLISHED.items())
def test_parameter_counts_of_the_protocol(name: str, millions: float) -> None:
    network = model.build(_preset(name), seed=0, device="meta")
    assert round(model.count_parameters(network) / 1e6, 2) == millions
    assert next(network.parameters()).device.type == "meta"


def test_cpu_presets_are_as_large_as_they_say() -> None:
    assert 1.8e6 < model.count_parameters(model.build(_preset("llama_tiny"), seed=0, device="meta")) < 1.9e6
    assert 8.5e6 < model.count_parameters(model.build(_preset("llama_9m"), seed=0, device="meta")) < 9.5e6


def test_initialization_depends_on_the_seed_alone() -> None:
    torch.manual_seed(123)
    first = model.build(_preset("llama_tiny"), seed=1).state_dict()
    torch.manual_seed(456)
    again = model.build(_preset("llama_tiny"), seed=1).state_dict()
    other = model.build(_preset("llama_tiny"), seed=2).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_pure_bf16_weights_are_the_fp32_ones_rounded_once() -> None:
    exact = model.build(_preset("llama_tiny"), seed=0).state_dict()
    rounded = model.build(_preset("llama_tiny"), seed=0, precision="bf16_pure").state_dict()
    assert all(torch.equal(exact[key].bfloat16(), value) for key, value in rounded.items())


@pytest.mark.parametrize("name", ["gpt2_tiny", "qwen3_tiny"])
def test_other_families_build_and_run(name: str) -> None:
    network = model.build(_preset(name), seed=0)
    ids = torch.arange(8)[None]
    assert network(input_ids=ids).logits.shape[:2] == (1, 8)


def test_sdpa_is_used() -> None:
    network = model.build(_preset("llama_tiny"), seed=0)
    assert network.config._attn_implementation == "sdpa"  # pyright: ignore[reportAttributeAccessIssue]


def test_starts_from_a_local_folder(tmp_path: Path) -> None:
    network = model.build(_preset("llama_tiny"), seed=7)
    network.save_pretrained(tmp_path / "saved")  # pyright: ignore[reportCallIssue]
    loaded = model.build(_preset("llama_tiny").model_copy(update={"path": str(tmp_path / "saved")}), seed=0)
    for (name, weights), (_, other) in zip(
        network.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert torch.equal(weights, other), name


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.path: .* holds no config\.json"):
        model.build(ModelConfig(path=str(tmp_path)), seed=0)


def test_unknown_model_type_and_key_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean llama"):
        model.build(ModelConfig(model_type="lama"), seed=0)
    with pytest.raises(InputError, match=r"model\.config\.hidden_sizes: 8 is not a key of llama"):
        model.build(ModelConfig(config={"hidden_sizes": 8}), seed=0)
