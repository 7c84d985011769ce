"""What the harness costs: tokens/s of its loop over a bare loop with the same model, batches and optimizer.

    python benchmarks/harness_overhead.py [optimizer=sumo key=value …]

Both loops run in this process, in turns; the figures are medians over the rounds. The harness's side has all
that a run has between evaluations: rows every `log_every` steps with losses, gradient norm, memory and times,
metrics.jsonl, the non-finite vote, and the share of spectral probes that `moments.every=auto` affords.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from harness import engines
from harness.feed import Feed
from harness.loop import Ledger, Run, train
from harness.model import loss_sum
from harness.preparation import prepare
from harness.probes.validation import Evaluation
from harness.record.folder import RunFolder
from harness.run import assemble

ROUNDS = 9
STEPS = 20


class _FolderSink:
    def __init__(self, folder: RunFolder) -> None:
        self.write = folder.add_row


def bare(model: torch.nn.Module, optimizer: torch.optim.Optimizer, feed: Feed, max_norm: float) -> None:
    """The loop that one writes without a harness."""
    for step in range(STEPS):
        for ids, labels in feed.step(step):
            loss = loss_sum(model(input_ids=ids).logits, labels) / labels.numel()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad()


def harness_round(run: Run) -> None:
    """The harness's loop over the same steps."""
    run.ledger = Ledger()
    run.clock.read()
    assert train(run) == "finished"


def main() -> None:
    """Print the two speeds and their ratio as JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        words = ["optimizer=adamw", "optimizer.lr=0.001", *sys.argv[1:]]
        words += [
            f"steps={STEPS}",
            "world_size=1",
            f"runs_dir={scratch}",
            "schedule=constant",
            "schedule.warmup=0",
        ]
        prepared = prepare(words, say=print, worker=True)
        config = prepared.config
        run = assemble(prepared, engines.start(config))
        run.stop.restore()
        twin = assemble(prepared, run.engine)
        twin.stop.restore()
        run.engine.prepare(run.model, run.optimizer)
        run.probes = [probe for probe in run.probes if not isinstance(probe, Evaluation)]
        run.sinks = [_FolderSink(RunFolder(Path(scratch) / "run", config, prepared.identity))]
        seconds: dict[str, list[float]] = {"harness": [], "bare": []}
        for round_number in range(ROUNDS + 1):
            for name in ("harness", "bare"):
                begin = time.perf_counter()
                if name == "harness":
                    harness_round(run)
                else:
                    bare(twin.model, twin.optimizer, twin.feed, config.max_grad_norm or float("inf"))
                if round_number:  # the first round warms up
                    seconds[name].append(time.perf_counter() - begin)
    tokens = STEPS * config.batch_size * config.seq_len
    speeds = {name: round(tokens / statistics.median(times)) for name, times in seconds.items()}
    ratios = [bare / own for own, bare in zip(seconds["harness"], seconds["bare"])]
    print(
        json.dumps(
            {
                "optimizer": config.optimizer.name,
                "model": config.model.name,
                "threads": torch.get_num_threads(),
                "tokens_per_s": speeds,
                "ratio": round(statistics.median(ratios), 3),
                "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
            }
        )
    )


if __name__ == "__main__":
    main()
