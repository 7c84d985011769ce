"""When moments are probed, by a fake clock, and how their figures reach the host."""

from __future__ import annotations

import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.probes import moments
from harness.probes.moments import ALLOWANCE_S, BUDGET, Moments
from optimizers import moment_sample
from tests.distributed.pool import RankPool
from tests.harness.running import small, trained, write_documents


class FakeRun:
    """A run whose steps and probes take given seconds."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        steps: int,
        step_s: float,
        probe_s: float,
        every: Any = "auto",
    ) -> None:
        self.now = self.inside = 0.0
        self.step_s, self.probe_s = step_s, probe_s
        self.spent = 0.0
        monkeypatch.setattr(moments, "tracked", lambda optimizer: optimizer)
        optimizer = types.SimpleNamespace(
            observes_moments=True,
            routes=(),
            figures_are_divided=False,
            observe_moments=lambda around: None,
            observation_seconds=lambda: self.probe_s,
            moment_figures=dict,
        )
        config = types.SimpleNamespace(steps=steps, moments=types.SimpleNamespace(every=every))
        engine = types.SimpleNamespace(max=lambda tensor: tensor, device=torch.device("cpu"))
        clock = types.SimpleNamespace(
            move=lambda *args: None, part=lambda name: nullcontext(), peek=lambda: {"total": self.now}
        )
        memory = types.SimpleNamespace(phase=lambda name: nullcontext())
        self.state = types.SimpleNamespace(wall_s=0.0)
        run: Any = types.SimpleNamespace(
            config=config, engine=engine, clock=clock, memory=memory, state=self.state, optimizer=optimizer
        )
        self.probe = Moments(run, None)
        self.steps = steps

    def train(self) -> list[int]:
        """Return the steps, from 1, that were probed."""
        probed = []
        for step in range(self.steps):
            due = self.probe.due(step)
            # The first step compiles.
            self.now += self.step_s * (3 if step == 0 else 1)
            if due:
                self.probe.before_update(step)
                self.now += self.probe_s
                self.spent += self.probe_s
                self.probe.measure(step, {})
                probed.append(step + 1)
            if due or (step + 1) % 10 == 0:
                # A row.
                self.state.wall_s = self.now
        return probed


def test_cheap_probes_are_made_in_the_first_the_11th_and_the_last_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = FakeRun(monkeypatch, steps=60, step_s=0.1, probe_s=1.0)
    assert run.train() == [1, 11, 60]


def test_expensive_probes_keep_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = 8 * ALLOWANCE_S
    run = FakeRun(monkeypatch, steps=50, step_s=1.0, probe_s=cost)
    assert run.train() == [1], "an 11th or a last probe would double the time of the run"
    run = FakeRun(monkeypatch, steps=20_000, step_s=1.0, probe_s=cost)
    probed = run.train()
    assert probed[0] == 1
    assert probed[1] > 11
    assert probed[-1] == 20_000, "set aside for the last step"
    assert len(probed) >= 3
    assert run.spent <= BUDGET * run.now + cost


def test_a_given_interval_is_kept_whatever_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(monkeypatch, steps=50, step_s=1.0, probe_s=40.0, every=20)
    assert run.train() == [1, 20, 40, 50]


def test_a_resumed_run_remembers_that_its_last_probe_is_too_expensive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = FakeRun(monkeypatch, steps=50, step_s=1.0, probe_s=40.0)
    run.train()
    state = run.probe.state()
    again = FakeRun(monkeypatch, steps=50, step_s=1.0, probe_s=40.0)
    again.probe.restore(state, 30)
    assert not again.probe.due(49)
    # A checkpoint from before that was remembered.
    again.probe.restore({"next": 10**9, "spent": 0.0}, 30)
    assert again.probe.due(49)


def _rows(rank: int, words: list[str], work: float) -> list[dict[str, Any]]:
    with patch.object(moment_sample, "WORK_ON_CPU", work):
        return trained(rank, words).rows


def test_replicas_that_share_the_matrices_write_the_figures_of_all(
    tmp_path: Path, two_ranks: RankPool
) -> None:
    overrides = ("optimizer=muon", "steps=2", "moments.every=1", "eval.every=2")
    corpus = write_documents(tmp_path)
    pair = small(corpus, tmp_path, *overrides, "world_size=2", "engine=ddp")
    # Fourteen matrices of 32 × 32 and 32 × 48: too much for one process, enough room for two.
    ranks = two_ranks.run(_rows, pair, 3e6)
    alone = _rows(0, small(corpus, tmp_path, *overrides), 1e11)
    keys = [key for key in alone[0] if key.startswith("moments/")]
    assert len(keys) == 10
    for rows in ranks:
        for row, expected in zip(rows, alone, strict=True):
            # Gradients of one and of two processes differ by rounding, which condition numbers magnify.
            for key in keys:
                assert row[key] == pytest.approx(expected[key], rel=2e-2, abs=1e-5), key
    assert [row[key] for row in ranks[0] for key in keys] == [row[key] for row in ranks[1] for key in keys]


def test_figures_reach_the_host_without_a_read_for_each() -> None:
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Reads.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    column = torch.arange(12, dtype=torch.float64)
    figures = {
        f"layer.{i}": {"stable_rank": column[i], "condition_number": column[i].float() + 0.5}
        for i in range(12)
    }
    with Reads():
        layers = moments._on_host(figures)
        assert Reads.count == 0
        float(column[0])
    assert Reads.count == 1, "the mode counts reads"
    assert layers["layer.7"] == {"stable_rank": 7.0, "condition_number": 7.5}
    assert list(layers) == list(figures)
    assert moments._on_host({}) == {}
