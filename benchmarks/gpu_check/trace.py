"""Count what made the host wait, and what was allocated, in the trace that torch's profiler exports.

The trace is Chrome's JSON format. Calls of the CUDA (or HIP) runtime have the category ``cuda_runtime`` or
``cuda_driver``, copies on the device ``gpu_memcpy`` with the correlation number of the call that started them,
`record_function` ranges ``user_annotation``, and operators ``cpu_op``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "CtxSynchronize", "Memcpy")
"""Runtime calls, without their prefix cuda or hip, in which the host waits for the device."""
PAGEABLE = "Memcpy DtoH (Device -> Pageable)"
"""Copies in which the host waits though the call is an asynchronous one."""
STAGED = "Memcpy HtoD (Pageable -> Device)"
"""Copies from pageable memory: above 64 KB the driver may wait for the stream before it stages them."""
ALLOCATIONS = ("Malloc", "Free", "HostAlloc", "HostFree", "FreeHost", "MallocHost", "MemCreate", "MemRelease")
"""Runtime and driver calls that allocate or free memory and may wait for the device."""
SCALAR_READS = ("aten::_local_scalar_dense",)
"""Operators that read a number on the host: the stand-in for a wait where the device is a CPU."""


class Interval(NamedTuple):
    """A named range of one thread, microseconds."""

    name: str
    begin: float
    end: float
    thread: Any


@dataclass(frozen=True)
class Counts:
    """What happened inside of ranges, by the name of the call."""

    waits: Counter[str]
    allocations: Counter[str]
    staged_copies: int
    scalar_reads: int
    operators: int

    def of_host(self, is_cuda: bool) -> int:
        """Return how often the host waited; on a CPU, how often it read a number."""
        return self.waits.total() if is_cuda else self.scalar_reads


class Trace:
    """A trace of steps.

    Args:
        events: ``traceEvents`` of the exported JSON.
    """

    def __init__(self, events: Iterable[dict[str, Any]]) -> None:
        complete = [event for event in events if event.get("ph") == "X" and "cat" in event]
        copies = {
            event.get("args", {}).get("correlation"): event["name"]
            for event in complete
            if event["cat"] == "gpu_memcpy"
        }
        self._ranges = [_interval(e) for e in complete if e["cat"] == "user_annotation"]
        self._operators = [_interval(e) for e in complete if e["cat"] == "cpu_op"]
        kernels = [event for event in complete if event["cat"] == "kernel"]
        self._kernels = [event["name"] for event in kernels]
        self.kernel_streams = {event.get("args", {}).get("stream") for event in kernels}
        """Streams on which kernels ran."""
        self.upload_streams = {
            event.get("args", {}).get("stream")
            for event in complete
            if event["cat"] == "gpu_memcpy" and event["name"].startswith("Memcpy HtoD (Pinned")
        }
        """Streams on which data came from pinned memory."""
        self._calls: list[tuple[Interval, str]] = []
        for event in complete:
            if event["cat"] in ("cuda_runtime", "cuda_driver"):
                copied = copies.get(event.get("args", {}).get("correlation"), "")
                self._calls.append((_interval(event), copied))

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read what `torch.profiler.profile.export_chrome_trace` wrote."""
        return cls(json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"])

    def steps(self) -> dict[int, Interval]:
        """Return the profiler's steps by number."""
        return {
            int(entry.name.partition("#")[2]): entry
            for entry in self._ranges
            if entry.name.startswith("ProfilerStep#")
        }

    def ranges(self, prefix: str, within: Interval | None = None) -> list[Interval]:
        """Return the ranges whose name begins with `prefix`, as far as they begin within another one."""
        return [
            entry
            for entry in self._ranges
            if entry.name.startswith(prefix) and (within is None or within.begin <= entry.begin < within.end)
        ]

    def count(self, ranges: Sequence[Interval], *, any_thread: bool = False) -> Counts:
        """Return what happened inside of ranges.

        Args:
            ranges: of `steps` or `ranges`.
            any_thread: count calls of other threads, too; autograd's threads issue the backward pass.
        """

        def is_inside(entry: Interval) -> bool:
            return any(
                r.begin <= entry.begin < r.end and (any_thread or r.thread == entry.thread) for r in ranges
            )

        waits: Counter[str] = Counter()
        allocations: Counter[str] = Counter()
        staged = 0
        for call, copied in self._calls:
            if not is_inside(call):
                continue
            name = _without_prefix(call.name)
            staged += copied == STAGED
            if name in WAITS:
                waits[call.name] += 1
            elif copied == PAGEABLE:
                waits[copied] += 1
            elif name in ALLOCATIONS:
                allocations[call.name] += 1
        operators = [entry.name for entry in self._operators if is_inside(entry)]
        reads = sum(name in SCALAR_READS for name in operators)
        return Counts(waits, allocations, staged, reads, len(operators))

    def launches(self) -> int:
        """Return how many kernels ran on the device; on a CPU, how many operators."""
        return len(self._kernels) or len(self._operators)

    def kernels(self) -> list[str]:
        """Return the kernels that ran on the device, each once, in the order of the trace."""
        return list(dict.fromkeys(self._kernels))

    def operators(self, part: str) -> list[str]:
        """Return the operators whose name contains `part`, each once, in the order of the trace."""
        return list(dict.fromkeys(entry.name for entry in self._operators if part in entry.name))


def _interval(event: dict[str, Any]) -> Interval:
    begin = float(event["ts"])
    return Interval(event["name"], begin, begin + float(event.get("dur", 0.0)), event.get("tid"))


def _without_prefix(name: str) -> str:
    for prefix in ("cuda", "hip", "cu"):
        if name.startswith(prefix):
            # The runtime's names may bear a version: cudaMallocAsync_v11020.
            return name.removeprefix(prefix).partition("_v")[0]
    return name
