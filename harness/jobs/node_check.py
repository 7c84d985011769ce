"""What a node of a job finds out about itself and about the network, for `harness.jobs.preflight`. Imports torch."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from harness.config import launcher
from harness.jobs.preflight import Facts, Limits, rounds

MESSAGE_BYTES = 64 << 20
PAIR_S = 1.0
"""Length of the measurement of a pair of nodes."""
GB = 1e9


class Meeting:
    """Where the nodes leave word for each other: a store on node 0, which knows who has not come.

    Args:
        address, port: of node 0.
        rank: number of this node.
        nodes: names of all, in the order of their numbers.
        timeout_s: how long one waits for another.
    """

    def __init__(self, address: str, port: int, rank: int, nodes: Sequence[str], timeout_s: float) -> None:
        self.rank, self.nodes, self.timeout = rank, list(nodes), timedelta(seconds=timeout_s)
        self.store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            address, port, len(nodes), rank == 0, self.timeout, wait_for_workers=False, use_libuv=True
        )

    def tell(self, what: str, content: object) -> None:
        """Leave word."""
        self.store.set(f"{what}/{self.rank}", json.dumps(content))

    def hear(self, what: str, rank: int) -> object:
        """Word of another node, or None if it does not come in time."""
        try:
            self.store.wait([f"{what}/{rank}"], self.timeout)
        except (dist.DistStoreError, RuntimeError):
            return None
        return json.loads(self.store.get(f"{what}/{rank}"))


def examine(
    meeting: Meeting, node: str, limits: Limits, seconds: float, folders: Sequence[str]
) -> tuple[list[Facts], dict[str, str]]:
    """Look at this node, then at the network, then hear on node 0 what all found.

    Args:
        meeting: of all nodes.
        node: name of this one.
        limits: decide whether GPUs are used, and whether pairs of nodes are measured.
        seconds: length of the all-reduce.
        folders: whose free disk counts, besides the temporary folder.

    Returns:
        On node 0 the facts of the nodes that answered, and node → error of those that could not take part; nothing on
        the others.
    """
    gpus, broken = _devices()
    free = {folder: shutil.disk_usage(folder).free / GB for folder in (*folders, tempfile.gettempdir())}
    facts = Facts(node, gpus, broken, free, time.time(), float("inf"), {})
    meeting.tell("alone", facts._asdict())
    count = len(meeting.nodes)
    if meeting.rank == 0:
        here = [meeting.hear("alone", rank) is not None for rank in range(count)]
        meeting.tell("go", all(here))
    if meeting.hear("go", 0) and count > 1:
        # Not a node that lacks its GPUs: what it would measure is not what the others do.
        enough = limits.gpus < 0 or gpus >= limits.gpus
        uses_gpus = limits.gpus != 0 and gpus > 0 and enough
        try:
            facts = _with_network(meeting, facts, limits, seconds, uses_gpus)
        except Exception as error:
            meeting.tell("error", " ".join(str(error).split())[:300])
    meeting.tell("all", facts._asdict())
    if meeting.rank != 0:
        # The store is node 0's: it must not be left before this node's word is there, which `tell` has seen to.
        return [], {}
    heard = [meeting.hear("all", rank) for rank in range(count)]
    found = [_facts(one) for one in heard if isinstance(one, dict)]
    failed = [
        rank for rank in range(count) if heard[rank] is not None and meeting.store.check([f"error/{rank}"])
    ]
    return found, {meeting.nodes[rank]: str(meeting.hear("error", rank)) for rank in failed}


def _with_network(meeting: Meeting, facts: Facts, limits: Limits, seconds: float, uses_gpus: bool) -> Facts:
    device = torch.device("cuda", 0) if uses_gpus else torch.device("cpu")
    # NCCL where every node can; a vote, because all must take the same one.
    meeting.tell("gpus", uses_gpus)
    everyone = [meeting.hear("gpus", rank) for rank in range(len(meeting.nodes))]
    if not all(everyone):
        device = torch.device("cpu")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", meeting.store),  # pyright: ignore[reportPrivateImportUsage]
        rank=meeting.rank,
        world_size=len(meeting.nodes),
        timeout=meeting.timeout,
    )
    try:
        dist.all_reduce(torch.zeros(1, device=device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        clock = time.time()
        speed = throughput(dist.group.WORLD, device, seconds)
        slowest = torch.tensor([speed], device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MIN)
        pairs: dict[str, float] = {}
        if float(slowest) < limits.min_gb_per_s:
            pairs = _pairs(meeting, device)
        return facts._replace(clock_s=clock, gb_per_s=speed, pairs_gb_per_s=pairs)
    finally:
        dist.destroy_process_group()


def _pairs(meeting: Meeting, device: torch.device) -> dict[str, float]:
    """Node → throughput with it alone, for every other node."""
    speeds: dict[str, float] = {}
    for pairs in rounds(len(meeting.nodes)):
        # All processes make all groups, in the same order.
        groups = [(pair, dist.new_group(list(pair), timeout=meeting.timeout)) for pair in pairs]
        for pair, group in groups:
            if meeting.rank in pair and isinstance(group, dist.ProcessGroup):
                other = pair[0] if pair[1] == meeting.rank else pair[1]
                speeds[meeting.nodes[other]] = throughput(group, device, PAIR_S)
        dist.all_reduce(torch.zeros(1, device=device))
    return speeds


def throughput(group: dist.ProcessGroup | None, device: torch.device, seconds: float) -> float:
    """GB/s that each member of a group sends in an all-reduce, ring convention: 2 (n−1)/n bytes a byte.

    Args:
        group: all members call this.
        device: that the data is on.
        seconds: how long.
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


def _facts(content: dict[str, object]) -> Facts:
    return Facts(**content)  # pyright: ignore[reportArgumentType]
