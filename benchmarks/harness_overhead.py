"""Measure the overhead of the harness: tokens/s of its loop over a bare loop with equal model, batches and
optimizer.

    python benchmarks/harness_overhead.py optimizer=sumo [key=value …]

Both loops run alternately in this process; the figures are medians over the rounds. The harness's loop includes
everything that a run does between evaluations: rows every `log_every` steps with losses, gradient norm, memory
and times, metrics.jsonl and the flags of each step. Probes of spectra are excluded: they have their own budget
(1 % of time), and the first and last probe, which are always taken, would weigh too much in such short rounds.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness import engines
from harness.loop import Callbacks, Run, TrainState, train
from harness.model import loss_sum
from harness.preparation import prepare
from harness.probes.validation import Evaluation
from harness.protocols import BatchLoader
from harness.record.folder import RunFolder
from harness.run import assemble, build_probes

if TYPE_CHECKING:
    from harness.tasks.task import TaskData

ROUNDS = 30
STEPS = 10


class _FolderSink:
    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.write = folder, folder.add_row


def bare(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: BatchLoader,
    max_norm: float,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Train with a plain loop, as without a harness."""
    for step in range(STEPS):
        for ids, labels in loader.micro_batches(step):
            with autocast():
                logits = model(input_ids=ids).logits
            loss = loss_sum(logits, labels) / labels.numel()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad()


def restarted(run: Run, data: TaskData, sink: _FolderSink) -> tuple[Run, Callbacks]:
    """Return the run as before its first step, with all probes but the evaluation."""
    run = dataclasses.replace(run, state=TrainState())
    probes = [probe for probe in build_probes(run, data) if not isinstance(probe, Evaluation)]
    run.clock.read()
    return run, Callbacks(probes, [sink])


def measure(overrides: Sequence[str], rounds: int = ROUNDS) -> dict[str, Any]:
    """Return the two speeds and their ratio.

    Args:
        overrides: keys of the run; its number of steps and what is recorded are the benchmark's.
        rounds: alternating rounds of `STEPS` steps, after one that warms up.
    """
    with tempfile.TemporaryDirectory() as scratch:
        words = list(overrides)
        words += [
            f"steps={STEPS}",
            "world_size=1",
            f"runs_dir={scratch}",
            "schedule=constant",
            "schedule.warmup=0",
            "moments.every=null",
            "log_every=10",
        ]
        prepared = prepare(words, say=lambda line: print(line, file=sys.stderr), worker=True)
        config = prepared.config
        run = assemble(prepared, engines.start(config))
        run.stop.restore()
        twin = assemble(prepared, run.engine)
        twin.stop.restore()
        run.engine.prepare(run.model, run.optimizer)
        sink = _FolderSink(RunFolder(Path(scratch) / "run", config, prepared.identity))
        sink.folder.begin(0)
        device, max_norm = run.engine.device, config.max_grad_norm or float("inf")
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        seconds: dict[str, list[float]] = {"harness": [], "bare": []}
        for round_number in range(rounds + 1):
            # Turns are swapped each round: whoever comes second may find a warmer machine.
            for name in ("harness", "bare")[:: 1 if round_number % 2 else -1]:
                again, callbacks = restarted(run, prepared.data, sink)
                wait()
                begin = time.perf_counter()
                if name == "harness":
                    assert train(again, callbacks) == "finished"
                else:
                    bare(twin.model, twin.optimizer, twin.loader, max_norm, run.engine.autocast)
                wait()
                if round_number:  # the first round warms up
                    seconds[name].append(time.perf_counter() - begin)
        sink.folder.close()
        run.loader.close()
        twin.loader.close()
    tokens = STEPS * config.batch_size * config.seq_len
    speeds = {name: round(tokens / statistics.median(times)) for name, times in seconds.items()}
    ratios = [bare / own for own, bare in zip(seconds["harness"], seconds["bare"])]
    return {
        "optimizer": config.optimizer.name,
        "model": config.model.name,
        "threads": torch.get_num_threads(),
        "tokens_per_s": speeds,
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def main() -> None:
    """Print the two speeds and their ratio as JSON."""
    print(json.dumps(measure(sys.argv[1:])))


if __name__ == "__main__":
    main()
