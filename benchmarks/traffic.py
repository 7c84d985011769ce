"""Count the bytes that the optimizer sends per rank and step under FSDP2, by rank count, subspace rank and
shard axis.

    python -m benchmarks.traffic [--plot docs/img/traffic.png] [--json]

The optimizer's own code runs on meta tensors as one rank of a simulated group (`optimizers.layouts.simulated`), for the
56 hidden matrices of LLaMA-60M; tests/harness/plan compares such counts with real ranks, byte for byte. The mean over
ranks is shown: with more ranks than matrices only some ranks own one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import optimizers
from benchmarks.step_time import llama_60m
from optimizers.layouts.simulated import SimulatedShards
from optimizers.shard_axes import preferred_axes

WORLDS = (2, 4, 8, 16, 32, 43, 64)


class Case(NamedTuple):
    """A line of the table."""

    label: str
    preset: str
    axis: str
    options: dict[str, Any]


CASES = [
    Case("muon, axis 0", "muon", "0", {}),
    *(
        Case(f"sumo side={side} r={rank}, axis {axis}", "sumo", axis, {"side": side, "rank": rank})
        for rank in (16, 128)
        for side, axis in (("long", "auto"), ("long", "0"), ("short", "0"))
    ),
    Case("galore r=128, axis auto", "galore", "auto", {"rank": 128}),
]


def sent(case: Case, world: int) -> tuple[float, float]:
    """Return the mean bytes per rank of an ordinary step and of one with a refresh."""
    ranks = sorted({0, world - 1, *(world * i // 8 for i in range(8))})
    ordinary, refresh = [], []
    for rank in ranks:
        named = [
            (f"layers.{i}.w", nn.Parameter(torch.empty(s, device="meta"))) for i, s in enumerate(llama_60m())
        ]
        optimizer: Any = optimizers.build(case.preset, named, layout="partitioned", **case.options)
        axes = preferred_axes(case.preset, named, world, **case.options) if case.axis == "auto" else {}
        optimizer.attach(SimulatedShards({id(p): axes.get(n, 0) for n, p in named}, rank, world))
        counts = []
        for _ in range(2):
            for _, p in named:
                p.grad = torch.empty_like(p)
            before = sum(optimizer.bytes_sent().values())
            optimizer.step()
            counts.append(sum(optimizer.bytes_sent().values()) - before)
        refresh.append(counts[0])
        ordinary.append(counts[1])
    return sum(ordinary) / len(ranks), sum(refresh) / len(ranks)


def table(found: dict[str, dict[int, float]], worlds: Sequence[int]) -> str:
    """Return a Markdown table of MB per rank and step, with the share of Muon's traffic."""
    lines = ["| MB per rank and step | " + " | ".join(f"W = {w}" for w in worlds) + " |"]
    lines.append("|---|" + "---|" * len(worlds))
    muon = found[CASES[0].label]
    for label, values in found.items():
        cells = [f"{values[w] / 1e6:.2f} ({values[w] / muon[w]:.1%})" for w in worlds]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: dict[str, dict[int, float]], path: Path) -> None:
    """Draw the traffic over the number of ranks."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for label, values in found.items():
        if min(values.values()) > 0:  # a logarithmic axis has no zero
            axes.plot(list(values), [v / 1e6 for v in values.values()], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("ranks (FSDP2)")
    axes.set_ylabel("MB sent per rank and step")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--worlds", default=",".join(map(str, WORLDS)))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(argv)
    worlds = [int(w) for w in given.worlds.split(",")]
    ordinary: dict[str, dict[int, float]] = {}
    refresh: dict[str, dict[int, float]] = {}
    for case in CASES:
        for world in worlds:
            a, b = sent(case, world)
            ordinary.setdefault(case.label, {})[world] = a
            refresh.setdefault(case.label, {})[world] = b
    if given.plot:
        plot(ordinary, given.plot)
    if given.json:
        print(json.dumps({"schema_version": 1, "ordinary": ordinary, "refresh": refresh}))
    else:
        print(table(ordinary, worlds))
        print("\nA step in which every subspace is renewed:\n")
        print(table(refresh, worlds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
