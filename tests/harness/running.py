"""Small real runs for tests: a text in a folder, a model of a few thousand parameters, the harness's own path."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

SMALL_MODEL = (
    "model=llama_tiny",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=2",
    "model.config.num_key_value_heads=2",
    "model.config.vocab_size=512",
)
SHORT_RUN = (
    "steps=4",
    "batch_size=8",
    "seq_len=32",
    "eval.every=1",
    "eval.tokens=256",
    "log_every=2",
    "wandb.mode=disabled",
)


def write_documents(folder: Path, count: int = 400) -> Path:
    """A JSON-lines corpus of pseudo-English with documents of very different lengths."""
    generator = np.random.default_rng(0)
    syllables = ["ba", "de", "ki", "lo", "mu", "ran", "sel", "tor", "vin", "wex"]
    words = ["".join(generator.choice(syllables, generator.integers(1, 4))) for _ in range(300)]
    weights = 1 / np.arange(1, 301)
    path = folder / "documents.jsonl"
    with path.open("w") as file:
        for _ in range(count):
            length = int(generator.choice([4, 12, 60, 200]))
            text = " ".join(generator.choice(words, length, p=weights / weights.sum()))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def small(corpus: Path, runs_dir: Path, *overrides: str) -> list[str]:
    """Overrides of a run that takes a second, with ``overrides`` winning."""
    base = [
        *SMALL_MODEL,
        *SHORT_RUN,
        "data=jsonl",
        f"data.files=[{corpus}]",
        "data.vocab_size=512",
        "data.validation_tokens=600",
        f"runs_dir={runs_dir}",
        "world_size=1",
    ]
    keys = {word.split("=")[0].lstrip("+") for word in overrides}
    return [word for word in base if word.split("=")[0] not in keys] + list(overrides)


def train_weights(
    overrides: Sequence[str], *, change: Callable[..., None] | None = None, sinks: Sequence[Any] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Train in this process (one rank of several, if a group is up); returns weights before and after.

    Args:
        change: called with the assembled run before training, to break something on purpose.
        sinks: take the rows.
    """
    from harness import engines
    from harness.loop import Callbacks, train
    from harness.preparation import prepare
    from harness.run import assemble, build_probes

    prepared = prepare(overrides, say=lambda text: None, worker=True, writes_folder=False)
    run = assemble(prepared, engines.start(prepared.config))
    run.stop.restore()
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    if change is not None:
        change(run)
    state = train(run, Callbacks(build_probes(run, prepared.data), sinks))
    assert state == "finished", state
    return before, {name: p.detach().clone() for name, p in run.model.named_parameters()}


class Trained(NamedTuple):
    """A finished run: whole weights on rank 0 (nothing on the others), and what this process saw."""

    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    rows: list[dict[str, Any]]
    skipped: int
    state: list[float]
    """Sums of the magnitudes of the optimizer's state tensors."""


def trained(rank: int, overrides: Sequence[str], change: Callable[..., None] | None = None) -> Trained:
    """Train in this process on any engine; what the engine did to the process is undone afterwards.

    Args:
        rank: of this process, for `tests.distributed.pool.RankPool.run`.
        overrides: as for `train_weights`.
        change: called with the assembled run before training, to break something on purpose.
    """
    from harness import engines
    from harness.loop import Callbacks, train
    from harness.preparation import prepare
    from harness.run import assemble, build_probes

    prepared = prepare(overrides, say=lambda text: None, worker=True, writes_folder=False)
    run = assemble(prepared, engines.start(prepared.config))
    run.stop.restore()
    sink = _Rows()
    probes = build_probes(run, prepared.data)
    try:
        before = run.engine.full_weights()
        if change is not None:
            change(run)
        assert train(run, Callbacks(probes, [sink])) == "finished"
        after = run.engine.full_weights()
    finally:
        run.engine.release()
    tensors = [v for entry in run.optimizer.state.values() for v in entry.values() if torch.is_tensor(v)]
    state = [float(tensor.float().abs().sum()) for tensor in tensors]
    return Trained(before, after, sink.rows, run.state.skipped, state)


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns in a process of its own: DeepSpeed keeps process groups that were destroyed."""
    from tests.faults.forked import CONTEXT

    # Forked from one that has imported torch; its environment is older than this process's.
    with ProcessPoolExecutor(1, CONTEXT, _take_environment, (dict(os.environ),)) as pool:
        return pool.submit(function, *arguments).result()


def _take_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


class _Rows:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


def update_error(
    reference: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]],
    other: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]],
) -> float:
    """Largest relative difference of a parameter's change over the run, Frobenius norm, in fp64."""
    worst = 0.0
    for name, after in reference[1].items():
        change = after.double() - reference[0][name].double()
        difference = other[1][name].double() - after.double()
        worst = max(worst, float(difference.norm() / change.norm()))
    return worst
