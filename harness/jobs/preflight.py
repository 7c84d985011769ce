"""Check the nodes of a job before it trains: one process per node, started by the batch script.

    srun --ntasks-per-node=1 python -m harness.jobs.preflight --results=FOLDER --disk=FOLDER --gpus=8 …

Checked are devices, free disk, clocks, and an all-reduce over all nodes, between the GPUs of each number: on most
clusters these share a network card, a "rail". In the results' folder, the file ``bad`` names the bad nodes and
``reasons`` says what is wrong with each. If the all-reduce of some GPUs is too slow, pairs of nodes are measured with
the slowest: a node is bad if none of its pairs is fast enough. Imports torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from harness.config import launcher
from harness.files import atomic

MESSAGE_BYTES = 64 << 20
PAIR_S = 1.0
"""Length of the measurement of a pair of nodes."""
GB = 1e9


class Limits(NamedTuple):
    """What each node must have (`harness.config.cluster.PreflightConfig`); ``gpus`` = −1 is not checked."""

    gpus: int
    min_free_gb: float
    max_skew_s: float
    min_gb_per_s: float
    min_share: float

    def throughput(self, best: float) -> float:
        """Return the least throughput of a good link, GB/s, where ``best`` is the highest that was measured."""
        return max(self.min_gb_per_s, self.min_share * best)


class NodeFacts(NamedTuple):
    """What a node measured of itself.

    Attributes:
        node: its name for SLURM.
        gpus: devices that can be seen and used.
        broken: the error of the first device that can be seen and not used; "" if there is none.
        free_gb: folder → free disk, GB.
        clock_s: Unix time at which it left a barrier.
        gb_per_s: throughput of each of its GPUs, or of its CPU, in the all-reduce over all nodes (ring convention,
            2 (n−1)/n bytes a byte); [] where none was made.
        slow: number of the GPU that pairs of nodes were measured with; None: none was, or on CPUs.
        pairs_gb_per_s: node → throughput with that node alone; {} where no pairs were measured.
    """

    node: str
    gpus: int
    broken: str
    free_gb: dict[str, float]
    clock_s: float
    gb_per_s: list[float]
    slow: int | None
    pairs_gb_per_s: dict[str, float]


def judge(facts: Sequence[NodeFacts], expected: Sequence[str], limits: Limits) -> dict[str, str]:
    """Return bad node → what is wrong with it, as a phrase.

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
    # As the nodes agreed on when they measured: each GPU counts where it was slowest.
    slowest = [min(speeds) for speeds in zip(*(one.gb_per_s for one in facts), strict=False)]
    speeds = [*slowest, *(speed for one in facts for speed in one.pairs_gb_per_s.values())]
    least = limits.throughput(max(speeds, default=0.0))
    middle = statistics.median([one.clock_s for one in facts]) if facts else 0.0
    for one in facts:
        reasons = wrong.setdefault(one.node, [])
        if limits.gpus >= 0 and one.gpus < limits.gpus:
            reasons.append(f"{one.gpus} of {limits.gpus} GPUs" + (f" ({one.broken})" if one.broken else ""))
        reasons += [
            f"{free:.1f} GB free in {folder}, not {limits.min_free_gb:g}"
            for folder, free in one.free_gb.items()
            if free < limits.min_free_gb
        ]
        if abs(one.clock_s - middle) > limits.max_skew_s:
            reasons.append(f"its clock is {one.clock_s - middle:+.1f} s off")
        best = max(one.pairs_gb_per_s.values(), default=None)
        if best is not None and best < least:
            gpu = "" if one.slow is None else f"GPU {one.slow}: "
            reasons.append(f"{gpu}{best:.2g} GB/s with the best of the other nodes, not {least:.3g}")
    slow = [speed for one in facts for speed in one.gb_per_s if speed < least]
    if slow and not any(wrong.values()):
        # Each node is fast with some other one: the network between them is not.
        for one in facts:
            wrong[one.node].append(f"{min(slow):.2g} GB/s over all nodes, not {least:.3g}")
    return {node: "; ".join(reasons) for node, reasons in wrong.items() if reasons}


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Return the rounds of a tournament: a node is in one pair per round and meets every other node in some round.

    With an odd count one node rests in each round.
    """
    players: list[int | None] = [*range(count)] + ([None] if count % 2 else [])
    schedule: list[list[tuple[int, int]]] = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]))
        schedule.append([(a, b) for a, b in pairs if a is not None and b is not None])
        players = [players[0], players[-1], *players[1:-1]]
    return schedule


class Rendezvous:
    """A key-value store on node 0 through which the nodes exchange messages, and which shows who did not come.

    Args:
        address, port: of node 0.
        rank: number of this node.
        nodes: names of all nodes, by number.
        timeout_s: how long a node waits for another one, s.
    """

    def __init__(self, address: str, port: int, rank: int, nodes: Sequence[str], timeout_s: float) -> None:
        self.rank, self.nodes, self.timeout = rank, list(nodes), timedelta(seconds=timeout_s)
        self.store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            address, port, len(nodes), rank == 0, self.timeout, wait_for_workers=False, use_libuv=True
        )

    def publish(self, what: str, content: object) -> None:
        """Publish a message of this node, as JSON, under the key ``what``."""
        self.store.set(f"{what}/{self.rank}", json.dumps(content))

    def receive(self, what: str, rank: int) -> object:
        """Return the message of node ``rank`` under the key ``what``, or None if it does not come in time."""
        try:
            self.store.wait([f"{what}/{rank}"], self.timeout)
        except (dist.DistStoreError, RuntimeError):
            return None
        return json.loads(self.store.get(f"{what}/{rank}"))


def examine(
    rendezvous: Rendezvous, node: str, limits: Limits, seconds: float, folders: Sequence[str]
) -> tuple[list[NodeFacts], dict[str, str]]:
    """Check this node, then the network, and collect the facts of all nodes on node 0.

    Args:
        rendezvous: of all nodes.
        node: name of this node.
        limits: decide whether GPUs are used, and whether pairs of nodes are measured.
        seconds: length of the all-reduce, s.
        folders: folders whose free disk is checked, besides the temporary folder.

    Returns:
        On node 0 the facts of the nodes that answered, and node → error of those that could not take part; empty on
        the other nodes.
    """
    gpus, broken = _devices()
    free = {folder: shutil.disk_usage(folder).free / GB for folder in (*folders, tempfile.gettempdir())}
    facts = NodeFacts(node, gpus, broken, free, time.time(), [], None, {})
    rendezvous.publish("alone", facts._asdict())
    count = len(rendezvous.nodes)
    if rendezvous.rank == 0:
        answered = [rendezvous.receive("alone", rank) is not None for rank in range(count)]
        rendezvous.publish("go", all(answered))
    if rendezvous.receive("go", 0) and count > 1:
        # Not a node that lacks its GPUs: what it would measure is not what the others do.
        enough = limits.gpus < 0 or gpus >= limits.gpus
        uses_gpus = limits.gpus != 0 and gpus > 0 and enough
        try:
            facts = _with_network(rendezvous, facts, limits, seconds, gpus if uses_gpus else 0)
        except Exception as error:
            rendezvous.publish("error", " ".join(str(error).split())[:300])
    rendezvous.publish("all", facts._asdict())
    if rendezvous.rank != 0:
        # The store is node 0's: it must not be left before this node's message is there, which `publish` has seen to.
        return [], {}
    replies = [rendezvous.receive("all", rank) for rank in range(count)]
    known = [_facts(one) for one in replies if isinstance(one, dict)]
    failed = [
        rank
        for rank in range(count)
        if replies[rank] is not None and rendezvous.store.check([f"error/{rank}"])
    ]
    return known, {rendezvous.nodes[rank]: str(rendezvous.receive("error", rank)) for rank in failed}


def _with_network(
    rendezvous: Rendezvous, facts: NodeFacts, limits: Limits, seconds: float, gpus: int
) -> NodeFacts:
    """Return the facts with clock and throughputs, measured together with all other nodes."""
    # NCCL where every node can; a vote, because all must take the same one.
    rendezvous.publish("gpus", gpus)
    everyone = [rendezvous.receive("gpus", rank) for rank in range(len(rendezvous.nodes))]
    common = min(int(str(count or 0)) for count in everyone)
    devices = [torch.device("cuda", index) for index in range(common)] or [torch.device("cpu")]
    dist.init_process_group(
        "nccl" if common else "gloo",
        store=dist.PrefixStore("group", rendezvous.store),  # pyright: ignore[reportPrivateImportUsage]
        rank=rendezvous.rank,
        world_size=len(rendezvous.nodes),
        timeout=rendezvous.timeout,
    )
    try:
        dist.all_reduce(torch.zeros(1, device=devices[0]))
        if common:
            torch.cuda.synchronize(devices[0])
        clock = time.time()
        speeds = [_over_all_nodes(rendezvous, device, seconds / len(devices)) for device in devices]
        # Of each device on the node where it was slowest, so that all decide alike.
        slowest = torch.tensor(speeds, device=devices[0])
        dist.all_reduce(slowest, op=dist.ReduceOp.MIN)
        agreed: list[float] = slowest.tolist()
        facts = facts._replace(clock_s=clock, gb_per_s=speeds)
        if min(agreed) >= limits.throughput(max(agreed)):
            return facts
        slow = agreed.index(min(agreed))
        pairs = _pairs(rendezvous, devices[slow])
        return facts._replace(slow=slow if common else None, pairs_gb_per_s=pairs)
    finally:
        dist.destroy_process_group()


def _over_all_nodes(rendezvous: Rendezvous, device: torch.device, seconds: float) -> float:
    """Return the throughput of the all-reduce between the same devices of all nodes, GB/s."""
    # A group of its own: an NCCL group belongs to the device of its first collective.
    group = dist.new_group(timeout=rendezvous.timeout)
    assert isinstance(group, dist.ProcessGroup)
    try:
        return throughput(group, device, seconds)
    finally:
        dist.destroy_process_group(group)


def _pairs(rendezvous: Rendezvous, device: torch.device) -> dict[str, float]:
    """Return node → throughput with that node alone, GB/s, for every other node."""
    speeds: dict[str, float] = {}
    for pairs in rounds(len(rendezvous.nodes)):
        # All processes make all groups, in the same order.
        groups = [(pair, dist.new_group(list(pair), timeout=rendezvous.timeout)) for pair in pairs]
        for pair, group in groups:
            if rendezvous.rank in pair and isinstance(group, dist.ProcessGroup):
                other = pair[0] if pair[1] == rendezvous.rank else pair[1]
                speeds[rendezvous.nodes[other]] = throughput(group, device, PAIR_S)
        dist.all_reduce(torch.zeros(1, device=torch.device("cuda", 0) if device.type == "cuda" else device))
    return speeds


def throughput(group: dist.ProcessGroup | None, device: torch.device, seconds: float) -> float:
    """Return the GB/s that each member of a group sends in an all-reduce (ring convention: 2 (n−1)/n bytes a byte).

    Args:
        group: all members call this.
        device: that the data is on.
        seconds: length of the measurement, s.
    """
    data = torch.zeros(MESSAGE_BYTES // 4, device=device)
    is_enough = torch.zeros(1, device=device)
    dist.all_reduce(data, group=group)
    times, begin = 0, time.monotonic()
    while not float(is_enough):
        dist.all_reduce(data, group=group)
        times += 1
        # They stop together, whatever their clocks say; reading it waits for the device.
        is_enough.fill_(float(time.monotonic() - begin >= seconds))
        dist.all_reduce(is_enough, op=dist.ReduceOp.MAX, group=group)
    count = dist.get_world_size(group)
    return 2 * (count - 1) / count * MESSAGE_BYTES * times / (time.monotonic() - begin) / GB


def _devices() -> tuple[int, str]:
    """GPUs that can be used, and the error of the first that can't."""
    seen, usable, broken = launcher.visible_devices(), 0, ""
    if seen and not torch.cuda.is_available():
        return 0, f"torch {torch.__version__} has no CUDA"
    for place in range(seen):
        try:
            matrix = torch.ones(1024, 1024, device=f"cuda:{place}")
            usable += bool((matrix @ matrix).sum().item() == 1024.0**3)
        except RuntimeError as error:
            broken = broken or f"cuda:{place}: {' '.join(str(error).split())[:200]}"
    return usable, broken


def _facts(content: dict[str, object]) -> NodeFacts:
    return NodeFacts(**content)  # pyright: ignore[reportArgumentType]


def main(argv: Sequence[str]) -> int:
    """Check this node with all others; node 0 writes the verdict. Return 0 if all nodes are good, else 1."""
    options = _options(argv)
    limits = Limits(
        options.gpus, options.min_free_gb, options.max_skew_s, options.min_gb_per_s, options.min_share
    )
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    rank, nodes = int(os.environ["SLURM_NODEID"]), os.environ["OPTBENCH_NODE_NAMES"].split()
    address, port = os.environ["OPTBENCH_ADDRESS"], int(os.environ["OPTBENCH_PORT"])
    try:
        rendezvous = Rendezvous(address, port, rank, nodes, options.timeout_s)
        facts, errors = examine(rendezvous, node, limits, options.seconds, [options.disk])
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
        speed = f", {' '.join(f'{value:.2f}' for value in one.gb_per_s)} GB/s" if one.gb_per_s else ""
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
    # Not in the scripts of earlier versions, which may still wait in a queue.
    parser.add_argument("--min-share", type=float, default=0.5)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
