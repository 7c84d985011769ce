"""GGUF files as starting points: the numbers of the same weights in safetensors, converted once."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness import model
from harness.config import compose
from harness.config.schema import ModelConfig
from harness.errors import InputError

gguf = pytest.importorskip("gguf")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of a rotary projection as llama.cpp does: pairs side by side, not half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _written(path: Path) -> torch.nn.Module:
    """Write a LLaMA of two layers, its projections in 8 bits, and return the model that it stands for."""
    network: Any = model.build(ModelConfig(model_type="llama", config=SIZES), seed=1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(SIZES["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(SIZES["vocab_size"])
    kind = gguf.GGMLQuantizationType.Q8_0
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            layer = name.removesuffix(".weight")
            if layer in whole:
                writer.add_tensor(f"{whole[layer]}.weight", parameter.numpy())
                continue
            _, _, number, inside = layer.split(".", 3)
            target, values = f"blk.{number}.{NAMES[inside]}.weight", parameter.numpy()
            if values.ndim == 1:
                writer.add_tensor(target, values)
                continue
            heads = {"attn_q": 4, "attn_k": 2}.get(NAMES[inside])
            packed = gguf.quantize(_interleaved(values, heads) if heads else values, kind)
            writer.add_tensor(target, packed, raw_dtype=kind)
            # Blocks of 8 bits lie along a row, so that the order of rows changes no number.
            parameter.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(values, kind), kind)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return network


@pytest.mark.slow
def test_a_gguf_file_is_the_model_of_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    expected: Any = _written(folder / "tiny-q8.gguf")
    words = [f"data.cache_dir={tmp_path / 'cache'}", "optimizer.lr=0.001"]
    config = compose.load([f"model.path={folder}", *words]).model
    assert "dequantizing" in capsys.readouterr().err
    assert (config.model_type, config.name) == ("llama", "tiny-q8")
    network: Any = model.build(config, seed=0)
    ids = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = network(input_ids=ids).logits
        assert torch.equal(logits, expected(input_ids=ids).logits)
        # Control: the rows of q and k in the file's own order are another model.
        for layer in expected.model.layers:
            q = layer.self_attn.q_proj.weight
            q.copy_(torch.from_numpy(_interleaved(q.numpy(), 4)))
        assert not torch.allclose(logits, expected(input_ids=ids).logits, rtol=1e-2, atol=1e-3)
    # It is an ordinary model: made tensor by tensor, and saved.
    deferred, weights = model.build_deferred(config, seed=0, precision="fp32")
    assert weights is not None
    assert next(deferred.parameters()).is_meta
    network.save_pretrained(tmp_path / "again")
    # A second time, by the file's own name, nothing is converted.
    again = compose.load([f"model.path={folder / 'tiny-q8.gguf'}", *words]).model
    assert "dequantizing" not in capsys.readouterr().err
    assert again.path == config.path


@pytest.mark.slow
def test_a_file_that_is_none(tmp_path: Path) -> None:
    words = [f"data.cache_dir={tmp_path / 'cache'}"]
    (tmp_path / "a.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(InputError, match=r"model.path: .*a\.gguf cannot be read by transformers"):
        compose.load([f"model.path={tmp_path / 'a.gguf'}", *words])
    assert not list((tmp_path / "cache" / "models").glob("a-*"))


def test_what_is_refused_without_reading_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"data.cache_dir={tmp_path / 'cache'}"]
    (tmp_path / "a.gguf").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(InputError, match=r"needs the package gguf; fix: pip install 'optbench\[gguf\]'"):
            compose.load([f"model.path={tmp_path}", *words])
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds several GGUF files \(a\.gguf, b\.gguf\)"):
        compose.load([f"model.path={tmp_path}", *words])
