"""Sequence classifiers: random weights and folders, deferred and whole, padding and layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from harness import model
from harness.config.schema import ModelConfig
from harness.errors import InputError
from harness.model import ClassificationHead

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": SIZES,
    "distilbert": {
        "vocab_size": 97,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 48,
        "max_position_embeddings": 64,
    },
    "modernbert": {**SIZES, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "electra": {**SIZES, "embedding_size": 32},
    "llama": SIZES,
    "gpt2": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
}
HEAD = ClassificationHead(("no", "yes", "maybe"), pad_id=1)
SEED = 3


def config_of(kind: str) -> ModelConfig:
    """Return a tiny model of this type."""
    return ModelConfig(name=kind, model_type=kind, config=CLASSIFIERS[kind])


def weights_of(network: nn.Module, weights: Any) -> dict[str, torch.Tensor]:
    """Return the parameters of a model from `build_deferred`, by name."""
    if weights is None:
        return dict(network.named_parameters())
    found: dict[str, torch.Tensor] = {}
    weights.deliver(lambda name, value: found.__setitem__(name, value.clone()))
    return {name: found[name] for name, _ in network.named_parameters()}


def padded_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids ``(2, 12)`` whose second row ends in padding after 7 tokens, and their mask."""
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, 7:], mask[1, 7:] = HEAD.pad_id, 0
    return ids, mask


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifiers_of_random_weights(kind: str) -> None:
    config = config_of(kind)
    whole: Any = model.build(config, seed=SEED, head=HEAD)
    deferred, weights = model.build_deferred(config, seed=SEED, precision="fp32", head=HEAD)
    assert weights is not None
    for name, value in weights_of(deferred, weights).items():
        assert torch.equal(value, whole.get_parameter(name)), name
    assert whole.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert whole.config.problem_type == "single_label_classification"
    # The layers alone, which FSDP2 shards one by one: not the embeddings that encoders name with them.
    assert len(model.decoder_layers(whole)) == 2
    model.specialize(whole, config, seq_len=12, tokens=24)
    ids, mask = padded_rows()
    whole.eval()
    with torch.no_grad():
        padded = whole(input_ids=ids, attention_mask=mask).logits
        alone = whole(input_ids=ids[1:, :7], attention_mask=mask[1:, :7]).logits
        unmasked = whole(input_ids=ids, attention_mask=torch.ones_like(mask)).logits
    assert padded.shape == (2, 3)
    torch.testing.assert_close(padded[1], alone[0], rtol=0, atol=2e-6)
    is_causal = kind in ("llama", "gpt2")
    # Control: without the mask, an encoder's tokens see the padding.
    assert bool((padded[1] - unmasked[1]).abs().max() > 5e-6) is not is_causal


def test_regression_has_one_output() -> None:
    network: Any = model.build(config_of("bert"), seed=0, head=ClassificationHead(None, pad_id=0))
    assert network.config.problem_type == "regression"
    assert network(input_ids=torch.ones(2, 3, dtype=torch.long)).logits.shape == (2, 1)


def test_a_decoder_trains_the_row_of_a_token_that_also_pads() -> None:
    network: Any = model.build(config_of("llama"), seed=0, head=HEAD)
    assert network.config.pad_token_id == HEAD.pad_id
    embedding = network.get_input_embeddings()
    network(input_ids=torch.tensor([[HEAD.pad_id, 5, 6]])).logits.sum().backward()
    assert float(embedding.weight.grad[HEAD.pad_id].abs().max()) > 0


def _folder(path: Path, kind: str, automatic: Any, **settings: Any) -> Path:
    torch.manual_seed(11)
    config = AutoConfig.for_model(kind, **CLASSIFIERS[kind], pad_token_id=HEAD.pad_id, **settings)
    automatic.from_config(config).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("kind", "automatic", "lacking", "unused"),
    [
        ("bert", AutoModel, {"classifier.weight", "classifier.bias"}, ""),
        (
            "bert",
            AutoModelForMaskedLM,
            {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"},
            "cls.predictions",
        ),
        (
            "roberta",
            AutoModelForMaskedLM,
            {f"classifier.{n}.{k}" for n in ("dense", "out_proj") for k in ("weight", "bias")},
            "lm_head",
        ),
        ("modernbert", AutoModelForMaskedLM, {"classifier.weight", "classifier.bias"}, "decoder.bias"),
        ("llama", AutoModelForCausalLM, {"score.weight"}, "lm_head.weight"),
    ],
)
def test_a_folder_without_the_head(
    tmp_path: Path, kind: str, automatic: Any, lacking: set[str], unused: str
) -> None:
    folder = _folder(tmp_path / "model", kind, automatic)
    config = ModelConfig(name=kind, model_type=kind, path=str(folder))
    lines: list[str] = []
    whole = model.build(config, seed=SEED, head=HEAD, say=lines.append)
    lines_of_deferred: list[str] = []
    deferred, weights = model.build_deferred(
        config, seed=SEED, precision="fp32", head=HEAD, say=lines_of_deferred.append
    )
    # A folder of the base model alone names its weights otherwise, so the model comes whole.
    assert (weights is None) == (automatic is AutoModel)
    for name, value in weights_of(deferred, weights).items():
        assert torch.equal(value, whole.get_parameter(name)), name
    initialized = [line for line in lines if line.startswith("initialized from the seed")]
    assert len(initialized) == 1
    assert set(initialized[0].rpartition(": ")[2].split(", ")) == lacking
    assert sum(bool(unused) and unused in line for line in lines) == bool(unused)
    assert set(lines) <= set(lines_of_deferred)
    # The rest is the folder's, and the head depends on the seed alone.
    other = model.build(config, seed=SEED + 1, head=HEAD)
    for name, value in other.named_parameters():
        is_random = name in lacking and not name.endswith("bias")
        assert torch.equal(value, whole.get_parameter(name)) is not is_random, name


def test_the_head_of_other_classes_is_made_anew(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model", "bert", AutoModelForSequenceClassification, num_labels=5)
    config = ModelConfig(name="bert", model_type="bert", path=str(folder))
    lines: list[str] = []
    whole = model.build(config, seed=SEED, head=HEAD, say=lines.append)
    deferred, weights = model.build_deferred(config, seed=SEED, precision="fp32", head=HEAD)
    for name, value in weights_of(deferred, weights).items():
        assert torch.equal(value, whole.get_parameter(name)), name
    assert any(line.endswith(": classifier.bias, classifier.weight") for line in lines), lines
    stored = load_file(folder / "model.safetensors")
    for name, value in whole.named_parameters():
        assert name.startswith("classifier.") or torch.equal(value, stored[name]), name
    assert len(whole.get_parameter("classifier.weight")) == HEAD.outputs


def test_what_a_folder_may_not_lack(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "bert", "bert", AutoModel)
    config = ModelConfig(name="bert", model_type="bert", path=str(folder))
    with pytest.raises(InputError, match="pads with token 1, and the tokenizer of this run with token 0"):
        model.build(config, seed=0, head=ClassificationHead(("a", "b"), pad_id=0))
    with pytest.raises(InputError, match="pads with token 1, and the tokenizer of this run with token 0"):
        model.build_deferred(config, seed=0, precision="fp32", head=ClassificationHead(("a", "b"), pad_id=0))
    file = folder / "model.safetensors"
    kept = {name: t for name, t in load_file(file).items() if name != "encoder.layer.1.output.dense.weight"}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 3 weights of a bert model"):
        model.build(config, seed=0, head=HEAD)
