"""Time from `optbench train` to the end of its first step, and CPU time of all processes, for one and two processes.

    python -m benchmarks.startup [--rounds 5] [key=value …]

Needs a quiet machine: the imports of torch and transformers take most of it. The corpus is built before the rounds.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

WORDS = ("experiment=quickstart", "optimizer=sumo", "steps=1", "eval.every=null", "eval.tokens=128")


def measure(words: Sequence[str], folder: str) -> tuple[float, float]:
    """Train one step; return the seconds until its row is shown, and the CPU seconds of all processes to their end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin, first = time.monotonic(), None
    command = [sys.executable, "-m", "harness.cli", "train", *WORDS, f"runs_dir={folder}", "overwrite=true"]
    process = subprocess.Popen(
        [*command, "name=run", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "WANDB_MODE": os.environ.get("WANDB_MODE", "offline")},
    )
    assert process.stdout is not None
    shown = []
    for line in process.stdout:
        shown.append(line)
        if line.startswith("step 1/") and first is None:
            first = time.monotonic() - begin
    if process.wait() or first is None:
        raise SystemExit("".join(shown))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return first, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments, words = parser.parse_known_args()
    worlds = (1, 2)
    with tempfile.TemporaryDirectory() as folder:
        measure([*words, "world_size=1"], folder)
        rounds = [
            [measure([*words, f"world_size={world}"], folder) for world in worlds]
            for _ in range(arguments.rounds)
        ]
    print("| processes | to the end of the first step, s | CPU time of all processes, s |\n|---|---|---|")
    for world, found in zip(worlds, zip(*rounds)):
        first, cpu = (statistics.median(values) for values in zip(*found))
        print(f"| {world} | {first:.1f} | {cpu:.1f} |")


if __name__ == "__main__":
    main()
