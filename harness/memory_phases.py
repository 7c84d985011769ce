"""The most memory that a process held in each phase of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from harness.process import resident_memory

Phase = Literal["build", "training", "evaluation", "probes"]
PHASES: tuple[Phase, ...] = get_args(Phase)


class MemoryPhases:
    """Keeps a maximum of this process' memory per phase. A run begins in "build".

    On CUDA it is the high-water mark of torch's allocator, which `enter` resets. On a CPU it is that of the resident
    set, interpreter and libraries included. Where the kernel does not let a process reset that mark (other systems than
    Linux, some containers), phases cannot be told apart and `peaks` is empty.

    Args:
        device: of the run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._phase: Phase = "build"
        self._peaks: dict[Phase, int] = {}
        self._highest = 0
        self._reserved = 0
        self._is_resettable = True

    def enter(self, phase: Phase) -> None:
        """End the phase so far and begin another one. The host does not wait for the device."""
        self._note()
        if self._phase == "build" and phase != "build" and self._device.type == "cuda":
            # What the build freed stays reserved otherwise, and would count as training's.
            torch.cuda.empty_cache()
        self._reset()
        self._phase = phase

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Count the enclosed work as a phase, then continue the one before."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def peaks(self) -> dict[Phase, int]:
        """Return the bytes of each phase that has begun; empty where phases cannot be told apart."""
        self._note()
        return dict(self._peaks) if self._is_resettable else {}

    def highest(self) -> int:
        """Return the high-water mark of all phases, bytes."""
        self._note()
        return self._highest

    def reserved(self) -> int:
        """Return the most bytes that torch's CUDA allocator reserved in training, with cached blocks; 0 on a CPU."""
        self._note()
        return self._reserved

    def _note(self) -> None:
        peak = peak_bytes(self._device)
        self._peaks[self._phase] = max(self._peaks.get(self._phase, 0), peak)
        self._highest = max(self._highest, peak)
        if self._phase == "training" and self._device.type == "cuda":
            self._reserved = max(self._reserved, torch.cuda.max_memory_reserved(self._device))

    def _reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._is_resettable:
            try:
                resident_memory.reset_peak()
            except OSError:
                self._is_resettable = False


def peak_bytes(device: torch.device) -> int:
    """Return the high-water mark of this process in bytes since it was last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_memory.peak_bytes()


def device_bytes(device: torch.device) -> int:
    """Return the bytes in use on a GPU: allocator, CUDA context, NCCL's buffers, and other programs; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free
