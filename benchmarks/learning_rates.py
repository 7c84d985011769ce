"""Search the default learning rates of harness/config/derived_defaults.py for small models.

    python benchmarks/learning_rates.py OPTIMIZER LR,LR,… [key=value …]

Trains one run per learning rate, everything else equal, and prints the validation losses as a Markdown table.
Every optimizer gets the same number of learning rates, a factor of two apart; if the best one is on
the edge of the grid, the grid is moved.
"""

from __future__ import annotations

import sys
import tempfile

from harness import engines
from harness.loop import Callbacks, train
from harness.preparation import prepare
from harness.probes.validation import Evaluation
from harness.run import assemble, build_probes


def final_loss(words: list[str]) -> float:
    """Return the validation loss at the end of a run in this process; infinite if it diverged."""
    prepared = prepare(words, say=lambda text: None, worker=True, writes_folder=False)
    run = assemble(prepared, engines.start(prepared.config))
    run.stop.restore()
    probes = build_probes(run, prepared.data)
    evaluation = next(probe for probe in probes if isinstance(probe, Evaluation))
    return (
        evaluation.best
        if train(run, Callbacks(probes)) == "finished" and evaluation.best is not None
        else float("inf")
    )


def main() -> None:
    """Print the table of losses."""
    optimizer, rates, *rest = sys.argv[1:]
    losses: dict[float, float] = {}
    print(f"| {optimizer}: lr | val/loss |\n|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for rate in map(float, rates.split(",")):
            words = [f"optimizer={optimizer}", f"optimizer.lr={rate}", "world_size=1", f"runs_dir={scratch}"]
            words += ["eval.every=null", "moments.every=null", "wandb.mode=disabled", *rest]
            losses[rate] = final_loss(words)
            print(f"| {rate:g} | {losses[rate]:.4f} |", flush=True)
    best = min(losses, key=lambda rate: losses[rate])
    edge = best in (min(losses), max(losses))
    print(f"\nbest: {best:g}" + (" (on the edge of the grid: move it)" if edge else ""))


if __name__ == "__main__":
    main()
