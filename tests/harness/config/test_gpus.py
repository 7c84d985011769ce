"""GPUs counted without torch, from a program that answers as nvidia-smi does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.config import gpus, launcher
from harness.config.gpus import Gpu

SLICE = "  MIG 1g.10gb Device {}: (UUID: MIG-{})\n"
LISTING = f"GPU 0: NVIDIA A100 (UUID: GPU-a)\n{SLICE.format(0, 'b')}{SLICE.format(1, 'c')}"
TABLE = "9.0, 81559, NVIDIA H100 80GB HBM3\n7.0, 16160, Tesla V100\n"
Answer = Callable[..., None]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Answer:
    """Put a program nvidia-smi on PATH that prints these texts."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(gpus, "DEVICE_FOLDER", tmp_path / "dev")
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    gpus._ask.cache_clear()

    def write(*, table: str | None, listing: str | None) -> None:
        (tmp_path / "table").write_text(table or "")
        (tmp_path / "listing").write_text(listing or "")
        codes = (int(table is None), int(listing is None))
        program = tmp_path / "nvidia-smi"
        program.write_text(
            f"#!/bin/sh\nif [ $1 = -L ]; then cat {tmp_path}/listing; exit {codes[1]}; fi\n"
            f"cat {tmp_path}/table; exit {codes[0]}\n"
        )
        program.chmod(0o755)

    return write


def test_name_capability_and_memory_of_each_gpu(answer: Answer) -> None:
    answer(table=TABLE, listing="never asked")
    assert gpus.present() == (
        Gpu("NVIDIA H100 80GB HBM3", (9, 0), 81559 << 20),
        Gpu("Tesla V100", (7, 0), 16160 << 20),
    )
    assert [gpu.name for gpu in launcher.visible_gpus({"CUDA_VISIBLE_DEVICES": "1"})] == ["Tesla V100"]
    assert launcher.visible_devices({"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert launcher.visible_devices({"ACCELERATE_USE_CPU": "true"}) == 0


def test_slices_of_a_gpu_are_not_gpus(answer: Answer) -> None:
    answer(table=None, listing=LISTING)  # an old driver, which does not know compute_cap
    assert gpus.present() == (Gpu(),)


def test_the_memory_of_a_slice_is_unknown(answer: Answer) -> None:
    answer(table=TABLE, listing="never asked")
    assert launcher.device_memory({"CUDA_VISIBLE_DEVICES": "0"}) == 81559 << 20
    assert launcher.visible_gpus({"CUDA_VISIBLE_DEVICES": "MIG-6a1d"}) == [Gpu("", (9, 0), None)]
    assert launcher.device_memory({"CUDA_VISIBLE_DEVICES": "MIG-6a1d"}) is None


def test_without_a_usable_program_device_nodes_count(answer: Answer) -> None:
    answer(table=None, listing=None)
    assert len(gpus.present()) == 3


def test_unknown_fields_leave_the_gpu_counted(answer: Answer) -> None:
    answer(table="[N/A], [N/A], Graphics Device\n", listing=None)
    assert gpus.present() == (Gpu("Graphics Device", None, None),)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [([(8, 0), (9, 0)], True), ([(7, 5)], False), ([(9, 0), (7, 0)], False), ([None], True)],
)
def test_bf16_needs_ampere(capabilities: list[tuple[int, int] | None], expected: bool) -> None:
    assert gpus.have_bf16([Gpu("", capability) for capability in capabilities]) is expected
