"""Runs of the harness on the device: every preset, engines of one process, refreshes, memory, checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import optimizers
from tests.harness.running import small, trained, update_error, write_documents

TOLERANCE = 2e-3
"""Of an update in fp32 against the CPU's, relative: reductions in another order, four steps of a small model."""
BF16_TOLERANCE = 0.15
"""The same in bf16: rounding of 2⁻⁸ in each product, which orthogonalization amplifies in small directions."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("corpus"))


def preset_keys(preset: str) -> list[str]:
    options = optimizers.resolve(preset)
    keys = [f"optimizer={preset}"]
    if "refresh_interval" in options:
        # Steps 0 and 3 renew every subspace.
        keys += ["optimizer.rank=8", "optimizer.refresh_interval=3"]
    return keys


def on(device: str, words: list[str], change: Callable[..., None] | None = None) -> Any:
    """Train on a device, whatever there is."""
    before = os.environ.get("ACCELERATE_USE_CPU")
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from accelerate.state import PartialState

    # It remembers the device of the process' first run.
    PartialState._reset_state()
    try:
        return trained(0, words, change)
    finally:
        PartialState._reset_state()
        if before is None:
            os.environ.pop("ACCELERATE_USE_CPU", None)


@pytest.mark.parametrize("preset", list(optimizers.PRESETS))
def test_a_preset_moves_the_weights_as_on_the_cpu(
    preset: str, corpus: Path, tmp_path: Path, gpu_device: torch.device
) -> None:
    words = small(
        corpus, tmp_path, *preset_keys(preset), "precision=fp32", "eval.every=null", "moments.every=null"
    )
    if gpu_device.type == "cpu" and preset not in ("sumo", "muon"):
        pytest.skip("two presets show on a CPU that this test works")
    expected = on("cpu", words)
    found = on(gpu_device.type, words)
    assert update_error(expected[:2], found[:2]) < TOLERANCE
    assert found.skipped == 0


@pytest.mark.parametrize("precision", ["bf16", "bf16_pure"])
def test_bf16_is_near_the_cpu(precision: str, corpus: Path, tmp_path: Path, gpu_device: torch.device) -> None:
    words = small(corpus, tmp_path, "optimizer=adamw", f"precision={precision}", "moments.every=null")
    found, expected = on(gpu_device.type, words), on("cpu", words)
    change = [(expected.after[n].double() - before.double()).norm() for n, before in expected.before.items()]
    apart = [(found.after[n].double() - after.double()).norm() for n, after in expected.after.items()]
    assert sum(apart) < BF16_TOLERANCE * sum(change)


@pytest.mark.parametrize("preset", ["sumo", "muon", "galore", "adamw"])
def test_ordinary_steps_never_wait_for_the_device(
    preset: str, corpus: Path, tmp_path: Path, gpu_device: torch.device
) -> None:
    """In CUDA's sync debug mode a wait of the optimizer's step is an error, after a first step that allocates."""
    words = small(corpus, tmp_path, *preset_keys(preset), "steps=3", "eval.every=null", "moments.every=null")
    steps: list[int] = []

    def watch(run: Any) -> None:
        def before(*_: Any) -> None:
            steps.append(len(steps))
            if gpu_device.type == "cuda" and len(steps) > 1:
                torch.cuda.set_sync_debug_mode("error")

        def after(*_: Any) -> None:
            if gpu_device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")

        run.optimizer.register_step_pre_hook(before)
        run.optimizer.register_step_post_hook(after)

    on(gpu_device.type, words, watch)
    assert steps == [0, 1, 2]


def test_control_a_read_in_a_step_is_an_error(gpu_device: torch.device) -> None:
    value = torch.ones(3, device=gpu_device)
    if gpu_device.type == "cpu":
        assert float(value.sum()) == 3.0
        return
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        float(value.sum())
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("preset", ["sumo", "galore", "muon", "adamw"])
def test_two_runs_on_the_device_draw_the_same_sketches(
    preset: str, corpus: Path, tmp_path: Path, gpu_device: torch.device
) -> None:
    words = small(corpus, tmp_path, *preset_keys(preset), "moments.every=null", "eval.every=null")
    first, second = on(gpu_device.type, words), on(gpu_device.type, words)
    # Atomic additions of the embedding's backward pass may differ in the last bit; other sketches would differ at once.
    assert update_error(first[:2], second[:2]) < TOLERANCE


def test_one_process_of_fsdp2_is_single(corpus: Path, tmp_path: Path, gpu_device: torch.device) -> None:
    words = small(corpus, tmp_path, *preset_keys("sumo"), "moments.every=null", "precision=fp32")
    single = on(gpu_device.type, words)
    found = _in_a_group(gpu_device, [*words, "engine=fsdp2"])
    assert update_error(single[:2], found[:2]) < TOLERANCE


def _in_a_group(device: torch.device, words: list[str]) -> Any:
    """Train on an engine that makes a process group, and leave the group."""
    import torch.distributed as dist

    try:
        return on(device.type, words)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_memory_phases_are_recorded(corpus: Path, tmp_path: Path, gpu_device: torch.device) -> None:
    rows = on(gpu_device.type, small(corpus, tmp_path, "optimizer=adamw")).rows
    last = {key: value for row in rows for key, value in row.items() if key.startswith("memory/")}
    assert last["memory/weights_bytes"] > 0
    peaks = {key: value for key, value in last.items() if "peak" in key}
    assert peaks
    assert all(value is None or value > 0 for value in peaks.values())
    if gpu_device.type == "cuda":
        held = last["memory/weights_bytes"] + last["memory/optimizer_state_bytes"]
        assert max(value for value in peaks.values() if value) >= held


def test_a_checkpoint_goes_on_where_it_was_written(
    corpus: Path, tmp_path: Path, gpu_device: torch.device
) -> None:
    """State of every kind is on the device again after it was read, and the next steps are those of a whole run."""
    parameters = [
        torch.nn.Parameter(torch.randn(24, 16, generator=torch.Generator().manual_seed(1)).to(gpu_device))
        for _ in range(2)
    ]
    gradient = torch.randn(24, 16, generator=torch.Generator().manual_seed(2)).to(gpu_device)

    def steps(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, count: int) -> None:
        for _ in range(count):
            weight.grad = gradient * weight.detach().sum().sign()
            optimizer.step()

    first = optimizers.build("sumo", [("w", parameters[0])], rank=4, refresh_interval=3)
    steps(first, parameters[0], 2)
    path = tmp_path / "state.pt"
    torch.save({"state": first.state_dict(), "weight": parameters[0].detach().cpu()}, path)
    steps(first, parameters[0], 3)
    saved = torch.load(path, map_location="cpu", weights_only=False)
    second = optimizers.build("sumo", [("w", parameters[1])], rank=4, refresh_interval=3)
    with torch.no_grad():
        parameters[1].copy_(saved["weight"])
    second.load_state_dict(saved["state"])
    steps(second, parameters[1], 3)
    torch.testing.assert_close(parameters[1], parameters[0], rtol=1e-6, atol=1e-7)
    for entry in second.state.values():
        assert all(
            value.device == gpu_device for value in entry.values() if torch.is_tensor(value) and value.ndim
        )


def test_flash_attention_may_run(corpus: Path, tmp_path: Path, gpu_device: torch.device) -> None:
    """Queries of a bf16 run are of a dtype and shape that the flash kernel takes, and it takes causal attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query = torch.randn(2, 2, 32, 16, device=gpu_device, dtype=torch.bfloat16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0.03)
    words = small(corpus, tmp_path, "optimizer=adamw", "precision=bf16", "steps=1", "moments.every=null")
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        # torch raises where it may take none of the allowed kernels.
        assert on(gpu_device.type, words).skipped == 0
