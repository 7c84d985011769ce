"""Measure the overhead of fine-tuning: the time of a run's steps over that of a plain loop on the same batches.

    python benchmarks/task_overhead.py task=classify task.text=[sentence1,sentence2] task.label=label [key=value …]

Both loops train the same model with the same optimizer and precision, and take turns in this process; the figure is
the median ratio of a round. The plain loop calls the model with `labels`, so that `transformers` computes the loss,
and clips and steps as torch's tutorials do. It gets its batches from memory: the run also pays for reading and padding
them, and for rows, flags and metrics.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from harness import engines
from harness.loop import Callbacks, Run, TrainState, train
from harness.preparation import Prepared, prepare
from harness.probes.validation import Evaluation
from harness.record.folder import RunFolder
from harness.run import assemble, build_probes

ROUNDS = 20
STEPS = 10


class _FolderSink:
    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.write = folder, folder.add_row


def plain(run: Run, steps: Sequence[Sequence[tuple[torch.Tensor, ...]]]) -> None:
    """Train on the batches of the steps with a plain loop."""
    model: Any = run.model
    for batches in steps:
        for batch in batches:
            inputs = run.objective.inputs(batch)
            with run.engine.autocast():
                loss = model(**inputs, labels=batch[2]).loss
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(
            model.parameters(), run.config.max_grad_norm or float("inf"), foreach=True
        )
        run.optimizer.step()
        run.optimizer.zero_grad()


def measure(overrides: Sequence[str], rounds: int = ROUNDS) -> dict[str, Any]:
    """Return the ratio of the two times, and examples per second of both.

    Args:
        overrides: keys of a run with ``task=classify``; its number of steps and what is recorded are the benchmark's.
        rounds: of `STEPS` steps each, after one that warms up.
    """
    with tempfile.TemporaryDirectory() as scratch:
        words = [*overrides, f"steps={STEPS}", "world_size=1", f"runs_dir={scratch}", "schedule=constant"]
        words += ["schedule.warmup=0", "moments.every=null", "log_every=10"]
        prepared = prepare(words, say=lambda line: print(line, file=sys.stderr), worker=True)
        run = assemble(prepared, engines.start(prepared.config))
        run.stop.restore()
        twin = assemble(prepared, run.engine)
        twin.stop.restore()
        run.engine.prepare(run.model, run.optimizer)
        sink = _FolderSink(RunFolder(Path(scratch) / "run", prepared.config, prepared.identity))
        sink.folder.begin(0)
        steps = [list(twin.loader.micro_batches(step)) for step in range(STEPS)]
        seconds: dict[str, list[float]] = {"optbench": [], "plain": []}
        for number in range(rounds + 1):
            # Turns are swapped each round: whoever comes second may find a warmer machine.
            for name in list(seconds)[:: 1 if number % 2 else -1]:
                took = _timed(prepared, run, sink) if name == "optbench" else _timed_plain(twin, steps)
                if number:
                    seconds[name].append(took)
        sink.folder.close()
        run.loader.close()
        twin.loader.close()
    ratios = [own / other for own, other in zip(seconds["optbench"], seconds["plain"])]
    examples = STEPS * prepared.config.batch_size
    return {
        "model": prepared.config.model.name,
        "optimizer": prepared.config.optimizer.name,
        "threads": torch.get_num_threads(),
        "examples_per_s": {
            name: round(examples / statistics.median(times), 1) for name, times in seconds.items()
        },
        "time_ratio": round(statistics.median(ratios), 3),
        "time_ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def _timed(prepared: Prepared, run: Run, sink: _FolderSink) -> float:
    run = dataclasses.replace(run, state=TrainState())
    probes = [probe for probe in build_probes(run, prepared.data) if not isinstance(probe, Evaluation)]
    run.clock.read()
    begin = _now(run)
    assert train(run, Callbacks(probes, [sink])) == "finished"
    return _now(run) - begin


def _timed_plain(run: Run, steps: Sequence[Sequence[tuple[torch.Tensor, ...]]]) -> float:
    begin = _now(run)
    plain(run, steps)
    return _now(run) - begin


def _now(run: Run) -> float:
    if run.engine.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Print the ratio as JSON."""
    print(json.dumps(measure(sys.argv[1:])))


if __name__ == "__main__":
    main()
