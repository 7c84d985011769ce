"""LoRA inside a model: what is trained, its numbers, merging; and training against `peft` in a loop of torch alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn

import optimizers
from harness import model
from harness.config import compose
from harness.config.checks import check
from harness.config.identity import identity
from harness.config.model_facts import facts, trained_parameters
from harness.config.schema import LoraConfig, ModelConfig
from harness.errors import InputError
from harness.model import adapters
from tests.harness.model.test_heads import CLASSIFIERS, HEAD, config_of, padded_rows, weights_of

SEED = 3


def adapted(kind: str, **lora: Any) -> ModelConfig:
    """Return a tiny model with an adapter of rank 4."""
    return config_of(kind).model_copy(update={"adapter": "lora", "lora": LoraConfig(rank=4, **lora)})


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama"])
def test_numbers_and_what_is_trained(kind: str) -> None:
    config = adapted(kind)
    whole: Any = model.build(config, seed=SEED, head=HEAD)
    plain = model.build(config_of(kind), seed=SEED, head=HEAD)
    deferred, weights = model.build_deferred(config, seed=SEED, precision="fp32", head=HEAD)
    assert weights is not None
    for name, value in weights_of(deferred, weights).items():
        assert torch.equal(value, whole.get_parameter(name)), name
        assert deferred.get_parameter(name).requires_grad is whole.get_parameter(name).requires_grad
    trained = [name for name, p in whole.named_parameters() if p.requires_grad]
    head = {name for name in trained if "lora_" not in name}
    assert all(name.startswith(("classifier", "score")) or "pooler" in name for name in head)
    assert head
    # Frozen weights keep their numbers, and an adapter starts as zero.
    ids, mask = padded_rows()
    whole.eval(), plain.eval()
    with torch.no_grad():
        start = whole(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(start, plain(input_ids=ids, attention_mask=mask).logits)
        for name, p in whole.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(p, std=0.1)
        moved = whole(input_ids=ids, attention_mask=mask).logits
        assert adapters.merge(whole)
        merged = whole(input_ids=ids, attention_mask=mask).logits
    # Control: the adapter does something; merged, it is one rounding of each weight away.
    assert not torch.allclose(moved, start, rtol=1e-3, atol=0)
    torch.testing.assert_close(merged, moved, rtol=1e-5, atol=1e-6)
    assert [name for name, _ in whole.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert not adapters.merge(plain)


def test_targets() -> None:
    network: Any = model.build(adapted("llama", targets=["q_proj", "mlp.*"]), seed=0)
    names = {name for name, p in network.named_parameters() if p.requires_grad}
    layers = {name.partition(".lora_")[0] for name in names}
    chosen = ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert layers == {f"model.layers.{i}.{name}" for i in range(2) for name in chosen}
    with pytest.raises(
        InputError, match=r"model.lora.targets: query names no hidden linear layer of llama"
    ) as e:
        model.build(adapted("llama", targets=["q_proj", "query"]), seed=0)
    assert "q_proj" in str(e.value)
    # The head is trained whole, so it is no target.
    with pytest.raises(InputError, match="names no hidden linear layer"):
        model.build(adapted("bert", targets=["classifier"]), seed=0, head=HEAD)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_torch_free_shapes_are_those_of_the_model(kind: str) -> None:
    for lora in ({}, {"targets": ["q_proj", "down_proj"] if kind == "llama" else ["c_attn"]}):
        config = adapted(kind, **lora)
        network = model.build(config, seed=0, device="meta")
        shapes = {n: tuple(p.shape) for n, p in network.named_parameters() if p.requires_grad}
        first = {n: s for n, s in shapes.items() if ".0." in n}
        assert facts(config).for_rule({}).matrices == first
        assert trained_parameters(config) == model.count_parameters(network)
        optimizer: Any = optimizers.build("muon", network.named_parameters(), modules=network)
        assert {r.name for r in optimizer.routes if r.rule == "muon"} == set(shapes)
        some: Any = optimizers.build(
            "muon", network.named_parameters(), modules=network, matrix_modules=["lora_B"]
        )
        assert {r.name for r in some.routes if r.rule == "muon"} == {n for n in shapes if "lora_B" in n}


def test_steps_are_those_of_peft_and_torch() -> None:
    """The same init, then AdamW by torch on `peft`'s own wrapper: the same weights to rounding."""
    config = adapted("llama", alpha=12.0)
    # In fp64: Adam's first steps magnify the rounding of gradients near zero.
    ours: Any = model.build(config, seed=SEED).double()
    base = model.build(config_of("llama"), seed=SEED).double()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs: Any = get_peft_model(
        base, PeftConfig(r=4, lora_alpha=12, target_modules=targets), autocast_adapter_dtype=False
    )
    own = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    peers = {n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters() if p.requires_grad}
    assert own.keys() == peers.keys()
    start = {name: p.detach().clone() for name, p in own.items()}
    for name, p in peers.items():
        p.data.copy_(own[name].data)
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    mine = optimizers.build("adamw", ours.named_parameters(), modules=ours, **settings)
    reference = torch.optim.AdamW(peers.values(), **settings)
    ids = torch.randint(3, 97, (4, 13), generator=torch.Generator().manual_seed(1))
    for network, optimizer in ((ours, mine), (theirs, reference)):
        for _ in range(4):
            logits = network(input_ids=ids[:, :-1]).logits
            F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, p in own.items():
        torch.testing.assert_close(p, peers[name], rtol=1e-9, atol=1e-12)
    # Control: they moved, A only after B had left zero.
    assert all(not torch.equal(p, start[name]) for name, p in own.items())
    assert all(p.grad is None for name, p in ours.named_parameters() if name not in own)


def test_configurations() -> None:
    words = ["model.adapter=lora", "model.lora.rank=4", "optimizer=sumo", "optimizer.rank=2", "steps=2"]
    config = check(compose.load(words), environ={})
    assert config.model.lora.rank == 4
    plain = check(compose.load(words[2:]), environ={})
    other = check(compose.load([*words, "model.lora.alpha=8"]), environ={})
    hashes = {identity(c, "corpus", "tokenizer") for c in (config, plain, other)}
    assert len(hashes) == 3
    with pytest.raises(InputError, match=r"model.lora.rank: 4 has no effect without an adapter"):
        check(compose.load(words[1:]), environ={})
    # A rank of the rule is bounded by the adapter's.
    with pytest.raises(InputError, match=r"optimizer.rank: 8 is larger than a side of .*lora_A"):
        check(compose.load([*words[:3], "optimizer.rank=8"]), environ={})
    for word in ("model.lora.rank=0", "model.lora.dropout=1", "model.lora.alpha=0", "model.adapter=dora"):
        with pytest.raises(InputError, match=word.partition("=")[0]):
            check(compose.load(["model.adapter=lora", word]), environ={})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.model_type=bert"], "bert is an encoder"),
        (["task=classify", "model.model_type=t5gemma2"], "t5gemma2 has no sequence classifier|task"),
    ],
)
def test_types_that_do_not_fit_the_task(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(compose.load(words), environ={})


def test_a_folder_that_is_gone_held_the_frozen_weights(tmp_path: Path) -> None:
    config = adapted("llama").model_copy(update={"path": str(tmp_path / "gone")})
    assert set(CLASSIFIERS["llama"]) <= set(config.config)
    with pytest.raises(InputError, match="held the frozen weights"):
        model.build(config, seed=0, weights=False)
