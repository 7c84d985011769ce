"""A look at the nodes of a job before it trains: one process a node, started by the batch script.

    srun --ntasks-per-node=1 python -m harness.jobs.preflight --results=FOLDER --disk=FOLDER --gpus=8 …

Devices, free disk, clocks, and an all-reduce over all nodes. What is wrong is told by node: ``bad`` in the results'
folder names the nodes, ``reasons`` says why. Where the all-reduce is slower than it has to be, pairs of nodes are
measured: a node none of whose pairs is fast enough is the bad one.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harness.files import atomic


class Limits(NamedTuple):
    """What a node must have; see `harness.config.cluster.PreflightConfig`. ``gpus`` −1: not checked."""

    gpus: int
    min_free_gb: float
    max_skew_s: float
    min_gb_per_s: float


class Facts(NamedTuple):
    """What a node found out about itself.

    Attributes:
        node: its name for SLURM.
        gpus: devices that can be seen and used.
        broken: the error of the first device that can be seen and not used; "" if there is none.
        free_gb: folder → free disk, GB.
        clock_s: Unix time at which it left a barrier.
        gb_per_s: its throughput in the all-reduce over all nodes (ring convention, 2 (n−1)/n bytes a byte).
        pairs_gb_per_s: node → throughput with that node alone; {} where no pairs were measured.
    """

    node: str
    gpus: int
    broken: str
    free_gb: dict[str, float]
    clock_s: float
    gb_per_s: float
    pairs_gb_per_s: dict[str, float]


def judge(facts: Sequence[Facts], expected: Sequence[str], limits: Limits) -> dict[str, str]:
    """Bad node → what is wrong with it, in words.

    Args:
        facts: of the nodes that answered.
        expected: all nodes of the job.
        limits: what each must have.
    """
    wrong: dict[str, list[str]] = {node: [] for node in expected}
    known = {one.node: one for one in facts}
    for node in expected:
        if node not in known:
            wrong[node].append("did not answer")
    middle = statistics.median([one.clock_s for one in facts]) if facts else 0.0
    for one in facts:
        said = wrong.setdefault(one.node, [])
        if limits.gpus >= 0 and one.gpus < limits.gpus:
            said.append(f"{one.gpus} of {limits.gpus} GPUs" + (f" ({one.broken})" if one.broken else ""))
        said += [
            f"{free:.1f} GB free in {folder}, not {limits.min_free_gb:g}"
            for folder, free in one.free_gb.items()
            if free < limits.min_free_gb
        ]
        if abs(one.clock_s - middle) > limits.max_skew_s:
            said.append(f"its clock is {one.clock_s - middle:+.1f} s off")
        best = max(one.pairs_gb_per_s.values(), default=None)
        if best is not None and best < limits.min_gb_per_s:
            said.append(f"{best:.2g} GB/s with the best of the other nodes, not {limits.min_gb_per_s:g}")
    slow = [one.gb_per_s for one in facts if one.gb_per_s < limits.min_gb_per_s]
    if slow and not any(wrong.values()):
        # Each node is fast with some other one: the network between them is not.
        for one in facts:
            wrong[one.node].append(f"{min(slow):.2g} GB/s over all nodes, not {limits.min_gb_per_s:g}")
    return {node: "; ".join(said) for node, said in wrong.items() if said}


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Pairs of ``count`` nodes such that a node is in one pair of a round and meets every other in some round: a
    tournament. With an odd count one node rests in each round."""
    players: list[int | None] = [*range(count)] + ([None] if count % 2 else [])
    found: list[list[tuple[int, int]]] = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]))
        found.append([(a, b) for a, b in pairs if a is not None and b is not None])
        players = [players[0], players[-1], *players[1:-1]]
    return found


def main(argv: Sequence[str]) -> int:
    """Examine this node with all others; node 0 writes the verdict. 0: all well; 1: not."""
    options = _options(argv)
    limits = Limits(options.gpus, options.min_free_gb, options.max_skew_s, options.min_gb_per_s)
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    rank, nodes = int(os.environ["SLURM_NODEID"]), os.environ["OPTBENCH_NODE_NAMES"].split()
    from harness.jobs import node_check  # imports torch

    address, port = os.environ["OPTBENCH_ADDRESS"], int(os.environ["OPTBENCH_PORT"])
    try:
        meeting = node_check.Meeting(address, port, rank, nodes, options.timeout_s)
        facts, errors = node_check.examine(meeting, node, limits, options.seconds, [options.disk])
    except Exception as error:
        if rank == 0:
            raise
        # Not a bad exit: that would end node 0 before it could say that this node did not answer.
        print(f"preflight: {node}: {error}", file=sys.stderr, flush=True)
        return 0
    if rank != 0:
        return 0
    bad = judge(facts, nodes, limits)
    # Whoever could not take part says why; that others did not answer then is no wonder.
    bad = errors or bad
    for one in facts:
        free = ", ".join(f"{amount:.0f} GB free in {folder}" for folder, amount in one.free_gb.items())
        speed = f", {one.gb_per_s:.2f} GB/s" if math.isfinite(one.gb_per_s) else ""
        print(f"preflight: {one.node}: {one.gpus} GPUs, {free}{speed}", flush=True)
    if not bad:
        return 0
    results = Path(options.results)
    atomic.write_text(results / "reasons", "; ".join(f"{name}: {why}" for name, why in bad.items()) + "\n")
    atomic.write_text(results / "bad", "".join(f"{name}\n" for name in bad))
    return 1


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m harness.jobs.preflight")
    parser.add_argument("--results", required=True)
    parser.add_argument("--disk", required=True)
    parser.add_argument("--gpus", type=int, required=True)
    for name in ("seconds", "min-gb-per-s", "min-free-gb", "max-skew-s", "timeout-s"):
        parser.add_argument(f"--{name}", type=float, required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
