"""Measure milliseconds per optimizer step against the peers' own packages, on the hidden matrices of LLaMA-60M.

    python -m benchmarks.step_time [--rounds 7] [--layers 8] [--threads 2] [--rank 128] [--only sumo,galore]
    [--quick] [--cpu-time] [--device cpu] [--json] [--profile "ours: sumo"]

All contestants run in one process and alternate, one step each per round, so that other load of the machine
affects all of them; medians over rounds. On a machine that others use, `--cpu-time --threads 1` counts the
processor time of this process instead of the wall clock. Gradients are fixed random matrices with a decaying spectrum;
every optimizer has its own copy of the same weights. In a refresh step every subspace is refreshed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import optimizers
from benchmarks.peers import (
    PublicSumoLoop,
    apollo_torch,
    galore_torch,
    has_apollo_torch,
    keller_muon,
    pytorch_optimizer_fira,
    pytorch_optimizer_muon,
    pytorch_optimizer_rule,
)

Shapes = list[tuple[int, int]]
NEVER = 10**9
DECAY = 0.1
"""Weight decay of the full-rank rules on both sides: it is a pass over the weights."""


def llama_60m(layers: int = 8, hidden: int = 512, inner: int = 1376) -> Shapes:
    """Return the shapes of the 56 hidden matrices of LLaMA-60M, layer by layer."""
    square, up, down = (hidden, hidden), (inner, hidden), (hidden, inner)
    return [square, square, square, square, up, up, down] * layers


@dataclass(frozen=True)
class Contestant:
    """`make(weights)` → an optimizer whose next `step()` is an ordinary one after `warmup` steps."""

    name: str
    make: Callable[[list[nn.Parameter]], Any]
    family: str
    refreshes: bool = False
    """Every step renews the subspaces."""


def contestants(rank: int) -> list[Contestant]:
    """Return all contestants that can be built; packages that are not installed are left out."""

    def ours(preset: str, **options: Any) -> Callable[[list[nn.Parameter]], Any]:
        return lambda weights: optimizers.build(
            preset, [(f"w{i}", w) for i, w in enumerate(weights)], **options
        )

    def in_a_run(preset: str, **options: Any) -> Callable[[list[nn.Parameter]], Any]:
        def make(weights: list[nn.Parameter]) -> Any:
            # The loop has looked at the gradients when it clipped them; peers do not look at all.
            optimizer = ours(preset, **options)(weights)
            optimizer.found_inf = torch.zeros((), device=weights[0].device)
            return optimizer

        return make

    low = {"rank": rank, "refresh_interval": NEVER}
    every = {"rank": rank, "refresh_interval": 1}
    return [
        Contestant("torch AdamW (fused)", lambda w: torch.optim.AdamW(w, lr=1e-3, fused=True), "adamw"),
        Contestant("ours: adamw", in_a_run("adamw"), "adamw"),
        Contestant("ours: adamw, looks at gradients", ours("adamw"), "adamw"),
        Contestant("public SUMO code (per-matrix SVD)", lambda w: PublicSumoLoop(w, rank, NEVER), "sumo"),
        Contestant("ours: sumo", ours("sumo", **low), "sumo"),
        Contestant("ours: sumo_official", ours("sumo_official", **low), "sumo"),
        Contestant("torch.optim.Muon", lambda w: torch.optim.Muon(w, lr=1e-3), "muon"),
        Contestant("KellerJordan Muon", keller_muon, "muon"),
        Contestant("pytorch_optimizer Muon", pytorch_optimizer_muon, "muon"),
        Contestant("ours: muon", ours("muon"), "muon"),
        Contestant("ours: muon (fp32)", ours("muon", orthogonalizer_dtype="float32"), "muon"),
        Contestant("ours: muon_svd", ours("muon_svd"), "muon"),
        Contestant("galore-torch", lambda w: galore_torch(w, rank, NEVER), "galore"),
        Contestant("ours: galore", ours("galore", **low), "galore"),
        Contestant(
            "galore-torch, refresh step", lambda w: galore_torch(w, rank, 1), "galore", refreshes=True
        ),
        Contestant("ours: galore svd, refresh step", ours("galore", **every), "galore", refreshes=True),
        Contestant(
            "ours: galore randomized, refresh step",
            ours("galore", basis="randomized", **every),
            "galore",
            refreshes=True,
        ),
        Contestant("ours: sumo, refresh step", ours("sumo", **every), "sumo", refreshes=True),
        Contestant("pytorch_optimizer Fira", lambda w: pytorch_optimizer_fira(w, rank, NEVER), "fira"),
        Contestant("ours: fira", ours("fira", **low), "fira"),
        Contestant("ours: subtrack", ours("subtrack", **low), "fira"),
        Contestant("ours: subtrack, refresh step", ours("subtrack", **every), "fira", refreshes=True),
        *_apollo(rank),
        Contestant("ours: apollo", ours("apollo", **low), "apollo"),
        Contestant("ours: apollo_mini", ours("apollo_mini", refresh_interval=NEVER), "apollo"),
        Contestant("ours: ldadam", ours("ldadam", rank=rank), "moving"),
        Contestant("ours: dct_subspace", ours("dct_subspace", rank=rank), "moving"),
        Contestant("ours: gum", ours("gum", **low), "muon"),
        Contestant("ours: lion", in_a_run("lion", weight_decay=DECAY), "lion"),
        *_full_rank(ours),
    ]


def _full_rank(ours: Callable[..., Callable[[list[nn.Parameter]], Any]]) -> list[Contestant]:
    """Return the full-rank rules next to Muon, and pytorch_optimizer's."""

    def theirs(name: str, **options: Any) -> Callable[[list[nn.Parameter]], Any]:
        return lambda weights: pytorch_optimizer_rule(name, weights, weight_decay=DECAY, **options)

    return [
        Contestant("pytorch_optimizer NorMuon", theirs("NorMuon"), "normuon"),
        Contestant("ours: normuon", ours("normuon", weight_decay=DECAY), "normuon"),
        Contestant("pytorch_optimizer AdaMuon", theirs("AdaMuon"), "adamuon"),
        Contestant("ours: adamuon", ours("adamuon", weight_decay=DECAY), "adamuon"),
        Contestant("pytorch_optimizer Lion", theirs("Lion"), "lion"),
        Contestant("ours: lion, looks at gradients", ours("lion", weight_decay=DECAY), "lion"),
        Contestant("pytorch_optimizer SOAP", theirs("SOAP", precondition_frequency=NEVER), "soap"),
        Contestant("ours: soap", ours("soap", weight_decay=DECAY, refresh_interval=NEVER), "soap"),
        Contestant(
            "pytorch_optimizer SOAP, refresh step",
            theirs("SOAP", precondition_frequency=1),
            "soap",
            refreshes=True,
        ),
        Contestant(
            "ours: soap, refresh step",
            ours("soap", weight_decay=DECAY, refresh_interval=1),
            "soap",
            refreshes=True,
        ),
        Contestant("ours: dion2", ours("dion2"), "dion2"),
        Contestant("ours: muon_polar_express", ours("muon_polar_express"), "dion2"),
    ]


def _apollo(rank: int) -> list[Contestant]:
    if not has_apollo_torch():
        return []
    return [
        Contestant("apollo-torch", lambda w: apollo_torch(w, rank, NEVER, "channel"), "apollo"),
        Contestant("apollo-torch, mini", lambda w: apollo_torch(w, 1, NEVER, "tensor"), "apollo"),
    ]


# (ours, peer, target): ours must take at most `target` times what the peer takes.
TARGETS = [
    ("ours: sumo", "public SUMO code (per-matrix SVD)", 0.45),
    ("ours: sumo", "torch.optim.Muon", 0.35),
    ("ours: muon", "torch.optim.Muon", 0.75),
    ("ours: galore", "galore-torch", 0.9),
    ("ours: galore randomized, refresh step", "galore-torch, refresh step", 0.1),
    ("ours: sumo, refresh step", "galore-torch, refresh step", 0.1),
    ("ours: adamw", "torch AdamW (fused)", 1.1),
    ("ours: fira", "pytorch_optimizer Fira", 1.0),
    ("ours: normuon", "pytorch_optimizer NorMuon", 1.0),
    ("ours: adamuon", "pytorch_optimizer AdaMuon", 1.0),
    ("ours: lion", "pytorch_optimizer Lion", 1.0),
    ("ours: soap", "pytorch_optimizer SOAP", 1.0),
    ("ours: soap, refresh step", "pytorch_optimizer SOAP, refresh step", 1.0),
    ("ours: dion2", "ours: muon_polar_express", 0.5),
    ("ours: apollo", "apollo-torch", 1.0),
    ("ours: apollo_mini", "apollo-torch, mini", 1.0),
]


def gradients(shapes: Shapes, seed: int = 0, device: torch.device | str = "cpu") -> list[Tensor]:
    """Return random matrices with singular values that decay like i^-½, as gradients of language models roughly do."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for m, n in shapes:
        k = min(m, n)
        left = torch.randn(m, k, generator=generator) / m**0.5
        right = torch.randn(k, n, generator=generator) / n**0.5
        decay = torch.arange(1, k + 1).float().rsqrt()
        made.append((1e-2 * (left * decay) @ right).to(device))
    return made


def warmed(contestant: Contestant, grads: list[Tensor]) -> Any:
    """Return the contestant's optimizer on its own copy of the weights, after its first, unusual steps."""
    weights = [nn.Parameter(torch.zeros_like(gradient)) for gradient in grads]
    for weight, gradient in zip(weights, grads):
        weight.grad = gradient
    optimizer = contestant.make(weights)
    for _ in range(1 if contestant.refreshes else 2):
        optimizer.step()
    return optimizer


def measure(
    chosen: list[Contestant],
    shapes: Shapes,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Return the median milliseconds per step of each contestant, by `clock` (seconds).

    On a GPU a step ends when the device has done it.
    """
    grads = gradients(shapes, device=device)
    built = {contestant.name: warmed(contestant, grads) for contestant in chosen}
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    times: dict[str, list[float]] = {c.name: [] for c in chosen}
    for _ in range(rounds):
        for contestant in chosen:
            wait()
            start = clock()
            built[contestant.name].step()
            wait()
            times[contestant.name].append(1e3 * (clock() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def profiled(contestant: Contestant, shapes: Shapes) -> str:
    """Return the operators of one step of a contestant, the slowest first."""
    optimizer = warmed(contestant, gradients(shapes))
    with torch.profiler.profile() as profile:
        optimizer.step()
    return profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15)


def report(medians: dict[str, float]) -> str:
    """Return a Markdown table of times, and one of ratios with their targets."""
    lines = ["| optimizer | ms per step |", "|---|---|"]
    lines += [f"| {name} | {value:.1f} |" for name, value in medians.items()]
    lines += ["", "| ours | against | ratio | target |", "|---|---|---|---|"]
    lines += [
        f"| {a} | {b} | {medians[a] / medians[b]:.2f} | ≤ {target} |"
        for a, b, target in TARGETS
        if a in medians and b in medians
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument(
        "--only",
        default="",
        help="families, by comma: adamw, sumo, muon, galore, fira, apollo, moving, "
        "normuon, adamuon, lion, soap, dion2",
    )
    parser.add_argument(
        "--no-refresh", action="store_true", help="leave the refresh steps out (they are slow)"
    )
    parser.add_argument("--quick", action="store_true", help="two tiny layers: that it runs, not how fast")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of this process")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--profile", default="", metavar="NAME", help="operators of one contestant's step instead"
    )
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    shapes = llama_60m(1, 32, 48) if given.quick else llama_60m(given.layers)
    rank, rounds = (8, 2) if given.quick else (given.rank, given.rounds)
    if given.profile:
        known = {c.name: c for c in contestants(rank)}
        if given.profile not in known:
            parser.error(f"--profile {given.profile!r}: allowed are {', '.join(known)}")
        print(profiled(known[given.profile], shapes))
        return 0
    wanted = set(given.only.split(",")) if given.only else set()
    chosen = [
        c
        for c in contestants(rank)
        if (not wanted or c.family in wanted) and not (given.no_refresh and c.refreshes)
    ]
    clock = time.process_time if given.cpu_time else time.perf_counter
    medians = measure(chosen, shapes, rounds, clock, given.device)
    print(json.dumps({"schema_version": 1, "ms_per_step": medians}) if given.json else report(medians))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
