"""Cross-entropy in chunks: against fp64, against whole logits in every engine, families with scaled logits, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from harness import model
from harness.config.schema import ModelConfig
from harness.model import loss_sum
from harness.model.linear_loss import (
    IGNORED,
    LossHead,
    automatic_chunk,
    install,
    linear_cross_entropy,
    loss_bytes,
)
from harness.model.logit_transform import LogitTransform

TOKENS, WIDTH, VOCABULARY = (3, 37), 24, 301


def _problem(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[list[Any], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*TOKENS, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.3
    addend = torch.randn(VOCABULARY, generator=generator) if bias else None
    labels = torch.randint(0, VOCABULARY, TOKENS, generator=generator)
    labels[:, -5:] = IGNORED
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (hidden, weight, addend)]
    return leaves, labels


def _gradients(loss: torch.Tensor, leaves: list[Any]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss * 0.37, [leaf for leaf in leaves if leaf is not None]))


def _chunks(leaves: list[Any], labels: torch.Tensor, **options: Any) -> torch.Tensor:
    hidden, weight, bias = leaves
    return linear_cross_entropy(hidden, weight, bias, labels, **options)


def _whole(leaves: list[Any], labels: torch.Tensor, transform: LogitTransform) -> torch.Tensor:
    hidden, weight, bias = leaves
    logits = torch.nn.functional.linear(hidden, weight, bias) * transform.scale
    logits = logits if transform.cap is None else torch.tanh(logits / transform.cap) * transform.cap
    if hidden.dtype == torch.float64:
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
    return loss_sum(logits, labels)


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.25), LogitTransform(2.0, 3.0)])
@pytest.mark.parametrize("chunk", [1, 16, 111, 4096])
def test_loss_and_gradients_equal_fp64(chunk: int, transform: LogitTransform, bias: bool) -> None:
    leaves, labels = _problem(torch.float64, bias)
    exact = _whole(leaves, labels, transform)
    expected = _gradients(exact, leaves)
    leaves, labels = _problem(bias=bias)
    loss = _chunks(leaves, labels, chunk=chunk, transform=transform)
    assert loss.dtype == torch.float32
    assert abs(loss.item() / exact.item() - 1) < 1e-6
    whole = _gradients(_whole(leaves, labels, transform), leaves)
    for found, usual, wanted in zip(_gradients(loss, leaves), whole, expected, strict=True):
        assert _error(found, wanted) < 1e-6
        assert _error(found, usual.double()) < 1e-6
    # Control: a label that is left out changes the gradients by more than rounding.
    labels[0, 0] = IGNORED
    other = _gradients(_chunks(leaves, labels, chunk=chunk, transform=transform), leaves)
    assert _error(other[0], expected[0]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_cast", [True, False])
def test_half_precision_rounds_as_little_as_whole_logits(dtype: torch.dtype, is_cast: bool) -> None:
    """Under autocast over fp32 weights, and with weights of that dtype: the head's gradient adds up in fp32."""
    leaves, labels = _problem(torch.float64, bias=False)
    exact = _whole(leaves, labels, LogitTransform())
    expected = _gradients(exact, leaves)
    leaves, labels = _problem(torch.float32 if is_cast else dtype, bias=False)
    with torch.autocast("cpu", dtype=dtype, enabled=is_cast):
        whole = _whole(leaves, labels, LogitTransform())
        loss = _chunks(leaves, labels, chunk=16)
    assert loss.dtype == torch.float32
    assert abs(loss.item() / exact.item() - 1) < max(1e-4, 3 * abs(whole.item() / exact.item() - 1))
    usual = _gradients(whole, leaves)
    for found, other, wanted, leaf in zip(_gradients(loss, leaves), usual, expected, leaves):
        assert found.dtype == leaf.dtype
        assert _error(found, wanted) < 1.5 * _error(other, wanted)


def test_nan_in_padding_stays_there() -> None:
    (hidden, weight, _), labels = _problem(bias=False)
    with torch.no_grad():
        hidden[:, -1] = float("nan")
    gradients = _gradients(linear_cross_entropy(hidden, weight, None, labels, chunk=16), [hidden, weight])
    assert all(torch.isfinite(g).all() for g in gradients)


def test_frozen_weights_take_no_gradient_and_the_gradient_is_taken_once() -> None:
    (hidden, weight, _), labels = _problem(bias=False)
    weight.requires_grad_(False)
    loss = linear_cross_entropy(hidden, weight, None, labels, chunk=16)
    loss.backward(retain_graph=True)
    assert hidden.grad is not None
    assert weight.grad is None
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, None, labels, chunk=16).requires_grad


def test_automatic_chunk() -> None:
    assert [automatic_chunk(v) for v in (4096, 32000, 32768, 128256, 262144)] == [
        16384,
        2048,
        2048,
        1024,
        1024,
    ]


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 7.0, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
    "granite": {"logits_scaling": 0.2},
    "phi": {},
    "mixtral": {"num_local_experts": 4, "output_router_logits": True},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_gradients_of_its_whole_logits(family: str) -> None:
    """Scaled and capped logits, heads with a bias (phi), tied embeddings, outputs of routers."""
    kind = family.split(",")[0]
    attention = "eager" if kind == "gemma2" else "sdpa"
    config = ModelConfig(model_type=kind, config={**SIZES, **FAMILIES[family]}, attention=attention)
    ids = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(1))
    labels = ids[:, 1:].clone()
    labels[0, :3] = IGNORED
    batch = (ids[:, :-1], labels)
    gradients: list[dict[str, torch.Tensor]] = []
    losses: list[float] = []
    for chunk in (None, 7):
        network = model.build(config, seed=0)
        chosen = config.model_copy(update={"loss_chunk": chunk})
        assert model.specialize(network, chosen, seq_len=16, tokens=32) == []
        objective = model.CausalLMObjective(network, is_padded=False, loss_chunk=chunk)
        outputs = network(**objective.inputs(batch))
        loss = objective.losses(outputs, batch).objective
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
        # Without labels the model gives logits, as before, and its settings are what they were.
        logits = network(input_ids=ids).logits
        assert logits.shape == (2, 17, 96)
        with torch.no_grad():
            rows = objective.row_losses(network(**objective.inputs(batch)), batch)
        log_p = (
            logits[:, :-1].double().log_softmax(-1).gather(-1, batch[1].clamp(min=0)[..., None]).squeeze(-1)
        )
        expected = -(log_p * (batch[1] >= 0)).sum(1)
        assert torch.allclose(rows, expected, rtol=1e-6)
        assert rows[0] != rows[1]
    assert abs(losses[1] / losses[0] - 1) < 1e-6
    whole, chunks = gradients
    assert whole.keys() == chunks.keys()
    scale = max(g.norm() for g in whole.values())
    for name, gradient in whole.items():
        assert float((chunks[name] - gradient).norm()) < 1e-6 * float(gradient.norm() + 0.01 * scale), name


def test_logits_that_are_not_the_product_of_the_head_stay_whole() -> None:
    """RecurrentGemma caps its logits under a name that no other family has."""
    config = ModelConfig(model_type="recurrent_gemma", config=SIZES, loss_chunk=7)
    network = model.build(config, seed=0)
    notes = model.specialize(network, config, seq_len=16, tokens=32)
    assert "loss from whole logits: recurrent_gemma has logits that are not the head's product" in notes
    assert not isinstance(network.get_output_embeddings(), LossHead)  # pyright: ignore
    objective = model.CausalLMObjective(network, is_padded=False, loss_chunk=7)
    ids = torch.zeros(1, 8, dtype=torch.long)
    assert objective.inputs((ids, ids)).keys() == {"input_ids"}


def test_labels_are_dropped_after_an_exception() -> None:
    network: Any = model.build(ModelConfig(config=SIZES), seed=0)
    head = install(network)
    ids = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(IndexError):
        network(input_ids=ids + 96, labels=ids, loss_chunk=4)
    assert head.labels is None
    assert network(input_ids=ids).logits.shape == (1, 8, 96)


def _peak(work: Callable[[], torch.Tensor], *held: torch.Tensor) -> int:
    """Bytes that exist at once in ``work`` and the backward pass of its result, beyond ``held``."""
    tracker = MemTracker()
    tracker.track_external(*held)
    with tracker:
        work().backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return peak - sum(t.untyped_storage().nbytes() for t in held)


def test_peak_memory_is_that_of_a_chunk() -> None:
    """The head of llama_60m at 8 × 512 tokens, on fake tensors: at least the whole logits less."""
    tokens, width, vocabulary, chunk = (8, 512), 512, 32000, automatic_chunk(32000)
    with FakeTensorMode():
        hidden = torch.empty(*tokens, width, requires_grad=True)
        weight = torch.empty(vocabulary, width, requires_grad=True)
        labels = torch.zeros(tokens, dtype=torch.long)
        whole = _peak(
            lambda: loss_sum(torch.nn.functional.linear(hidden, weight), labels), hidden, weight, labels
        )
        hidden.grad = weight.grad = None
        chunks = _peak(
            lambda: linear_cross_entropy(hidden, weight, None, labels, chunk=chunk), hidden, weight, labels
        )
    logits = 8 * 512 * vocabulary * 4
    assert whole - chunks > logits
    dtypes = {"compute": torch.float32, "weights": torch.float32}
    assert chunks == pytest.approx(loss_bytes(8 * 512, vocabulary, width, chunk, **dtypes), rel=0.05)
