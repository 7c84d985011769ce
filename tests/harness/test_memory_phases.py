"""Peaks of memory per phase: when torch's counters are read and reset, and what a CPU can tell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness import memory_phases
from harness.memory_phases import MemoryPhases, device_bytes
from harness.preparation import prepare
from harness.process import resident_memory
from harness.run import execute
from tests.harness.running import small, write_documents

GIB = 2**30
CUDA = torch.device("cuda", 0)


class FakeAllocator:
    """The counters of torch's CUDA allocator, and the calls that read and reset them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held = self.peak = self.reserved = 0
        self.calls: list[str] = []
        monkeypatch.setattr(
            torch.cuda, "max_memory_allocated", lambda device: self._called("read", self.peak)
        )
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: self.reserved)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: self._reset())
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self._empty())
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 * GIB, 80 * GIB))

    def use(self, size: int) -> None:
        """Allocate and free ``size`` bytes above what is held."""
        self.peak = max(self.peak, self.held + size)
        self.reserved = max(self.reserved, self.held + size)

    def _called(self, name: str, value: int) -> int:
        self.calls.append(name)
        return value

    def _reset(self) -> None:
        self.calls.append("reset")
        self.peak = self.held

    def _empty(self) -> None:
        self.calls.append("empty")
        self.reserved = self.held


def test_training_is_not_charged_for_build_evaluation_and_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = FakeAllocator(monkeypatch)
    memory = MemoryPhases(CUDA)
    allocator.use(50 * GIB)  # the whole model before it is cut
    allocator.held = 6 * GIB
    memory.enter("training")
    # The counter is read before it is reset, and what the build freed is given back first.
    assert allocator.calls == ["read", "empty", "reset"]
    allocator.use(20 * GIB)
    with memory.phase("evaluation"):
        allocator.use(10 * GIB)
    with memory.phase("probes"):
        allocator.use(30 * GIB)
    allocator.use(4 * GIB)
    assert memory.peaks() == {
        "build": 50 * GIB,
        "training": 26 * GIB,
        "evaluation": 16 * GIB,
        "probes": 36 * GIB,
    }
    assert memory.highest() == 50 * GIB
    assert memory.reserved() == 36 * GIB
    assert device_bytes(CUDA) == 30 * GIB
    assert allocator.calls.count("reset") == 5


def test_without_resets_the_build_would_be_taken_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = FakeAllocator(monkeypatch)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    memory = MemoryPhases(CUDA)
    allocator.use(50 * GIB)
    memory.enter("training")
    assert memory.peaks()["training"] == 50 * GIB


def test_a_phase_ends_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = FakeAllocator(monkeypatch)
    memory = MemoryPhases(CUDA)
    memory.enter("training")

    def fail() -> None:
        with memory.phase("probes"):
            allocator.use(40 * GIB)
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        fail()
    assert (memory.peaks()["probes"], memory.peaks()["training"]) == (40 * GIB, 0)


def test_a_cpu_tells_phases_apart_by_its_resident_set() -> None:
    memory = MemoryPhases(torch.device("cpu"))
    block = torch.ones(64 * 2**20)
    assert memory.highest() > block.nbytes
    del block
    memory.enter("training")
    peaks = memory.peaks()
    if not peaks:
        pytest.skip("this kernel does not let a process reset the peak of its resident memory")
    assert peaks["training"] < peaks["build"] - 200e6
    assert (memory.reserved(), device_bytes(torch.device("cpu"))) == (0, 0)


@pytest.mark.skipif(not resident_memory.STATUS.exists(), reason="only Linux tells a process its own peak")
def test_the_memory_of_the_parent_is_not_charged() -> None:
    """As of a run that a notebook starts, which holds a data set."""
    child = (
        "import torch; from harness.memory_phases import peak_bytes; print(peak_bytes(torch.device('cpu')))"
    )
    parent = (
        "import subprocess, sys; held = b'1' * 2**30; "
        "print(subprocess.run([sys.executable, '-c', sys.argv[1]], capture_output=True, text=True).stdout)"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent, child], capture_output=True, text=True, timeout=120, check=True
    )
    assert 2**20 < int(done.stdout) < 2**30


def test_a_kernel_that_refuses_a_reset_leaves_the_whole_peak_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident_memory, "RESET", tmp_path / "no such folder" / "clear_refs")
    memory = MemoryPhases(torch.device("cpu"))
    memory.enter("training")
    assert memory.peaks() == {}
    assert memory.highest() > 2**20


def test_rows_and_summary_hold_the_peaks_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []
    enter = MemoryPhases.enter

    def noted(memory: MemoryPhases, phase: memory_phases.Phase) -> None:
        entered.append(phase)
        enter(memory, phase)

    monkeypatch.setattr(MemoryPhases, "enter", noted)
    overrides = small(write_documents(tmp_path), tmp_path, "optimizer=sumo", "steps=2")
    prepared = prepare(overrides, say=lambda text: None, worker=True)
    assert execute(prepared) == "finished"
    folder = prepared.folder
    assert entered[0] == "training"
    # Around every computation of figures inside the optimizer step, the collection of them, and the evaluation.
    assert {"probes", "evaluation"} <= set(entered)
    summary = json.loads((folder / "summary.json").read_text())["memory_bytes"]
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert summary == {k[7:-6]: v for k, v in row.items() if k.startswith("memory/")}
    assert {"weights", "gradients", "optimizer_state", "peak"} <= summary.keys()
    assert not {"reserved_peak", "device"} & summary.keys()
    if "training_peak" in summary:
        assert max(v for k, v in summary.items() if k.endswith("_peak")) == summary["peak"]
