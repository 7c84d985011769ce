"""Measure milliseconds per optimizer step on two processes with one thread each, on LLaMA-60M's hidden
matrices.

    python -m benchmarks.layouts [--rounds 5] [--layers 2] [--json]

Three ratios of contestants that alternate in one pool of processes, medians of the slower rank: optbench's Muon
against `torch.optim.Muon` on the same DTensors (both in fp32 arithmetic where the peer's is bf16 only, both
times are shown); SUMO on shards against SUMO on whole matrices; work split over replicas against one process
that does all work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import optimizers
from benchmarks.step_time import gradients, llama_60m

PAIRS = [
    ("ours: muon, shards", "torch.optim.Muon on DTensors", 0.5),
    ("ours: muon bf16, shards", "torch.optim.Muon on DTensors", 0.5),
    ("ours: muon, split work", "ours: muon, one process", 0.6),
    ("ours: sumo, split work", "ours: sumo, one process", 0.6),
    ("ours: sumo, shards", "ours: sumo, one process", None),
]


def _contestants(layers: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shapes = llama_60m(layers)
    slopes = gradients(shapes)

    def weights(is_cut: bool) -> list[nn.Parameter]:
        made = []
        for shape, slope in zip(shapes, slopes):
            whole = torch.zeros(shape)
            axis = 0 if shape[0] >= shape[1] else 1
            weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(axis)]) if is_cut else whole)
            weight.grad = distribute_tensor(slope, mesh, [Shard(axis)]) if is_cut else slope
            made.append(weight)
        return made

    def ours(name: str, is_cut: bool, **options: Any) -> Any:
        return optimizers.build(name, [(f"w{i}", w) for i, w in enumerate(weights(is_cut))], **options)

    low = {"rank": 128, "refresh_interval": 10**9, "side": "long"}
    split = {"process_group": dist.group.WORLD, "work": "split"}
    return {
        "torch.optim.Muon on DTensors": torch.optim.Muon(weights(True), lr=1e-3),
        "ours: muon, shards": ours("muon", True, orthogonalizer_dtype="float32"),
        "ours: muon bf16, shards": ours("muon", True, orthogonalizer_dtype="bfloat16"),
        "ours: muon, one process": ours("muon", False, orthogonalizer_dtype="float32"),
        "ours: muon, split work": ours("muon", False, orthogonalizer_dtype="float32", **split),
        "ours: sumo, one process": ours("sumo", False, **low),
        "ours: sumo, split work": ours("sumo", False, **low, **split),
        "ours: sumo, shards": ours("sumo", True, **low),
    }


def _rank(rank: int, world: int, port: int, layers: int, rounds: int, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    built = _contestants(layers)
    times: dict[str, list[float]] = {name: [] for name in built}
    for turn in range(rounds + 1):
        for name, optimizer in built.items():
            # "One process" runs while the other waits: two that compute alone would share caches and memory.
            is_alone = "one process" in name
            dist.barrier()
            start = time.perf_counter()
            if not is_alone or rank == 0:
                optimizer.step()
            elapsed = torch.tensor(time.perf_counter() - start if not is_alone or rank == 0 else 0.0)
            dist.all_reduce(elapsed, dist.ReduceOp.MAX)
            if turn:
                times[name].append(1e3 * float(elapsed))
    if rank == 0:
        queue.put({name: statistics.median(values) for name, values in times.items()})
    dist.barrier()
    dist.destroy_process_group()


def measure(layers: int, rounds: int, port: int = 29531) -> dict[str, float]:
    """Return the median milliseconds per step of each contestant, of the slower of two ranks."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, 2, port, layers, rounds, queue)) for r in range(2)]
    for process in ranks:
        process.start()
    medians = queue.get()
    for process in ranks:
        process.join()
    return medians


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(argv)
    medians = measure(given.layers, given.rounds)
    if given.json:
        print(json.dumps({"schema_version": 1, "ms_per_step": medians}))
        return 0
    print("| optimizer | ms per step |\n|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:.1f} |")
    print("\n| ours | against | ratio | target |\n|---|---|---|---|")
    for ours, peer, target in PAIRS:
        wanted = "" if target is None else f"≤ {target}"
        print(f"| {ours} | {peer} | {medians[ours] / medians[peer]:.2f} | {wanted} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
