"""Measure the memory of an optimizer step on LLaMA-60M's hidden matrices: the state, and the peak of
temporary memory.

    python -m benchmarks.memory [--layers 8] [--rank 128] [--only sumo,muon] [--device cpu] [--quick] [--json]

The state is the result of `state_bytes()`. The peak is the maximum of the memory that a step allocates, in an
ordinary step and in one that refreshes every subspace. On a CPU it comes from the allocator's records in
torch's profiler, inside every operator, with one thread (the profiler sees its own only); on CUDA from the caching
allocator. Internal allocations of LAPACK and BLAS are not included. The peak is given in MiB and as a multiple of
the gradients of the largest batch, the unit in which a step works.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import optimizers
from benchmarks.step_time import NEVER, Shapes, gradients, llama_60m
from optimizers.layouts.batches import BATCH_BYTES

MIB = 2**20


def allocation_peak(call: Callable[[], object], device: torch.device) -> int:
    """Return the peak of the bytes that `call` allocates, above what existed before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        call()
    return highest(_allocations(profile))


def _allocations(profile: Any) -> list[int]:
    """Return the bytes of each allocation (positive) and release (negative) in the order of time."""
    events = profile.profiler.kineto_results.events()
    records = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(records, key=lambda event: event.start_ns())]


def highest(changes: Iterable[int]) -> int:
    """Return the largest running sum; 0 if it never rises above 0."""
    now = most = 0
    for change in changes:
        now += change
        most = max(most, now)
    return most


def largest_stack(shapes: Shapes, device: torch.device) -> int:
    """Return the bytes of the fp32 gradients of the largest batch that these shapes form."""
    limit = BATCH_BYTES.get(device.type, BATCH_BYTES["cuda"])
    sizes = []
    for m, n in set(shapes):
        together = min(shapes.count((m, n)), max(1, limit // (4 * m * n)))
        sizes.append(4 * m * n * together)
    return max(sizes)


def _built(preset: str, shapes: Shapes, grads: list[Tensor], device: torch.device, **options: Any) -> Any:
    weights = [nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    for weight, gradient in zip(weights, grads):
        weight.grad = gradient.to(device)
    return optimizers.build(preset, [(f"w{i}", weight) for i, weight in enumerate(weights)], **options)


def measure(preset: str, shapes: Shapes, rank: int, device: torch.device) -> dict[str, Any]:
    """Return the bytes of the state and the peaks of a preset.

    Returns:
        state, ordinary, refresh: bytes; refresh is None for rules without subspaces. state_per_weight: numbers of
        state per number of the weights.
    """
    grads = gradients(shapes)
    known = optimizers.resolve(preset)
    refreshes = "refresh_interval" in known
    peaks: dict[str, int | None] = {"ordinary": None, "refresh": None}
    state = 0
    for kind, interval in (("ordinary", NEVER), ("refresh", 1)):
        settings = {"rank": rank, "refresh_interval": interval}
        options = {key: value for key, value in settings.items() if key in known}
        if kind == "refresh" and not refreshes:
            continue
        optimizer = _built(preset, shapes, grads, device, **options)
        for _ in range(2):  # what a first step leaves behind for good is not of the steps after it
            optimizer.step()
        state = sum(optimizer.state_bytes().values())
        peaks[kind] = allocation_peak(optimizer.step, device)
    weights = 4 * sum(m * n for m, n in shapes)
    return {"state": state, "state_per_weight": state / weights, **peaks}


def report(results: dict[str, dict[str, Any]], stack: int) -> str:
    """Return the states and peaks as a Markdown table."""

    def peak(value: int | None) -> str:
        return "–" if value is None else f"{value / MIB:.1f} ({value / stack:.1f})"

    lines = [
        f"Largest stack: {stack / MIB:.1f} MiB of gradients.",
        "",
        "| preset | state, MiB | per weight | ordinary step, MiB (stacks) | refresh step, MiB (stacks) |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {found['state'] / MIB:.1f} | {found['state_per_weight']:.2f} | {peak(found['ordinary'])} | "
        f"{peak(found['refresh'])} |"
        for name, found in results.items()
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--only", default="", help="presets, by comma")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="two tiny layers: that it runs")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(argv)
    device = torch.device(given.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    shapes = llama_60m(2, 32, 48) if given.quick else llama_60m(given.layers)
    rank = 8 if given.quick else given.rank
    chosen = given.only.split(",") if given.only else list(optimizers.PRESETS)
    results = {preset: measure(preset, shapes, rank, device) for preset in chosen}
    stack = largest_stack(shapes, device)
    document = {"schema_version": 1, "stack_bytes": stack, "presets": results}
    print(json.dumps(document) if given.json else report(results, stack))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
