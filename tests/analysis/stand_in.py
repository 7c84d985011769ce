"""A stand-in for the launcher that writes a synthetic run folder where the real one would train a run."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from harness.config import compose, sources
from harness.jobs import outcome
from harness.jobs.outcome import RunOutcome
from harness.preparation import Prepared
from tests.analysis import synthetic
from tests.analysis.synthetic import TYPICAL, Recipe

SMALL = [
    "steps=20",
    "world_size=1",
    "engine.threads=1",
    "batch_size=2",
    "seq_len=32",
    "eval.tokens=512",
    "wandb.mode=disabled",
]


@dataclass
class Launcher:
    """Stands in for `harness.jobs.launch.start`; ``fate``: run name → state, or what is raised."""

    started: list[str] = field(default_factory=list)
    fate: dict[str, Any] = field(default_factory=dict)
    end: Callable[[Prepared], float] | None = None
    """Final loss of a run before noise; None: typical of its optimizer."""

    def start(self, run: Prepared, *, output: Any = None) -> RunOutcome:
        name = run.folder.name
        self.started.append(name)
        state = self.fate.get(name, "finished")
        if isinstance(state, BaseException):
            raise state
        if state != "vanished":
            self._write(run, state)
        state = "failed" if state == "vanished" else state
        return RunOutcome(run.folder, state, outcome.EXIT_CODES[state], f"{state} by the test")

    def _write(self, run: Prepared, state: str) -> None:
        shared = {"seed": run.config.seed, "state": state, "stop_at": None if state == "finished" else 70}
        recipe = Recipe(**{**vars(TYPICAL[run.config.optimizer.name]), **shared})
        recipe.lr, recipe.lr_source = run.config.optimizer.lr or 0.0, str(run.config.optimizer.lr_source)
        recipe.end = recipe.end if self.end is None else self.end(run)
        recipe.summary = {"comparison_key": run.comparison_key, "identity": run.identity}
        folder = synthetic.write(run.folder.parent, recipe, run.folder.name)
        status = json.loads((folder / "status.json").read_text())
        (folder / "status.json").write_text(json.dumps({**status, "identity": run.identity}))


def parabola(best: Mapping[str, float]) -> Callable[[Prepared], float]:
    """Return a final loss that is a parabola in the logarithm of the learning rate, lowest at ``best`` of a preset."""

    def loss(run: Prepared) -> float:
        rate = run.config.optimizer.lr
        assert rate is not None
        return 3.0 + 0.2 * math.log2(rate / best[run.config.optimizer.name]) ** 2

    return loss


def keep_compositions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merge each selection of shipped files once: that is most of what a stand-in's run takes."""
    known: dict[str, sources.Composed] = {}

    def composed(selections: dict[str, str]) -> sources.Composed:
        key = repr(selections)
        if key not in known:
            known[key] = sources.compose(selections)
        return copy.deepcopy(known[key])

    monkeypatch.setattr(compose, "compose", composed)
