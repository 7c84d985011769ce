"""QK-clip after Muon's step: whole projections, heads as matrices, steps that are skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import optimizers
from optimizers.qk_clip import HeadLogits, head_factors

HEADS, DIM, HIDDEN = 3, 4, 10
LARGEST = torch.tensor([50.0, 400.0, 100.0])
FACTORS = torch.tensor([1.0, 0.5, 1.0])  # (100/400)^½
NAMES = ("layers.0.self_attn.q_proj.weight", "layers.0.mlp.up_proj.weight")


def built(**options: Any) -> tuple[list[torch.nn.Parameter], Any]:
    generator = torch.Generator().manual_seed(0)
    dtype = options.pop("dtype", torch.float32)
    weights = [
        torch.nn.Parameter(torch.randn(HEADS * DIM, HIDDEN, generator=generator).to(dtype)) for _ in NAMES
    ]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator).to(dtype)
    settings = {"lr": 0.1, "orthogonalizer_dtype": "float32", **options}
    return weights, optimizers.build("muon_clip", list(zip(NAMES, weights)), **settings)


def stepped(logits: torch.Tensor | None, exponent: float = 0.5, **options: Any) -> list[torch.Tensor]:
    weights, optimizer = built(**options)
    if logits is not None:
        optimizer.units.clip_attention({NAMES[0]: HeadLogits(logits, exponent)})
    optimizer.step()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_heads_above_the_threshold_shrink_after_the_step(exponent: float) -> None:
    plain, clipped = stepped(None), stepped(LARGEST, exponent)
    expected = plain[0] * (FACTORS ** (2 * exponent)).repeat_interleave(DIM)[:, None]
    torch.testing.assert_close(clipped[0], expected, rtol=1e-6, atol=0)
    assert torch.equal(clipped[0][:DIM], plain[0][:DIM])  # a factor of 1 keeps every bit
    assert torch.equal(clipped[1], plain[1])


def test_without_clipping_it_is_moonlight_s_muon() -> None:
    weights, _ = built()
    other = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    for weight, o in zip(weights, other):
        assert weight.grad is not None
        o.grad = weight.grad.clone()
    moonlight = optimizers.build(
        "muon_moonlight", list(zip(NAMES, other)), lr=0.1, orthogonalizer_dtype="float32"
    )
    moonlight.step()
    for mine, theirs in zip(stepped(None), other):
        assert torch.equal(mine, theirs.detach())
    for mine, theirs in zip(stepped(LARGEST, qk_clip_threshold=None), other):
        assert torch.equal(mine, theirs.detach())


def test_a_head_that_is_a_matrix_of_its_own_takes_its_factor() -> None:
    """`split_heads` needs the sizes of heads, which the model tells."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HEADS * DIM, intermediate_size=16, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, vocab_size=32,
    )  # fmt: skip
    name = "model.layers.0.self_attn.q_proj.weight"
    moved = []
    for logits in (None, LARGEST):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        optimizer: Any = optimizers.build(
            "muon_clip", model.named_parameters(), modules=model, lr=0.1, split_heads=True,
            orthogonalizer_dtype="float32",
        )  # fmt: skip
        model(input_ids=torch.arange(16)[None], labels=torch.arange(16)[None]).loss.backward()
        if logits is not None:
            optimizer.units.clip_attention({name: HeadLogits(logits, 0.5)})
        optimizer.step()
        moved.append(dict(model.named_parameters())[name].detach())
    torch.testing.assert_close(
        moved[1], moved[0] * FACTORS.repeat_interleave(DIM)[:, None], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("everything", [False, True])
def test_a_skipped_step_clips_nothing(everything: bool) -> None:
    weights, optimizer = built()
    before = [w.detach().clone() for w in weights]
    optimizer.units.clip_attention({NAMES[0]: HeadLogits(LARGEST, 0.5)})
    if everything:
        optimizer.found_inf = torch.ones(1)
    else:
        weights[0].grad = torch.full_like(weights[0], torch.nan)
    optimizer.step()
    assert torch.equal(weights[0].detach(), before[0])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_half_precision_weights(rounding: str) -> None:
    plain = stepped(None, dtype=torch.bfloat16, rounding=rounding)
    clipped = stepped(LARGEST, dtype=torch.bfloat16, rounding=rounding)
    assert torch.equal(clipped[0][DIM : 2 * DIM], plain[0][DIM : 2 * DIM] * 0.5)
    assert torch.equal(clipped[0][:DIM], plain[0][:DIM])


def test_factors_of_logits_that_mean_nothing() -> None:
    bad = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0, 400.0])
    assert head_factors(HeadLogits(bad, 0.5), 100.0).tolist() == [1.0, 1.0, 1.0, 1.0, 0.5]


def test_bad_input_is_refused() -> None:
    _, optimizer = built()
    with pytest.raises(ValueError, match="no parameter of that name"):
        optimizer.units.clip_attention({"nothing": HeadLogits(LARGEST, 0.5)})
    with pytest.raises(ValueError, match="5 heads do not divide its 12 rows"):
        optimizer.units.clip_attention({NAMES[0]: HeadLogits(torch.ones(5), 0.5)})
    with pytest.raises(optimizers.OptionError, match="qk_clip_threshold"):
        built(qk_clip_threshold=0.0)
