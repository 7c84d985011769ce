"""Initialization tensor by tensor: the bits of a model built whole, for every family, within the memory of a tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import profile
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from harness import model
from harness.config import compose
from harness.config.schema import ModelConfig, Precision
from harness.model import initial_weights
from harness.model.initial_weights import InitialWeights, NotRecorded
from tests.harness.model.test_dtypes import FAMILIES, SIZES, _config

SEED = 3


def _whole(network: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _delivered(weights: InitialWeights) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}

    def put(name: str, value: torch.Tensor) -> None:
        assert name not in tensors
        tensors[name] = value.clone()

    weights.deliver(put)
    return tensors


def _deferred(config: ModelConfig, precision: Precision = "fp32") -> tuple[nn.Module, Any]:
    network, weights = model.build_deferred(config, seed=SEED, precision=precision)
    assert weights is not None
    assert all(parameter.is_meta for parameter in network.parameters())
    return network, weights


def check_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("kind", [*FAMILIES, "tied"])
def test_the_bits_are_those_of_transformers(kind: str) -> None:
    tied = ModelConfig(model_type="llama", config={**SIZES, "tie_word_embeddings": True})
    config = tied if kind == "tied" else _config(kind)
    network, weights = _deferred(config)
    whole = model.build(config, seed=SEED)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    check_equal(_delivered(weights), _whole(whole))
    # A second time, too, and without a trace in the generator.
    check_equal(_delivered(weights), _whole(whole))
    assert torch.equal(torch.get_rng_state(), before)
    assert {n: t.shape for n, t in _whole(network).items()} == {n: t.shape for n, t in _whole(whole).items()}
    assert type(network) is type(whole)


def test_controls_another_seed_and_missing_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    _, weights = _deferred(_config("llama"))
    bits = _delivered(weights)["lm_head.weight"]
    other = model.build(_config("llama"), seed=SEED + 1).get_parameter("lm_head.weight")
    assert not torch.equal(bits, other)
    # Draws of constructors, which nothing keeps, still move the generator.
    monkeypatch.setattr(initial_weights._Draw, "repeat", lambda draw: None)
    assert not torch.equal(bits, _delivered(weights)["lm_head.weight"])


def _peak_bytes(function: Callable[[], object]) -> int:
    """Return the most that torch's CPU allocator held at once during a call, above what it held before."""
    with profile(profile_memory=True) as profiled:
        function()
    events: Any = profiled.profiler
    memory = [event for event in events.kineto_results.events() if event.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_one_tensor_is_in_memory_at_a_time() -> None:
    config = compose.load(["model=llama_tiny"]).model
    network, weights = _deferred(config)
    largest = max(parameter.numel() for parameter in network.parameters()) * 4
    total = sum(parameter.numel() for parameter in network.parameters()) * 4
    # The tensor, a byte for each of its numbers when they are checked, and small change.
    peak = _peak_bytes(lambda: weights.deliver(lambda name, value: None))
    assert largest <= peak < 1.3 * largest + 20_000
    assert peak < total / 2
    # Control: what the whole model takes.
    assert _peak_bytes(lambda: model.build(config, seed=SEED)) >= total


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_numbers_come_from_files_by_name(kind: str, tmp_path: Path) -> None:
    network: Any = model.build(_config(kind), seed=1)
    network.save_pretrained(tmp_path / "saved", max_shard_size="20kB")
    config = ModelConfig(path=str(tmp_path / "saved"))
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    _, weights = _deferred(config)
    check_equal(_delivered(weights), _whole(network))


def test_files_with_other_names_are_loaded_whole(tmp_path: Path) -> None:
    network: Any = model.build(_config("llama"), seed=1)
    # As saved by the model without its head's prefix: transformers knows how to rename, we leave it to that.
    network.model.save_pretrained(tmp_path / "saved")
    network.lm_head.weight = network.model.embed_tokens.weight
    config = ModelConfig(path=str(tmp_path / "saved"), config={"tie_word_embeddings": True})
    lines: list[str] = []
    loaded, weights = model.build_deferred(config, seed=0, precision="fp32", say=lines.append)
    assert weights is None
    check_equal(_whole(loaded), _whole(network))
    assert lines == [
        "every process initializes the whole model in host memory: the weight files have other names or shapes"
    ]


class _Odd(LlamaForCausalLM):
    """A family that initializes in ways that transformers' own do not."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)


class _FilledByConstructor(_Odd):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.full((3,), 2.0))


class _ReadsOutside(_Odd):
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and hasattr(self, "model"):
            module.weight.data.mul_(self.model.embed_tokens.weight.std())


class _Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Parameter(torch.zeros(2))


class _FillsPart(_Odd):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.extra = _Extra()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, _Extra):
            module.part[0] = 1.0


class _DrawsOnTheCpu(_Odd):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.register_buffer("features", torch.randn(3, device="cpu"))


def _llama() -> LlamaConfig:
    sizes: dict[str, Any] = dict(SIZES)
    return LlamaConfig(**sizes)


def _record(kind: type[Any]) -> InitialWeights:
    def whole() -> nn.Module:
        torch.manual_seed(SEED)
        return kind(_llama())

    return initial_weights.record(lambda: kind(_llama()), seed=SEED, build_whole=whole)[1]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (_FilledByConstructor, "scale gets its numbers in a constructor"),
        (_ReadsOutside, "tensors outside of it"),
        (_DrawsOnTheCpu, "a constructor draws numbers"),
    ],
)
def test_what_cannot_be_repeated_is_found_out(kind: type[Any], reason: str) -> None:
    with pytest.raises(NotRecorded, match=reason):
        _record(kind)
    _record(_Odd)


def test_numbers_that_a_call_leaves_unset_come_from_the_whole_model() -> None:
    tensors: dict[str, torch.Tensor] = {}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    _record(_FillsPart).deliver(tensors.__setitem__)
    # Else all processes would draw the same dropout afterwards.
    assert torch.equal(torch.get_rng_state(), before)
    assert tensors["extra.part"].tolist() == [1.0, 0.0]
    torch.manual_seed(SEED)
    check_equal(tensors, _whole(_FillsPart(_llama())))


def test_transformers_own_methods_are_back_afterwards() -> None:
    _deferred(_config("llama"))
    torch.manual_seed(SEED)
    again = AutoModelForCausalLM.from_config(_llama())
    check_equal(_whole(again), _whole(model.build(_config("llama"), seed=SEED)))
