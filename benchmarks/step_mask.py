"""Measure what a mask costs in an optimizer step on a CPU: the flag `found_inf` read by the host, against a mask.

    python -m benchmarks.step_mask [PRESET …] [--rounds 9] [--layers 2] [--threads 1] [--rank 128]

A GPU computes every step under a mask, because the host would wait for the flag. On a CPU only skipped steps are
masked. Both variants alternate in one process, on the hidden matrices of LLaMA-60M; medians of processor time, so that
other load of the machine counts little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

import optimizers
from benchmarks.step_time import NEVER, gradients, llama_60m
from optimizers import skipping
from optimizers.presets import names, resolve

PRESETS = ("adamw", "lion", "muon", "normuon", "adamuon", "galore", "fira", "sumo")
HOST_MAY_LOOK = skipping.host_may_look


def build(preset: str, grads: list[Tensor], rank: int) -> Any:
    """Return an optimizer in an ordinary step of a run, whose loop has found the gradients finite."""
    weights = [nn.Parameter(torch.zeros_like(gradient)) for gradient in grads]
    for weight, gradient in zip(weights, grads, strict=True):
        weight.grad = gradient
    wanted = {"rank": rank, "refresh_interval": NEVER}
    known: dict[str, Any] = {key: value for key, value in wanted.items() if key in resolve(preset)}
    optimizer: Any = optimizers.build(
        preset, [(f"w{i}", weight) for i, weight in enumerate(weights)], **known
    )
    optimizer.found_inf = torch.zeros(())
    return optimizer


def measure(preset: str, grads: list[Tensor], rounds: int, rank: int) -> tuple[float, float]:
    """Return the median milliseconds per step under a mask, and with the flag read by the host."""
    built = {is_blind: build(preset, grads, rank) for is_blind in (True, False)}
    times: dict[bool, list[float]] = {True: [], False: []}
    try:
        # Two more rounds: the first steps take bases and allocate the state.
        for _ in range(rounds + 2):
            for is_blind, optimizer in built.items():
                skipping.host_may_look = (lambda device: False) if is_blind else HOST_MAY_LOOK
                start = time.process_time()
                optimizer.step()
                times[is_blind].append(1e3 * (time.process_time() - start))
    finally:
        skipping.host_may_look = HOST_MAY_LOOK
    masked, read = (statistics.median(times[is_blind][2:]) for is_blind in (True, False))
    return masked, read


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("presets", nargs="*", default=PRESETS, metavar="PRESET")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rank", type=int, default=128)
    given = parser.parse_args(argv)
    if unknown := sorted({*given.presets} - {*names()}):
        parser.error(f"unknown preset {unknown[0]}; allowed: {', '.join(names())}")
    torch.set_num_threads(given.threads)
    grads = gradients(llama_60m(given.layers))
    print("| preset | under a mask, ms | flag read by the host, ms | ratio |\n|---|---|---|---|")
    for preset in given.presets:
        masked, read = measure(preset, grads, given.rounds, given.rank)
        print(f"| `{preset}` | {masked:.1f} | {read:.1f} | {read / masked:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
