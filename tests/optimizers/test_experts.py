"""Stacks of experts: each expert's gate, up and down projections are matrices of their own, however they are stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import optimizers
from tests.optimizers.test_masked_steps import options

EXPERTS, HIDDEN, INNER = 3, 10, 8


class Experts(nn.Module):
    """As transformers stores them.

    Args:
        form: "rows" (E, 2i, h) gate above up; "columns" (E, h, 2i) gate left of up; "alternating" (E, h, 2i).
        says: tells how it is stored, as classes of transformers do; else shapes have to tell.
    """

    def __init__(self, form: str, dense: list[dict[str, torch.Tensor]], says: bool) -> None:
        super().__init__()
        self.form = form
        gate_up, down = [], []
        for parts in dense:
            gate, up = parts["gate"], parts["up"]
            if form == "alternating":
                gate_up.append(torch.stack([gate.mT, up.mT], -1).flatten(1))
            else:
                both = torch.cat([gate, up])
                gate_up.append(both if form == "rows" else both.mT)
            down.append(parts["down"] if form == "rows" else parts["down"].mT)
        self.gate_up_proj = nn.Parameter(torch.stack(gate_up).contiguous())
        self.down_proj = nn.Parameter(torch.stack(down).contiguous())
        if says:
            self.is_transposed, self.is_concatenated = form != "rows", form != "alternating"

    def dense(self) -> list[dict[str, torch.Tensor]]:
        found = []
        for both, down in zip(self.gate_up_proj.detach(), self.down_proj.detach()):
            if self.form == "alternating":
                gate, up = both[:, ::2].mT, both[:, 1::2].mT
            else:
                gate, up = (both if self.form == "rows" else both.mT).chunk(2)
            found.append({"gate": gate, "up": up, "down": down if self.form == "rows" else down.mT})
        return found


def start() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    return [{k: torch.randn(s, generator=generator) for k, s in shapes.items()} for _ in range(EXPERTS)]


def slopes(t: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(100 + t)
    return [{k: torch.randn(v.shape, generator=generator) for k, v in parts.items()} for parts in start()]


def as_stack(preset: str, form: str, says: bool, **more: Any) -> tuple[list[dict[str, torch.Tensor]], Any]:
    net = nn.ModuleDict({"experts": Experts(form, start(), says)})
    optimizer: Any = optimizers.build(preset, net.named_parameters(), modules=net, lr=0.1, **more)
    experts = net["experts"]
    assert isinstance(experts, Experts)
    for t in range(4):
        given = Experts(form, slopes(t), says)
        experts.gate_up_proj.grad = given.gate_up_proj.detach().clone()
        experts.down_proj.grad = given.down_proj.detach().clone()
        optimizer.step()
    return experts.dense(), optimizer


def as_layers(preset: str, **more: Any) -> list[dict[str, torch.Tensor]]:
    """The oracle: every projection a linear layer of its own."""
    layers = [{k: nn.Parameter(v.clone()) for k, v in parts.items()} for parts in start()]
    named = [(f"layers.{e}.{k}_proj.weight", p) for e, parts in enumerate(layers) for k, p in parts.items()]
    optimizer = optimizers.build(preset, named, lr=0.1, **more)
    for t in range(4):
        for parts, given in zip(layers, slopes(t)):
            for k, p in parts.items():
                p.grad = given[k]
        optimizer.step()
    return [{k: p.detach() for k, p in parts.items()} for parts in layers]


# A basis of the long side depends on which side that is; a stored transpose keeps it where the sides differ.
CASES = {
    "muon": {"weight_decay": 0.1, "orthogonalizer_dtype": "float32"},
    "muon_svd": {},
    "muon_moonlight": {"orthogonalizer_dtype": "float32"},
    "sumo": {"rank": 4, "refresh_interval": 2, "basis": "svd"},
    "galore": {"rank": 4, "refresh_interval": 2},
}


@pytest.mark.parametrize(
    ("form", "says"),
    [("rows", True), ("rows", False), ("columns", True), ("columns", False), ("alternating", True)],
)
@pytest.mark.parametrize("preset", CASES)
def test_a_stack_trains_as_its_layers_would(preset: str, form: str, says: bool) -> None:
    found, optimizer = as_stack(preset, form, says, **CASES[preset])
    expected = as_layers(preset, **CASES[preset])
    for mine, theirs in zip(found, expected):
        for kind in mine:
            torch.testing.assert_close(mine[kind], theirs[kind], rtol=1e-4, atol=1e-5)
    names = {block.name for route in optimizer.routes for block in route.blocks}
    assert names == {
        *(f"experts.gate_up_proj[{e}.{part}]" for e in range(EXPERTS) for part in ("gate", "up")),
        *(f"experts.down_proj[{e}]" for e in range(EXPERTS)),
    }
    assert set(optimizer.moment_spectra()) == names


def test_control_gate_and_up_as_one_matrix_are_another_update() -> None:
    """What was done before: singular values of the halves of an orthogonal factor are no longer one."""
    both = torch.randn(2 * INNER, HIDDEN, generator=torch.Generator().manual_seed(0))
    halves = optimizers.polar(both).factor.chunk(2)
    assert any(float((torch.linalg.svdvals(half) - 1).abs().max()) > 0.1 for half in halves)


LLAMA = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32,
}  # fmt: skip
MOE = {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}
SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 12}
QWEN = {**LLAMA, "num_experts": 3, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": MOE,
    "qwen3_moe": {**QWEN, "moe_intermediate_size": 6, "decoder_sparse_step": 1},
    "olmoe": QWEN,
    "gpt_oss": {**MOE, "layer_types": ["full_attention"] * 2},
    "llama4_text": {
        **MOE, "num_experts_per_tok": 1, "intermediate_size_mlp": 12, "interleave_moe_layer_step": 1,
    },
    "jetmoe": {
        **SIZES, "num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 3, "num_experts_per_tok": 2,
    },
    "dbrx": {
        "vocab_size": 64, "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 32,
        "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 3, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
    },
    "granitemoe": MOE,
}  # fmt: skip


def model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, pad_token_id=0, **MODELS[kind]))


@pytest.mark.parametrize("kind", MODELS)
def test_experts_of_installed_models(kind: str) -> None:
    net = model(kind)
    optimizer: Any = optimizers.build("muon", net.named_parameters(), modules=net)
    by_name = dict(net.named_parameters())
    stacked = 0
    for route in optimizer.routes:
        parameter = by_name[route.name]
        if route.blocks:
            # Every element belongs to one matrix.
            seen = torch.zeros(parameter.shape)
            for block in route.blocks:
                block.view(seen).add_(1)
                assert max(block.shape) < 49
            assert bool((seen == 1).all()), route.name
        if any(word in route.name for word in ("experts", "ffn.experts", "input_linear", "output_linear")):
            if "router" in route.name:
                continue
            is_bias = route.name.rpartition(".")[2].endswith("bias")
            assert route.rule == ("adamw" if is_bias else "muon"), (route.name, route.reason)
            stacked += not is_bias
        fused = ("gate_up_proj", "mlp.input_linear", "block_sparse_moe.input_linear")
        if route.blocks and any(word in route.name for word in fused) and parameter.ndim == 3:
            assert [block.part for block in route.blocks][:2] == ["0.gate", "0.up"], route
            assert len(route.blocks) == 6
    assert stacked
    routers = [r for r in optimizer.routes if "router" in r.name or r.name.endswith(("gate.weight",))]
    assert routers
    assert all(r.rule == "adamw" for r in routers), [(r.name, r.rule) for r in routers]


def test_gpt_oss_gates_are_every_other_column() -> None:
    net = model("gpt_oss")
    optimizer: Any = optimizers.build("muon", net.named_parameters(), modules=net)
    (route,) = [r for r in optimizer.routes if r.name.endswith("layers.0.mlp.experts.gate_up_proj")]
    weight = dict(net.named_parameters())[route.name].detach()
    assert torch.equal(route.blocks[2].matrix(weight), weight[1][:, ::2])
    assert torch.equal(route.blocks[3].matrix(weight), weight[1][:, 1::2])
    assert route.blocks[2].fans == (12, 16)


def test_one_half_of_one_expert_may_skip_a_step() -> None:
    net = nn.ModuleDict({"experts": Experts("rows", start(), True)})
    experts = net["experts"]
    assert isinstance(experts, Experts)
    optimizer: Any = optimizers.build("sumo", net.named_parameters(), modules=net, **options("sumo"))
    for p in experts.parameters():
        p.grad = torch.randn_like(p)
    assert experts.gate_up_proj.grad is not None
    experts.gate_up_proj.grad[1, -1, -1] = float("nan")
    before = experts.dense()
    before = [{k: v.clone() for k, v in parts.items()} for parts in before]
    with pytest.warns(RuntimeWarning, match=r"^experts.gate_up_proj\[1.up\]: the gradient"):
        optimizer.step()
    for e, (old, new) in enumerate(zip(before, experts.dense())):
        for kind in old:
            assert torch.equal(old[kind], new[kind]) is ((e, kind) == (1, "up"))
