"""Waits and allocations are counted inside of ranges, by what the runtime called, and on a CPU by what was read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.trace import Trace


def event(cat: str, name: str, ts: float, dur: float = 1.0, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


EVENTS = [
    {"ph": "M", "name": "process_name"},
    event("user_annotation", "ProfilerStep#7", 0, 100),
    event("user_annotation", "optimizer/sumo", 10, 50),
    event("cuda_runtime", "cudaLaunchKernel", 11),
    event("cuda_runtime", "cudaStreamSynchronize", 12),
    event("cuda_runtime", "cudaMalloc", 13),
    # Copies to the host: the second one goes to pinned memory, and nobody waits for it.
    event("cuda_runtime", "cudaMemcpyAsync", 14, correlation=5),
    event("cuda_runtime", "cudaMemcpyAsync", 15, correlation=6),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 90, correlation=5),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 91, correlation=6),
    event("cuda_runtime", "cudaMemcpyAsync", 17, correlation=7),
    event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 92, correlation=7),
    event("cuda_runtime", "cudaEventSynchronize", 16, tid=2),
    event("cuda_runtime", "cudaDeviceSynchronize", 70),
    event("cuda_runtime", "hipFree", 20),
    event("cuda_driver", "cuMemCreate", 21),
    event("kernel", "void pytorch_flash::flash_fwd_kernel<T>", 30, stream=7),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 31, stream=13),
    event("cpu_op", "aten::_local_scalar_dense", 40),
    event("cpu_op", "aten::mm", 41),
]


def test_calls_are_counted_by_range_and_thread() -> None:
    trace = Trace(EVENTS)
    inside = trace.count(trace.ranges("optimizer/", trace.steps()[7]))
    assert inside.waits == {"cudaStreamSynchronize": 1, "Memcpy DtoH (Device -> Pageable)": 1}
    assert inside.allocations == {"cudaMalloc": 1, "hipFree": 1, "cuMemCreate": 1}
    assert inside.staged_copies == 1
    assert (inside.scalar_reads, inside.operators) == (1, 2)
    assert (inside.of_host(True), inside.of_host(False)) == (2, 1)
    anybody = trace.count([trace.steps()[7]], any_thread=True)
    assert anybody.waits["cudaEventSynchronize"] == anybody.waits["cudaDeviceSynchronize"] == 1
    assert trace.kernels() == ["void pytorch_flash::flash_fwd_kernel<T>"]
    assert trace.launches() == 1
    assert (trace.kernel_streams, trace.upload_streams) == ({7}, {13})
    assert trace.ranges("optimizer/", trace.steps()[7]._replace(begin=60)) == []


def test_a_real_trace_of_a_cpu_shows_a_read_in_its_range(tmp_path: Path) -> None:
    value = torch.ones(3)
    with torch.profiler.profile(acc_events=True) as profiler:
        with torch.profiler.record_function("optimizer/test"):
            float(value.sum())
        float(value.sum())
        value.sum()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = Trace.load(tmp_path / "trace.json")
    counts = trace.count(trace.ranges("optimizer/"))
    assert counts.scalar_reads == 1
    assert not counts.waits
