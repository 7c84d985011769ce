"""Activation checkpointing and compiled layers: bits of gradients, bytes kept, graphs, what the key takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from harness import model
from harness.config.schema import ModelConfig
from harness.model import attention_logits, decoder_layers
from harness.model.attention_logits import CLIPPED, AttentionLogits
from harness.model.compilation import compile_layers

WIDTH, INNER, KEYS, LAYERS = 64, 96, 32, 3
SIZES = {
    "vocab_size": 96,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODES = ("none", "selective", "full")


def _config(mode: Any, kind: str = "llama") -> ModelConfig:
    return ModelConfig(model_type=kind, config=SIZES, activation_checkpointing=mode)


def _gradients(network: Any) -> list[torch.Tensor]:
    ids = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    model.loss_sum(network(input_ids=ids).logits, ids).backward()
    return [p.grad for p in network.parameters()]


@pytest.mark.parametrize(("given", "meant"), [(True, "full"), (False, "none"), *zip(MODES, MODES)])
def test_the_key_takes_modes_and_the_former_booleans(given: Any, meant: str) -> None:
    assert _config(given).activation_checkpointing == meant


@pytest.mark.parametrize("given", ["half", 3, None, [1]])
def test_the_key_refuses_other_values(given: Any) -> None:
    with pytest.raises(ValidationError):
        _config(given)


@pytest.mark.parametrize("kind", ["llama", "phi", "mixtral"])
def test_gradients_keep_their_bits(kind: str) -> None:
    """Products with and without a bias, and of experts."""
    usual, *others = (_gradients(model.build(_config(mode, kind), seed=0)) for mode in MODES)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(usual, other, strict=True))


def _kept(mode: str, layers: int, batch: int, *, is_clipped: bool = False) -> int:
    """Bytes that exist after a forward pass and not before it, on fake tensors."""
    config = _config(mode)
    config.config["num_hidden_layers"] = layers
    network: Any = model.build(config, seed=0, device="meta")
    model.specialize(network, config, seq_len=16, tokens=batch * 16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = network.to_empty(device="cpu")
        if is_clipped:
            network.set_attn_implementation(CLIPPED)
            AttentionLogits(network, torch.device("cpu"))
        tracker = MemTracker()
        with tracker:
            outputs = network(input_ids=torch.zeros(batch, 16, dtype=torch.long))
            kept = tracker.get_tracker_snapshot("current")[torch.device("cpu")]["Total"]
    assert outputs.logits.requires_grad
    return kept


def test_bytes_kept_in_each_mode() -> None:
    """A further layer of a further token keeps its input; selectively also attention and every second product."""
    none, selective, full = (
        ((_kept(mode, 3, 4) - _kept(mode, 2, 4)) - (_kept(mode, 3, 2) - _kept(mode, 2, 2))) // 32
        for mode in MODES
    )
    assert full == 4 * WIDTH
    # Input, query, value, attention with its log-sum-exp of 4 heads, gate, down.
    assert selective == 4 * (WIDTH + WIDTH + KEYS + WIDTH + 4 + INNER + WIDTH)
    assert none > 2 * selective


def test_the_logits_of_qk_clip_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their products are no layer's: they neither stay until the backward pass nor shift which products do."""
    # Several products in each layer: of one, the shift alone would keep as many bytes.
    monkeypatch.setattr(attention_logits, "BLOCK", 4)
    usual, clipped = (
        _kept("selective", 3, 4, is_clipped=flag) - _kept("selective", 2, 4, is_clipped=flag)
        for flag in (False, True)
    )
    # Only the fp32 maxima of the 4 heads of a further layer.
    assert clipped == usual + 4 * 4


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=[] if mode == "selective" else pytest.mark.slow) for mode in MODES]
)
def test_layers_share_one_graph_without_breaks(mode: str) -> None:
    """With Dynamo and AOTAutograd; inductor only changes the kernels. Attention in the graph is causal."""
    usual = _gradients(model.build(_config("none"), seed=0))
    network: Any = model.build(_config(mode), seed=0)
    assert model.specialize(network, _config(mode), seq_len=16, tokens=32) == []
    names = [name for name, _ in network.named_parameters()]
    torch._dynamo.reset()
    counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", _with_backend(torch.compile))
        compile_layers(network)
    assert len(decoder_layers(network)) == LAYERS
    compiled = _gradients(network)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert [name for name, _ in network.named_parameters()] == names
    assert all(torch.equal(a, b) for a, b in zip(usual, compiled, strict=True))
    torch._dynamo.reset()


def _with_backend(compile: Any) -> Any:
    return lambda *args, **options: compile(*args, **{**options, "backend": "aot_eager"})
