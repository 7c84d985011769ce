"""Facts of GPUs from a fake nvidia-smi and mocked torch functions; nothing of it identifies a machine."""

from __future__ import annotations

import json
import os
import stat
import types
from pathlib import Path

import pytest
import torch

from harness import devices, gpu_facts

CUDA = torch.device("cuda", 0)
GPU = "NVIDIA H100 80GB HBM3, 550.54.15, 81559, 1980, 2619, [N/A], 700.00, 700.00, Disabled, Enabled, Enabled, 5, 16"
TOPOLOGY = "\t\x1b[4mGPU0\tGPU1\tCPU Affinity\x1b[0m\nGPU0\t X \tNV18\t0-51\nGPU1\tNV18\t X \t0-51"


def _fake_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(autouse=True)
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", total_memory=85_000_000_000, major=9, minor=0, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties.name)
    monkeypatch.setattr(gpu_facts.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)


def test_a_machine_with_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpus").write_text(f"{GPU}\n{GPU}\n")
    (tmp_path / "topology").write_text(TOPOLOGY)
    query = f'echo "$@" > {tmp_path}/asked; cat {tmp_path}/gpus'
    body = f'if [ "$1" = topo ]; then cat {tmp_path}/topology; else {query}; fi'
    _fake_smi(tmp_path, monkeypatch, body)
    facts = devices.environment(CUDA, 2)["machine"]
    assert (facts["visible_gpus"], facts["cuda"], facts["nccl"], facts["cudnn"]) == (
        2,
        "12.8",
        "2.27.3",
        91002,
    )
    assert len(facts["gpus"]) == 2
    gpu = facts["gpus"][0]
    assert gpu["driver"] == "550.54.15"
    assert (gpu["power_limit_w"], gpu["max_sm_mhz"], gpu["mig"]) == ("700.00", "1980", "Disabled")
    assert gpu["application_sm_mhz"] is None, "not supported on this GPU"
    assert facts["topology"][0] == "\tGPU0\tGPU1\tCPU Affinity"
    # Serial numbers and UUIDs would identify the machine.
    asked = (tmp_path / "asked").read_text()
    assert not any(word in asked for word in ("serial", "uuid", "pci.bus"))
    json.dumps(facts)


@pytest.mark.parametrize("body", ["exit 9", "echo 'NVIDIA-SMI has failed'", "sleep 30"])
def test_a_broken_nvidia_smi_leaves_its_facts_out(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_smi(tmp_path, monkeypatch, f"exec {body}" if body.startswith("sleep") else body)
    monkeypatch.setattr(gpu_facts, "TIMEOUT_S", 1.0)
    facts = gpu_facts.machine(CUDA)
    assert facts is not None
    assert not facts["gpus"]
    assert facts["nccl"] == "2.27.3"


def test_without_nvidia_smi_and_with_rocm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.version, "cuda", None)
    facts = gpu_facts.machine(CUDA)
    assert facts is not None
    assert (facts["gpus"], facts["topology"], facts["rocm"], facts["cuda"]) == (None, None, "6.4", None)


def test_the_device_of_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_facts.of_process(CUDA) == {
        "name": "NVIDIA H100 80GB HBM3",
        "memory_bytes": 85_000_000_000,
        "capability": "9.0",
        "multiprocessors": 132,
    }
    assert gpu_facts.of_all_processes(torch.device("cpu"), 1) == [{"name": "cpu"}]

    def gather(into: list[dict[str, object]], mine: dict[str, object]) -> None:
        into[:] = [mine, {**mine, "name": "NVIDIA H100 PCIe"}]

    monkeypatch.setattr(gpu_facts.dist, "all_gather_object", gather)
    assert [d["name"] for d in gpu_facts.of_all_processes(CUDA, 2)] == [
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 PCIe",
    ]


def test_a_cpu_run_asks_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_facts, "_nvidia_smi", lambda *arguments: pytest.fail("asked"))
    assert gpu_facts.machine(torch.device("cpu")) is None
