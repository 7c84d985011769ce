"""Memory and FLOPs against closed forms; validation loss against a direct computation."""

from __future__ import annotations

import functools
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import engines, model
from harness.config import compose
from harness.data import Corpus, Validation
from harness.data.micro_batches import ValidationLoader
from harness.devices import tensor_bytes
from harness.model import loss_sum
from harness.preparation import prepare
from harness.probes.flops import FlopCount
from harness.probes.validation import evaluate
from harness.tracked_optimizer import tracked
from tests.distributed.pool import RankPool
from tests.harness.running import small, write_documents


def test_flops_of_a_llama_by_hand() -> None:
    network = model.build(compose.load(["model=llama_tiny"]).model, seed=0, device="meta")
    hidden, layers, inner, vocab, seq = 128, 4, 344, 4096, 256
    matrices = layers * (4 * hidden**2 + 3 * hidden * inner) + vocab * hidden
    attention = layers * hidden * seq
    count = FlopCount.of(network, seq_len=seq, precision="bf16", device=torch.device("cpu"))
    assert count.per_token == 6 * (matrices + attention)
    assert count.peak is None


def test_a_tied_head_costs_and_an_embedding_does_not() -> None:
    network = model.build(compose.load(["model=qwen3_tiny"]).model, seed=0, device="meta")
    count = FlopCount.of(network, seq_len=1, precision="fp32", device=torch.device("cpu"))
    head = network.get_output_embeddings().weight.numel()  # pyright: ignore[reportCallIssue]
    assert count.per_token > 6 * head


def test_shared_memory_counts_once() -> None:
    weight = torch.zeros(10, 4)
    assert tensor_bytes([weight, weight, torch.zeros(3, dtype=torch.bfloat16)]) == 160 + 6


def test_state_of_a_foreign_optimizer_by_kind() -> None:
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert tracked(optimizer).state_bytes() == {"step": 4, "exp_avg": 256, "exp_avg_sq": 256}


def _evaluated(rank: int, overrides: list[str], rows: int, micro: int) -> float:
    prepared = prepare(overrides, say=lambda text: None, worker=True, writes_folder=False)
    engine = engines.start(prepared.config)
    network = model.build(prepared.config.model, seed=0)
    engine.shard(network, {}, model.decoder_layers(network))
    engine.prepare(network, torch.optim.SGD(network.parameters(), lr=0.1))
    corpus = prepared.data
    assert isinstance(corpus, Corpus)
    validation = Validation(corpus, seq_len=prepared.config.seq_len, mode=prepared.config.data.mode)
    objective = model.CausalLMObjective(network, is_padded=False)
    loader = ValidationLoader(validation, engine.device)
    return evaluate(engine, network, objective, loader, rows=rows, micro_batch_size=micro)


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_validation_loss_does_not_depend_on_how_rows_are_dealt(
    mode: str, tmp_path: Path, two_ranks: RankPool
) -> None:
    corpus = write_documents(tmp_path)
    words = [f"data.mode={mode}", "eval.tokens=64"]
    alone = small(corpus, tmp_path, *words)
    prepared = prepare(alone, say=lambda text: None, worker=True)
    network = model.build(prepared.config.model, seed=0).double()
    ids, labels = Validation(prepared.data, seq_len=32, mode=mode).batch(0, 7)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        logits = network(input_ids=torch.from_numpy(ids)).logits
        direct = loss_sum(logits, torch.from_numpy(labels)).item() / int((labels != -100).sum())
    # fp32 forward against fp64 weights: 1e-6 relative per loss.
    assert _evaluated(0, alone, 7, 1) == pytest.approx(direct, rel=1e-5)
    assert _evaluated(0, alone, 7, 4) == pytest.approx(direct, rel=1e-5)
    pair = two_ranks.run(_evaluated, small(corpus, tmp_path, *words, "world_size=2"), 7, 3)
    assert pair[0] == pair[1] == pytest.approx(direct, rel=1e-5)


def test_the_peak_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    # The card cannot exist on this machine; the lookup is by its name alone.
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    network = model.build(compose.load(["model=llama_tiny"]).model, seed=0, device="meta")
    device: Any = types.SimpleNamespace(type="cuda")
    count = functools.partial(FlopCount.of, network, seq_len=8, device=device)
    assert count(precision="bf16").peak == 989e12
    assert count(precision="fp16").peak == 989e12
    # fp32 runs on CUDA cores unless torch may use TF32.
    assert count(precision="fp32").peak == 67e12
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        assert count(precision="fp32").peak == 494e12
    finally:
        matmul.fp32_precision = before
    assert count(precision="bf16", peak_flops=700e12).peak == 700e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    assert count(precision="bf16").peak is None
