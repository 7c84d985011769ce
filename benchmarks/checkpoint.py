"""Measure checkpoints: how long training waits for a save, and whether a later resume takes longer.

    python -m benchmarks.checkpoint [--rounds N] [key=value …]

Default: LLaMA-9M under SUMO, one process, the packaged text. Saves with and without a background thread alternate;
medians over the rounds. The first save is listed separately, because it also touches the memory of the copy.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from harness import engines
from harness.checkpoint import resuming
from harness.checkpoint.contents import Randomness
from harness.checkpoint.saving import Checkpoints
from harness.checkpoint.store import Store
from harness.loop import Callbacks, Run, train
from harness.preparation import prepare
from harness.run import assemble

WORDS = ["model=llama_9m", "optimizer=sumo", "batch_size=2", "seq_len=64", "eval.tokens=64"]
QUIET = ["moments.every=null", "checkpoint.every=null", "wandb.mode=disabled", "world_size=1"]
STEPS = (10, 100_000)


def started(words: Sequence[str], folder: Path, steps: int) -> tuple[Run, Checkpoints]:
    """Assemble a run that is ready to train, with its checkpoints."""
    prepared = prepare(
        [*WORDS, *QUIET, f"steps={steps}", f"runs_dir={folder}", *words],
        say=print,
        worker=True,
        writes_folder=False,
    )
    run = assemble(prepared, engines.start(prepared.config))
    run.stop.restore()
    facts = {**prepared.hashes(), "identity": "benchmark"}
    return run, Checkpoints(run, folder / "run", facts, attempt=1, say=print)


def seconds(action: Any) -> float:
    """Return the wall time of a call."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def saves(run: Run, checkpoints: Checkpoints, rounds: int) -> dict[str, float]:
    """Return medians of a foreground save, and of the time that training waits for a background save."""
    state = Randomness.now(run.engine.device)
    found: dict[str, list[float]] = {"foreground": [], "background": []}
    first = seconds(lambda: checkpoints.save(state, background=True))
    checkpoints.finish()
    for _ in range(rounds):
        found["foreground"].append(seconds(lambda: checkpoints.save(state, background=False)))
        found["background"].append(seconds(lambda: checkpoints.save(state, background=True)))
        checkpoints.finish()
    return {"first": first, **{name: statistics.median(times) for name, times in found.items()}}


def resumes(words: Sequence[str], folder: Path, step: int, rounds: int) -> float:
    """Return the median time from an assembled run to its next batch, from a checkpoint after ``step`` steps."""
    run, checkpoints = started(words, folder / str(step), step + 10)
    (folder / str(step) / "run").mkdir(parents=True)
    for group in run.optimizer.param_groups:
        for parameter in group["params"]:
            run.optimizer.state[parameter]["step"] = step
    run.state.step = step
    checkpoints.save(Randomness.now(run.engine.device), background=False)
    times = []
    for _ in range(rounds):
        run, checkpoints = started(words, folder / str(step), step + 10)

        def resume(run: Run = run, checkpoints: Checkpoints = checkpoints) -> None:
            choice = resuming.choose(run, checkpoints.store, identity="benchmark", attempt=2)
            assert resuming.resume(run, [], checkpoints.store, choice, lambda line: None) == step
            run.loader.micro_batches(run.state.step)

        times.append(seconds(resume))
    return statistics.median(times)


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run, checkpoints = started(words, folder, 2)
        (folder / "run").mkdir(parents=True)
        train(run, Callbacks())
        times = saves(run, checkpoints, arguments.rounds)
        size = sum(path.stat().st_size for path in Store(folder / "run").folder(run.state.step).iterdir())
        print(f"checkpoint of {size / 1e6:.1f} MB, {torch.get_num_threads()} thread(s)")
        print(f"in the foreground            {times['foreground'] * 1e3:8.1f} ms")
        print(f"training waits (background)  {times['background'] * 1e3:8.1f} ms", end="  ")
        print(
            f"{times['background'] / times['foreground']:.1%} of it; the first time {times['first'] * 1e3:.1f} ms"
        )
        for step in STEPS:
            print(
                f"resume at step {step:>7,}: {resumes(words, folder, step, arguments.rounds) * 1e3:8.1f} ms"
            )


if __name__ == "__main__":
    main()
