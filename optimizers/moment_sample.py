"""Which matrices an observed step computes figures of: all of a small model, layers spread over a large one."""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping
from typing import NamedTuple

WORK = {"cuda": 5e12}
"""Most `work_of` that a process spends on one observed step, by device type. An fp64 eigendecomposition of
4096 × 4096 is 6e11 of it and takes about a second on a data-center GPU (estimate): several seconds there."""
WORK_ON_CPU = 1e11

_NUMBER = re.compile(r"\d+")


class Sample(NamedTuple):
    """What is looked at.

    Attributes:
        names: of all matrices whose figures some process computes; the same on every process.
        mine: those that this process computes.
    """

    names: frozenset[str]
    mine: frozenset[str]


def choose(
    shapes: Mapping[str, tuple[int, int]], device_type: str, *, replicas: int = 1, replica: int = 0
) -> Sample | None:
    """Return the matrices to look at, or None for all of them on every process, where that is cheap.

    Replicas, which hold the same moments, share the work. If it is still too much, the same number of matrices of each
    role (a name without its numbers, such as ``layers.*.q_proj.weight``) is taken, spread evenly over the layers: the
    first and the last one, then those between. The choice follows from names and shapes, so that all processes and
    all observed steps make the same one.

    Args:
        shapes: name → (m, n) of the moment of every matrix.
        device_type: "cuda" or "cpu".
        replicas: processes that hold the same moments.
        replica: this process' place among them.
    """
    work = {name: work_of(shape) for name, shape in shapes.items()}
    limit = WORK.get(device_type, WORK_ON_CPU)
    if sum(work.values()) <= limit:
        return None
    roles: dict[str, list[str]] = {}
    for name in sorted(shapes, key=_natural):
        roles.setdefault(_NUMBER.sub("*", name), []).append(name)
    budget = limit * replicas

    def spread(count: int) -> list[str]:
        return [name for role in roles.values() for name in _spread(role, count)]

    # The largest count that fits; one is tried in any case.
    fits, exceeds = 1, max(map(len, roles.values())) + 1
    while exceeds - fits > 1:
        count = (fits + exceeds) // 2
        if sum(work[name] for name in spread(count)) <= budget:
            fits = count
        else:
            exceeds = count
    names = spread(fits)
    if sum(work[name] for name in names) > budget:
        # Not even one matrix of each role: the cheapest roles, one at least.
        names.sort(key=lambda name: (work[name], name))
        while len(names) > 1 and sum(work[name] for name in names) > budget:
            names.pop()
    # The dearest first, each to the replica with the least work so far.
    load = [(0.0, rank) for rank in range(replicas)]
    mine = set()
    for name in sorted(names, key=lambda name: (-work[name], name)):
        least, rank = load[0]
        heapq.heapreplace(load, (least + work[name], rank))
        if rank == replica:
            mine.add(name)
    return Sample(frozenset(names), frozenset(mine))


def work_of(shape: tuple[int, int]) -> float:
    """Return the cost of a matrix' figures: 9k³ for its eigendecomposition, a thirtieth of its products' FLOPs."""
    m, n = shape
    return 9.0 * min(m, n) ** 3 + 4.0 / 30 * m * n * min(m, n)


def _spread(names: list[str], count: int) -> list[str]:
    """Return ``count`` of the names (all, if there are fewer) at even distances; one: the middle one."""
    if count >= len(names):
        return names
    if count == 1:
        return [names[len(names) // 2]]
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


def _natural(name: str) -> tuple[list[int], str]:
    return [int(number) for number in _NUMBER.findall(name)], name
