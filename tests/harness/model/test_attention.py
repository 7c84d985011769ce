"""Attention without masks: which models take it, equal losses, no reads by the host, causal kernels when compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness import engines, model
from harness.config.schema import ModelConfig
from harness.loop import forward_backward
from harness.model.attention import CAUSAL
from harness.preparation import prepare
from harness.probes.validation import evaluate
from harness.run import assemble, build_probes
from tests.harness.running import small, write_documents

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WITHOUT_MASK = ("llama", "qwen3", "gpt2", "olmo2", "mixtral", "deepseek_v3", "gemma", "gpt_neox")
SEQ_LEN = 16
_FALCON = ModelConfig(
    model_type="falcon",
    config={"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
)


def _config(kind: str, **more: Any) -> ModelConfig:
    sizes = {name: value for name, value in SIZES.items() if kind != "gpt2" or name == "vocab_size"}
    if kind == "gpt2":
        sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 4}
    if kind == "gpt_neox":
        del sizes["num_key_value_heads"]
    if kind == "deepseek_v3":
        more |= {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
        more |= {"v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
        more |= {"moe_intermediate_size": 16, "topk_group": 1, "num_key_value_heads": 4}
    return ModelConfig(model_type=kind, config={**sizes, **more})


def _specialized(config: ModelConfig, seq_len: int = SEQ_LEN) -> tuple[Any, list[str]]:
    network: Any = model.build(config, seed=0)
    return network, model.specialize(network, config, seq_len=seq_len, tokens=2 * seq_len)


@pytest.mark.parametrize("kind", WITHOUT_MASK)
def test_plainly_causal_families_take_no_mask_and_keep_their_logits(kind: str) -> None:
    usual: Any = model.build(_config(kind), seed=0).eval()
    network, notes = _specialized(_config(kind))
    network.eval()
    assert notes == []
    assert network.config._attn_implementation == CAUSAL
    ids = torch.randint(0, 96, (2, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(usual(input_ids=ids).logits, network(input_ids=ids).logits)


def test_padding_on_the_right_changes_no_real_position() -> None:
    """Also where the mask of the inputs is given, as for the routers' loss: real positions never see padding."""
    usual: Any = model.build(_config("mixtral", output_router_logits=True), seed=0)
    network, _ = _specialized(_config("mixtral", output_router_logits=True))
    ids = torch.randint(0, 96, (2, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    with torch.no_grad():
        wanted, found = (m(input_ids=ids, attention_mask=mask) for m in (usual, network))
    real = mask.bool()
    torch.testing.assert_close(found.logits[real], wanted.logits[real], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.aux_loss, wanted.aux_loss, rtol=1e-5, atol=1e-6)
    # Control: padding on the left would be seen.
    left = mask.flip(1)
    with torch.no_grad():
        wanted, found = (m(input_ids=ids, attention_mask=left).logits for m in (usual, network))
    assert not torch.allclose(found[left.bool()], wanted[left.bool()], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (_config("mistral", sliding_window=8), "windows of 8 tokens"),
        (_config("gemma3_text", sliding_window=8, head_dim=16), "windows of 8 tokens"),
        (_FALCON, "attention code of its own"),
    ],
    ids=lambda value: value.model_type if isinstance(value, ModelConfig) else "",
)
def test_other_masks_stay(config: ModelConfig, reason: str) -> None:
    network, notes = _specialized(config)
    assert network.config._attn_implementation == "sdpa"
    assert len(notes) == 1
    assert notes[0].startswith(f"attention with transformers' own masks: {config.model_type} has {reason}")


def test_a_window_of_the_whole_row_hides_nothing() -> None:
    config = _config("mistral", sliding_window=SEQ_LEN)
    usual: Any = model.build(config, seed=0)
    network, notes = _specialized(config)
    assert notes == []
    ids = torch.randint(0, 96, (2, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(network(input_ids=ids).logits, usual(input_ids=ids).logits)
    assert _specialized(config, SEQ_LEN + 1)[1]


def test_eager_attention_is_left_alone() -> None:
    config = _config("llama").model_copy(update={"attention": "eager"})
    network, notes = _specialized(config)
    assert notes == []
    assert network.config._attn_implementation == "eager"


class _HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["packed", "padded"])
@pytest.mark.parametrize("chunk", ["null", "40"])
def test_micro_batches_are_not_read_by_the_host(tmp_path: Path, mode: str, chunk: str) -> None:
    """Neither in training nor in evaluation (which reads its result at its end, by `tolist`)."""
    words = [f"data.mode={mode}", f"model.loss_chunk={chunk}", "micro_batch_size=4"]
    prepared = prepare(small(write_documents(tmp_path), tmp_path / "runs", *words), say=lambda _: None)
    engine = engines.start(prepared.config)
    try:
        run = assemble(prepared, engine)

        def train() -> None:
            forward_backward(run, run.loader.micro_batches(0), weight=1e-3)

        validation: Any = build_probes(run, prepared.data)[0]

        def measure() -> None:
            evaluate(
                run.engine,
                run.model,
                run.objective,
                validation._evaluator._validation,
                rows=8,
                micro_batch_size=4,
            )

        assert _reads(train) == 0
        assert _reads(measure) == 0
        # Control: transformers' own attention looks for several documents in a row, once a forward pass.
        run.model.set_attn_implementation("sdpa")  # pyright: ignore
        assert _reads(train) == 2
    finally:
        engine.close()


def _reads(work: Callable[[], None]) -> int:
    with _HostReads() as reads:
        work()
    return reads.count


@pytest.mark.slow
def test_compiled_attention_is_causal_without_a_mask() -> None:
    """What Dynamo hands to its backend: flash and cuDNN kernels need is_causal=True and no mask."""
    calls: list[dict[str, Any]] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        for node in graph.graph.nodes:
            if node.target is torch.nn.functional.scaled_dot_product_attention:
                calls.append(dict(node.kwargs))
        return graph.forward

    network, _ = _specialized(_config("qwen3", num_hidden_layers=1))
    ids = torch.zeros(2, SEQ_LEN, dtype=torch.long)
    torch._dynamo.reset()
    torch.compile(network, backend=backend)(input_ids=ids)
    assert len(calls) == 1
    assert all(call["is_causal"] is True and call["attn_mask"] is None for call in calls)
    assert all(call["enable_gqa"] is True for call in calls)
    # Control: transformers' own attention gets a mask.
    calls.clear()
    torch._dynamo.reset()
    torch.compile(model.build(_config("qwen3", num_hidden_layers=1), seed=0), backend=backend)(input_ids=ids)
    assert calls
    assert all(call["is_causal"] is False and call["attn_mask"] is not None for call in calls)
    torch._dynamo.reset()
