"""The largest attention logits of a batch, and that clipping by them bounds the logits of the next forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness.errors import InputError
from harness.model import attention_logits
from harness.model.attention_logits import CLIPPED, AttentionLogits, largest_logits
from tests.distributed.pool import RankPool
from tests.harness.running import small, trained, update_error, write_documents

THRESHOLD = 0.05
CLIP = (
    "optimizer=muon_clip",
    "optimizer.lr=0.01",
    "optimizer.aux_lr=0.01",
    f"optimizer.qk_clip_threshold={THRESHOLD}",
    "optimizer.orthogonalizer_dtype=float32",
    "schedule.warmup=0",
    "moments.every=null",
    "eval.every=null",
    "model.config.initializer_range=0.2",
)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 5, 300])
def test_maxima_are_those_of_the_whole_matrix_of_logits(key_heads: int, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, length, 8, generator=generator)
    key = torch.randn(2, key_heads, length, 8, generator=generator)
    logits = query @ key.repeat_interleave(4 // key_heads, 1).mT * 0.3
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    expected = logits.masked_fill(hidden, -torch.inf).amax((0, 2, 3))
    torch.testing.assert_close(largest_logits(query, key, 0.3), expected)
    if length > 1:
        assert not torch.allclose(logits.amax((0, 2, 3)), expected)  # control: the future would be seen


class Given:
    """Stands where the optimizer does."""

    @property
    def units(self) -> Given:
        return self

    def clip_attention(self, logits: dict[str, Any]) -> None:
        self.logits = {name: (heads.largest.clone(), heads.exponent) for name, heads in logits.items()}


@pytest.mark.parametrize("key_heads", [1, 2])
def test_clipping_brings_logits_to_the_threshold(key_heads: int) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=key_heads, vocab_size=32, initializer_range=1.0,
        )
    )  # fmt: skip
    model.set_attn_implementation(CLIPPED)
    logits, given = AttentionLogits(model, torch.device("cpu")), Given()
    tokens = torch.arange(30)[None]

    def largest() -> dict[str, tuple[torch.Tensor, float]]:
        logits.begin()
        model(input_ids=tokens)
        logits.give(given)
        return given.logits

    before = largest()
    threshold = float(before["model.layers.0.self_attn.q_proj.weight"][0].max()) / 3
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, (found, exponent) in before.items():
            factors = (threshold / found.clamp_min(threshold)) ** exponent
            weights[name].mul_(factors.repeat_interleave(len(weights[name]) // 2)[:, None])
    after = largest()["model.layers.0.self_attn.q_proj.weight"][0]
    torch.testing.assert_close(
        after, before["model.layers.0.self_attn.q_proj.weight"][0].clamp_max(threshold)
    )
    # Evaluation leaves no trace.
    model.eval()
    logits.begin()
    model(input_ids=tokens)
    logits.give(given)
    assert torch.isneginf(given.logits["model.layers.0.self_attn.q_proj.weight"][0]).all()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text"))


def weights(rank: int, words: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Whole weights before and after a run, on rank 0."""
    found = trained(rank, words)
    return found.before, found.after


def local(rank: int, words: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same, with each process clipping by the logits that it has seen itself."""
    with patch.object(AttentionLogits, "reduce", lambda self: None):
        return weights(rank, words)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("zero1", marks=pytest.mark.slow), "zero3"])
def test_two_processes_clip_as_one_does(
    corpus: Path, tmp_path: Path, two_ranks: RankPool, engine: str
) -> None:
    words = [w for w in small(corpus, tmp_path, *CLIP) if w != "world_size=1"]
    alone = weights(0, [*words, "world_size=1"])
    pair = [*words, "world_size=2", f"engine={engine}"]
    assert update_error(alone, two_ranks.run(weights, pair)[0]) < 1e-3
    if engine == "fsdp2":
        # Controls: maxima of a process' own rows clip otherwise, and so does a bound that is never reached.
        assert update_error(alone, two_ranks.run(local, pair)[0]) > 1e-2
        loose = [w for w in words if "qk_clip_threshold" not in w]
        free = weights(0, [*loose, "world_size=1", "optimizer.qk_clip_threshold=1e6"])
        assert update_error(alone, free) > 0.1


def test_models_on_which_it_would_not_act_are_refused(corpus: Path, tmp_path: Path) -> None:
    words = small(corpus, tmp_path, *CLIP, "model.attention=eager")
    with pytest.raises(InputError, match="attention=eager"):
        trained(0, words)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
            attention_bias=True,
        )
    )  # fmt: skip
    assert "biases" in str(attention_logits.problem(model))
    assert "q_proj" in str(attention_logits.problem(torch.nn.Linear(2, 2)))
