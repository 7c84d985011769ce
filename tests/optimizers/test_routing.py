"""Routing on models of transformers, built from tiny configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import optimizers
from optimizers.options import OptionError
from optimizers.routing import Route, route, table

LLAMA = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
GPT = {"vocab_size": 96, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
NEOX = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


def model(kind: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, pad_token_id=0, **config))


def routes_of(net: nn.Module, rule: str = "muon", by_name: bool = False) -> dict[str, Route]:
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    return {r.name: r for r in route(named, rule, None if by_name else net)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_llama_like(kind: str, tied: bool) -> None:
    found = routes_of(model(kind, tie_word_embeddings=tied, **LLAMA))
    matrices = {name for name, r in found.items() if r.rule == "muon"}
    assert len(matrices) == 2 * 7
    assert all("proj" in name for name in matrices)
    assert found["model.embed_tokens.weight"].reason.startswith("embedding")
    assert ("lm_head.weight" in found) is not tied
    if not tied:
        assert (found["lm_head.weight"].rule, found["lm_head.weight"].reason) == ("adamw", "output head")
    assert found["model.norm.weight"].reason == "norm"
    assert all(r.reason == "bias" for name, r in found.items() if name.endswith("bias"))


@pytest.mark.parametrize(
    ("kind", "config"), [("llama", LLAMA), ("gpt2", GPT), ("gpt_neox", NEOX), ("phi3", LLAMA)]
)
def test_every_trainable_parameter_is_claimed_once_and_names_agree_with_modules(
    kind: str, config: dict[str, Any]
) -> None:
    net = model(kind, **config)
    with_modules, by_name = routes_of(net), routes_of(net, by_name=True)
    trainable = [name for name, p in net.named_parameters() if p.requires_grad]
    assert list(with_modules) == trainable
    assert {n: r.rule for n, r in with_modules.items()} == {n: r.rule for n, r in by_name.items()}
    optimizer = optimizers.build("muon", net.named_parameters(), modules=net)
    claimed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(claimed) == sorted(id(p) for p in net.parameters())
    assert {r.name for r in optimizer.routes} == set(trainable)  # type: ignore[attr-defined]


def test_names_may_carry_a_wrapper_s_prefix() -> None:
    net = model("llama", **LLAMA)
    named = [(f"module.{name}", p) for name, p in net.named_parameters()]
    assert sum(r.rule == "muon" for r in route(named, "muon", net)) == 14


def test_gpt2_conv1d_is_transposed_and_its_qkv_split_by_columns() -> None:
    net = model("gpt2", **GPT)
    found = routes_of(net)
    qkv = found["transformer.h.0.attn.c_attn.weight"]
    assert [b.part for b in qkv.blocks] == ["q", "k", "v"]
    assert all(b.shape == (32, 32) and b.transposed for b in qkv.blocks)
    weight = net.get_parameter("transformer.h.0.attn.c_attn.weight")
    assert torch.equal(torch.cat([b.matrix(weight) for b in qkv.blocks], 1), weight)
    (up,) = found["transformer.h.0.mlp.c_fc.weight"].blocks
    assert (up.shape, up.fans) == ((32, 128), (128, 32))
    assert found["transformer.wpe.weight"].reason == "embedding"


def test_phi3_fused_projections_follow_the_head_counts() -> None:
    found = routes_of(model("phi3", **LLAMA))
    qkv = found["model.layers.0.self_attn.qkv_proj.weight"]
    assert [(b.part, b.shape) for b in qkv.blocks] == [("q", (32, 32)), ("k", (16, 32)), ("v", (16, 32))]
    gate_up = found["model.layers.0.mlp.gate_up_proj.weight"]
    assert [(b.part, b.shape) for b in gate_up.blocks] == [("gate", (48, 32)), ("up", (48, 32))]


def test_gpt_neox_heads_are_interleaved() -> None:
    net = model("gpt_neox", **NEOX)
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    blocks = routes_of(net)[name].blocks
    weight = net.get_parameter(name).detach()
    by_head = weight.view(4, 3, 8, 32)
    for i, block in enumerate(blocks):
        assert torch.equal(block.matrix(weight), by_head[:, i].reshape(32, 32))
        back = torch.zeros_like(weight)
        block.view(back).copy_(block.like_view(block.matrix(weight)))
        assert torch.equal(block.matrix(back), block.matrix(weight))


def test_a_fused_weight_of_unknown_sizes_stays_whole_and_says_so() -> None:
    net = nn.Sequential()
    net.add_module("block", nn.ModuleDict({"qkv_proj": nn.Linear(8, 24, bias=False)}))
    (found,) = routes_of(net).values()
    assert len(found.blocks) == 1
    assert "kept whole" in found.reason


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "gpt_neox"])
def test_the_fused_step_equals_the_step_of_separate_weights(kind: str) -> None:
    """Each block alone, as a Linear of its own would be: the same update, bit by bit up to batching."""
    net = model(kind, **{"gpt2": GPT, "phi3": LLAMA, "gpt_neox": NEOX}[kind])
    name = next(n for n, r in routes_of(net).items() if len(r.blocks) == 3)
    fused = net.get_parameter(name)
    blocks = routes_of(net)[name].blocks
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    assert fused.grad is not None
    parts = [nn.Parameter(b.matrix(fused.detach()).clone()) for b in blocks]
    for part, block in zip(parts, blocks):
        part.grad = block.matrix(fused.grad).clone()
    options = {"lr": 0.1, "rank": 4, "basis": "svd"}
    optimizers.build("sumo", net.named_parameters(), modules=net, **options).step()
    optimizers.SUMO(parts, **options).step()
    for part, block in zip(parts, blocks):
        torch.testing.assert_close(block.matrix(fused.detach()), part.detach(), rtol=1e-5, atol=1e-6)


def test_rows_cols_reads_the_fans_of_a_conv1d() -> None:
    """c_fc of GPT-2 is stored (in, out) = (32, 128): its factor is √(128/32) = 2, as the equal Linear's."""
    net = model("gpt2", **GPT)
    weight = net.get_parameter("transformer.h.0.mlp.c_fc.weight")
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    before = weight.detach().clone()
    optimizers.build("muon_svd", net.named_parameters(), modules=net, lr=1.0).step()
    assert torch.linalg.matrix_norm(before - weight.detach(), 2).item() == pytest.approx(2.0, rel=1e-5)


def test_no_hidden_matrix_is_an_error() -> None:
    with pytest.raises(OptionError, match="finds no hidden matrix"):
        optimizers.build("muon", [("embed.weight", nn.Parameter(torch.ones(4, 4)))])
    optimizers.build("adamw", [("embed.weight", nn.Parameter(torch.ones(4, 4)))])


def test_a_parameter_given_twice_is_an_error() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(OptionError, match="given twice"):
        optimizers.build("muon", [("a", weight), ("b", weight)])


def test_frozen_parameters_are_left_out() -> None:
    net = model("llama", **LLAMA)
    net.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(False)
    optimizer = optimizers.build("sumo", net.named_parameters(), modules=net)
    assert sum(r.rule == "sumo" for r in optimizer.routes) == 13  # type: ignore[attr-defined]


def test_plain_parameters_go_by_ndim() -> None:
    params = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2, 3, 4))]
    optimizer = optimizers.Muon(params)
    assert [r.rule for r in optimizer.routes] == ["muon", "adamw", "adamw"]
    assert table(optimizer.routes)[0][1] == "4×4"


def test_experts_are_matrices_of_their_own() -> None:
    config = {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 1}
    net = model("mixtral", **config)
    found = routes_of(net)
    stacked = [r for r in found.values() if len(r.shape) == 3]
    assert stacked
    assert all(len(r.blocks) == (6 if "gate_up" in r.name else 3) and r.rule == "muon" for r in stacked)
    assert any(r.reason == "router" for r in found.values())


def test_a_rank_above_a_side_names_the_matrix() -> None:
    net = model("llama", **LLAMA)
    with pytest.raises(OptionError, match=r"k_proj.weight \(16×32\)"):
        optimizers.build("sumo", net.named_parameters(), modules=net, rank=17)


def heads_of(kind: str, config: dict[str, Any], **more: Any) -> tuple[nn.Module, dict[str, Route]]:
    net = model(kind, **config)
    optimizer: Any = optimizers.build("muon", net.named_parameters(), modules=net, split_heads=True, **more)
    return net, {r.name: r for r in optimizer.routes}


@pytest.mark.parametrize(
    ("kind", "config", "name", "parts"),
    [
        ("llama", LLAMA, "model.layers.0.self_attn.q_proj.weight", ["h0", "h1", "h2", "h3"]),
        ("llama", LLAMA, "model.layers.0.self_attn.k_proj.weight", ["h0", "h1"]),
        (
            "phi3",
            LLAMA,
            "model.layers.0.self_attn.qkv_proj.weight",
            [*(f"q.h{i}" for i in range(4)), "k.h0", "k.h1", "v.h0", "v.h1"],
        ),
        ("gpt2", GPT, "transformer.h.0.attn.c_attn.weight", [f"{k}.h{i}" for k in "qkv" for i in range(4)]),
        (
            "gpt_neox",
            NEOX,
            "gpt_neox.layers.0.attention.query_key_value.weight",
            [f"{k}.h{i}" for k in "qkv" for i in range(4)],
        ),
    ],
)
def test_heads_are_matrices_of_their_own(
    kind: str, config: dict[str, Any], name: str, parts: list[str]
) -> None:
    """Each element of Q, K and V is in one head, and heads are what the attention layer reads."""
    net, found = heads_of(kind, config)
    blocks = found[name].blocks
    assert [b.part for b in blocks] == parts
    assert [b.name for b in blocks] == [f"{name}[{part}]" for part in parts]
    assert found[name].reason.endswith("split into heads")
    weight = torch.arange(dict(net.named_parameters())[name].numel()).view(found[name].shape)
    seen = torch.cat([b.matrix(weight).reshape(-1) for b in blocks])
    assert torch.equal(seen.sort().values, weight.reshape(-1))
    # 32 hidden, 4 heads: 8 rows each. Conv1D stores them as columns.
    assert {b.shape for b in blocks} == {(32, 8) if kind == "gpt2" else (8, 32)}
    if kind == "gpt_neox":
        # Stored head by head: its query, its key, its value.
        rows = {b.part: int(b.matrix(weight)[0, 0]) // 32 for b in blocks}
        assert [rows[f"{k}.h{i}"] for i in range(2) for k in "qkv"] == [0, 8, 16, 24, 32, 40]
    others = [r for n, r in found.items() if r.rule == "muon" and "mlp" in n]
    assert others
    assert all("heads" not in r.reason for r in others)


@pytest.mark.parametrize("kind", ["phi3", "gpt2", "gpt_neox"])
def test_a_step_by_head_equals_that_of_separate_weights(kind: str) -> None:
    configs = {"phi3": LLAMA, "gpt2": GPT, "gpt_neox": NEOX}
    net = model(kind, **configs[kind]).double()
    optimizer: Any = optimizers.build(
        "muon", net.named_parameters(), modules=net, split_heads=True, lr=0.1, orthogonalizer_dtype="float32"
    )
    route_of = next(r for r in optimizer.routes if len(r.blocks) > 2 and "heads" in r.reason)
    fused = dict(net.named_parameters())[route_of.name]
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(fused.shape, generator=generator, dtype=torch.float64)
    alone = []
    for block in route_of.blocks:
        part = nn.Parameter(block.matrix(fused.detach()).clone())
        # Conv1D's fans decide the scale, so that what is stored (in, out) is stepped as (out, in).
        weight = nn.Parameter(part.detach().mT.clone()) if block.transposed else part
        gradient_part = block.matrix(gradient).clone()
        weight.grad = gradient_part.mT.clone() if block.transposed else gradient_part
        optimizers.build("muon", [("w", weight)], lr=0.1, orthogonalizer_dtype="float32").step()
        alone.append(weight.detach().mT if block.transposed else weight.detach())
    fused.grad = gradient
    optimizer.step()
    for block, expected in zip(route_of.blocks, alone):
        torch.testing.assert_close(block.matrix(fused.detach()), expected, rtol=1e-10, atol=1e-12)


def test_heads_of_unknown_sizes_stay_whole_and_say_so() -> None:
    net: Any = model("llama", **LLAMA)
    net.config.head_dim = 5
    for layer in net.model.layers:
        layer.self_attn.head_dim = 5
    with pytest.raises(
        OptionError, match="split_heads: true finds no projection to Q, K or V whose heads are known"
    ):
        optimizers.build("muon", net.named_parameters(), modules=net, split_heads=True)
    with pytest.raises(OptionError, match="with modules=model"):
        optimizers.build("muon", [("a", nn.Parameter(torch.ones(4, 6)))], split_heads=True)


def test_a_rank_above_a_head_names_the_head() -> None:
    net = model("llama", **LLAMA)
    with pytest.raises(
        OptionError, match=r"rank: 12 is larger than a side of .*q_proj\.weight\[h0\] \(8×32\)"
    ):
        optimizers.build("sumo", net.named_parameters(), modules=net, split_heads=True, rank=12)


ENCODER = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
DISTILBERT = {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
BERT_LAYER = (
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
)  # fmt: skip


def classifier(kind: str) -> nn.Module:
    config = AutoConfig.for_model(
        kind, pad_token_id=0, **{"distilbert": DISTILBERT, "llama": LLAMA}.get(kind, ENCODER)
    )
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize(
    ("kind", "layer", "matrices", "others"),
    [
        (
            "bert",
            "bert.encoder.layer",
            BERT_LAYER,
            {"bert.pooler.dense": "pooler", "classifier": "output head"},
        ),
        (
            "roberta",
            "roberta.encoder.layer",
            BERT_LAYER,
            {"classifier.dense": "output head", "classifier.out_proj": "output head"},
        ),
        (
            "distilbert",
            "distilbert.transformer.layer",
            (*(f"attention.{p}_lin" for p in ("q", "k", "v", "out")), "ffn.lin1", "ffn.lin2"),
            {"pre_classifier": "output head", "classifier": "output head"},
        ),
        (
            "llama",
            "model.layers",
            tuple(f"self_attn.{p}_proj" for p in "qkvo")
            + tuple(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
            {"score": "output head"},
        ),
    ],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_classifiers(
    kind: str, layer: str, matrices: tuple[str, ...], others: dict[str, str], by_name: bool
) -> None:
    """The layers' matrices take the rule; what reads the encoder's result takes AdamW, and says as what."""
    net = classifier(kind)
    found = routes_of(net, by_name=by_name)
    expected = {f"{layer}.{i}.{name}.weight" for i in range(2) for name in matrices}
    assert {name for name, r in found.items() if r.rule == "muon"} == expected
    for name, reason in others.items():
        assert (found[f"{name}.weight"].rule, found[f"{name}.weight"].reason) == ("adamw", reason)
    embeddings = [r for r in found.values() if r.reason.startswith("embedding")]
    assert len(embeddings) == {"bert": 3, "roberta": 3, "distilbert": 2, "llama": 1}[kind]


def test_which_modules_take_the_rule_is_an_option() -> None:
    net = classifier("bert")
    built: Any = optimizers.build("muon", net.named_parameters(), modules=net, matrix_modules="sumo_glue")
    found = {r.name: r for r in built.routes}
    # The public SUMO script: every name with "output" goes to AdamW.
    chosen = {
        f"bert.encoder.layer.{i}.{name}.weight"
        for i in range(2)
        for name in BERT_LAYER
        if "output" not in name
    }
    assert {name for name, r in found.items() if r.rule == "muon"} == chosen
    query, output = (
        f"bert.encoder.layer.0.{name}.weight" for name in ("attention.self.query", "output.dense")
    )
    assert found[query].reason == "hidden matrix (Linear), chosen by query"
    assert (found[output].reason, found[output].rule) == ("hidden matrix, not in matrix_modules", "adamw")
    assert found["bert.pooler.dense.weight"].reason == "pooler"
    # All hidden matrices, by name and by default, is one choice.
    every: Any = optimizers.build("muon", net.named_parameters(), modules=net, matrix_modules="all")
    plain: Any = optimizers.build("muon", net.named_parameters(), modules=net)
    assert every.routes == plain.routes
    assert every.options == plain.options
    one: Any = optimizers.build(
        "muon", net.named_parameters(), modules=net, matrix_modules=["layer.1", "qu*ry"]
    )
    assert sum(r.rule == "muon" for r in one.routes) == 6 + 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            ["query", "querry"],
            "matrix_modules: querry is in the name of no hidden matrix; allowed: query, key, value",
        ),
        (["pooler"], "pooler is in the name of no hidden matrix"),
        ([], "is not allowed"),
        ([3], "is not allowed"),
        (7, "is not allowed"),
        ("sumo_glu", "did you mean sumo_glue"),
    ],
)
def test_patterns_that_choose_nothing(value: Any, message: str) -> None:
    net = classifier("bert")
    with pytest.raises(OptionError, match=message):
        optimizers.build("muon", net.named_parameters(), modules=net, matrix_modules=value)
    with pytest.raises(OptionError, match="needs the names of the parameters"):
        optimizers.build("muon", [nn.Parameter(torch.ones(4, 6))], matrix_modules=["a"])  # type: ignore[list-item]
    with pytest.raises(OptionError, match="is not an option of adamw"):
        optimizers.build("adamw", net.named_parameters(), modules=net, matrix_modules=["query"])
