"""Which matrices an observed step looks at, and that their figures are those of a step that looks at all."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import optimizers
from optimizers import moment_sample
from optimizers.moment_sample import choose, work_of

SIDES = {"q_proj": (4096, 4096), "o_proj": (4096, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008)}
LLAMA_7B = {f"layers.{i}.{role}.weight": shape for i in range(32) for role, shape in SIDES.items()}
SMALL = {f"layers.{i}.{role}.weight": (512, 512) for i in range(8) for role in SIDES}


def _work(names: frozenset[str]) -> float:
    return sum(work_of(LLAMA_7B[name]) for name in names)


def test_a_small_model_is_looked_at_completely_by_everybody() -> None:
    assert choose(SMALL, "cpu") is None
    assert choose(SMALL, "cuda", replicas=8, replica=3) is None


def test_one_gpu_samples_every_role_of_a_large_model_within_its_work() -> None:
    sample = choose(LLAMA_7B, "cuda")
    assert sample is not None
    assert sample == choose(dict(reversed(LLAMA_7B.items())), "cuda"), "depends on the order"
    assert sample.names == sample.mine
    assert {name.split(".")[2] for name in sample.names} == set(SIDES)
    assert _work(sample.names) <= moment_sample.WORK["cuda"]


def test_replicas_share_a_sample_with_first_and_last_layers() -> None:
    samples = [choose(LLAMA_7B, "cuda", replicas=8, replica=rank) for rank in range(8)]
    shares = [sample.mine for sample in samples if sample]
    names = samples[0].names if samples[0] else frozenset()
    assert all(sample and sample.names == names for sample in samples)
    # Every matrix of the sample is looked at once.
    assert sorted(name for share in shares for name in share) == sorted(names)
    for role in SIDES:
        layers = sorted(int(name.split(".")[1]) for name in names if role in name)
        assert (layers[0], layers[-1]) == (0, 31)
        gaps = [b - a for a, b in pairwise(layers)]
        assert max(gaps) - min(gaps) <= 1
    assert max(map(_work, shares)) <= 1.3 * moment_sample.WORK["cuda"]


def test_at_least_one_matrix_is_looked_at() -> None:
    sample = choose(LLAMA_7B, "cpu")
    assert sample is not None
    assert len(sample.names) == 1


class Counted(TorchDispatchMode):
    """Counts operators, of which ``_local_scalar_dense`` is a read by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.decompositions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        if "eigh" in str(func):
            self.decompositions += args[0].shape[:-2].numel()
        return func(*args, **(kwargs or {}))


def _stepped(preset: str, *, observe: bool = True) -> tuple[dict[str, dict[str, float]], Counted]:
    torch.manual_seed(3)
    named = [(f"layers.{i}.{role}.weight", (24, 16)) for i in range(5) for role in ("a", "b")]
    parameters = [(name, torch.nn.Parameter(torch.randn(shape))) for name, shape in named]
    options: dict[str, Any] = {"rank": 8} if preset.startswith(("sumo", "galore")) else {}
    optimizer: Any = optimizers.build(preset, parameters, lr=0.01, **options)
    counted = Counted()
    for _ in range(2):
        for _, parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.observe_moments(observe)
        counted = Counted()
        with counted:
            optimizer.step()
    figures = {
        name: {key: value.item() for key, value in values.items()}
        for name, values in optimizer.moment_figures().items()
    }
    return figures, counted


@pytest.mark.parametrize("preset", ["sumo", "muon", "galore", "adamw"])
def test_a_sample_has_the_figures_of_the_whole(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, everything = _stepped(preset)
    assert len(whole) == 10
    shape = (8, 16) if preset in ("sumo", "galore") else (24, 16)
    # Room for six of the ten matrices: three of each role.
    monkeypatch.setattr(moment_sample, "WORK_ON_CPU", 6.5 * work_of(shape))
    sampled, counted = _stepped(preset)
    assert set(sampled) == {f"layers.{i}.{role}.weight" for i in (0, 2, 4) for role in ("a", "b")}
    for name, figures in sampled.items():
        assert figures == pytest.approx(whole[name], rel=1e-6, abs=1e-9, nan_ok=True), name
    if preset == "adamw":
        # Only what is looked at is decomposed.
        assert (everything.decompositions, counted.decompositions) == (10, 6)


@pytest.mark.parametrize("preset", ["muon", "adamw", "galore"])
def test_figures_make_the_host_read_nothing(preset: str) -> None:
    assert _stepped(preset)[1].reads == _stepped(preset, observe=False)[1].reads


def test_thousands_of_experts_on_a_thousand_replicas_are_dealt_out_at_once() -> None:
    experts = {f"layers.{i}.experts.{k}.up.weight": (2048, 1024) for i in range(40) for k in range(128)}
    sample = choose(experts, "cuda", replicas=1024, replica=7)
    assert sample is not None
    assert sample.names == set(experts)
    assert len(sample.mine) == len(experts) // 1024
