"""Steps from a checkpoint: the exact one is the optimizer's own, and the shortened one has the approximate length."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import optimizers
from analysis.paper.theory import findings, one_step
from analysis.paper.theory.arms import TheoryArm
from analysis.paper.theory.one_step import StepRow
from analysis.paper.theory.polar_bound import MUON
from harness.checkpoint import files, store
from harness.config import checks, compose
from harness.model import build
from optimizers import named_state
from optimizers.named_state import StatePiece
from tests.harness.running import small, write_documents

STEPS = 3
ARM = TheoryArm("tiny, 4 steps of 8×32", "sumo", "lr 0.01")


def test_the_shortened_step_has_the_length_and_the_direction_that_it_says() -> None:
    torch.manual_seed(0)
    start = {"w": torch.randn(6, 9, dtype=torch.float64)}
    gradient = torch.randn(6, 9, dtype=torch.float64)

    def take(overrides: Any) -> dict[str, torch.Tensor]:
        parameter = torch.nn.Parameter(start["w"].clone())
        options = {"rank": 4, "update_scale": "none", "lr": 0.1, **overrides}
        optimizer = optimizers.build("sumo", [("w", parameter)], **options)
        parameter.grad = gradient.clone()
        optimizer.step()
        return {"w": parameter.detach().clone()}

    weights, length = one_step.three_steps(take, start, {"residual": "sgd"})
    # In closed form: the moment is the projection on the four largest directions, whose factor is U₄V₄ᵀ; five steps
    # give U₄ p(s) V₄ᵀ, so that the length is the mean of p. The basis is randomized, with a small error.
    u, values, vh = torch.linalg.svd(gradient)
    p = MUON.polynomial(MUON.scaled(values[:4].numpy()), 5)
    exact = start["w"] - 0.1 * (gradient - (u[:, :4] * values[:4]) @ vh[:4] + u[:, :4] @ vh[:4])
    short = exact - 0.1 * (p.mean() - 1) * u[:, :4] @ vh[:4]
    assert length == pytest.approx(p.mean(), abs=0.02)
    torch.testing.assert_close(weights["exact"]["w"], exact, atol=0.02, rtol=0)
    torch.testing.assert_close(weights["shortened"]["w"], short, atol=0.02, rtol=0)
    # What is left of the difference has no part along the exact factor.
    rest = weights["newton_schulz"]["w"] - weights["shortened"]["w"]
    orthogonal = take({"residual": "drop", "residual_scale": 0.0})["w"] - start["w"]
    assert abs(float((rest * orthogonal).sum() / orthogonal.square().sum())) < 1e-6
    assert float(rest.norm()) > 1e-3


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Any, optimizers.Optimizer, Any]:
    """A checkpoint of a small model after three steps, with the live model and optimizer that wrote it."""
    words = small(write_documents(tmp_path, 120), tmp_path / "runs", "optimizer=sumo", "optimizer.lr=0.01")
    config = checks.check(compose.load(words))
    model = build(config.model, seed=0)
    optimizer = optimizers.build(
        "sumo", model.named_parameters(), modules=model, lr=config.optimizer.lr, **config.optimizer.options
    )
    assert isinstance(optimizer, optimizers.Optimizer)
    for _ in range(STEPS):
        for parameter in model.parameters():
            parameter.grad = 0.01 * torch.randn_like(parameter)
        optimizer.step()
    target = store.Store(tmp_path / "run")
    partial = target.partial(STEPS, "1")
    partial.mkdir(parents=True)
    weights = [
        StatePiece(name, "weight", tuple(p.shape), None, 0, p.detach().clone(), True)
        for name, p in model.named_parameters()
    ]
    state = [piece._replace(tensor=piece.tensor.clone()) for piece in named_state.pieces(optimizer)]
    facts = {"step": STEPS, "optimizer": {"steps": optimizer.steps_by_name()}}
    files.write(partial, 0, [*weights, *state], {}, facts)
    (partial / "config.yaml").write_text(compose.to_yaml(config))
    target.commit(STEPS, partial, {"step": STEPS, "world_size": 1, "identity": "x"})
    return target.folder(STEPS), config, optimizer, model


def test_the_exact_step_is_that_of_the_run(checkpoint: tuple[Path, Any, optimizers.Optimizer, Any]) -> None:
    folder, config, optimizer, model = checkpoint
    first, second = one_step.steps_from(folder, STEPS, ARM, 7)
    assert (first.seed, first.step, first.batch, second.batch) == (7, STEPS, 0, 1)
    # The live run goes on with the same batch.
    from harness import data, schedule
    from harness.loop import set_lr

    corpus = data.check(config.data, config.seq_len, 1, 1, None, say=lambda line: None)
    batches = data.Batches(corpus, config.seq_len, config.seed, config.data.mode)
    ids, labels = (torch.from_numpy(a) for a in batches.rows(STEPS * config.batch_size, config.batch_size))
    optimizer.zero_grad()
    before = one_step.loss(model, ids, labels)
    before.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    set_lr(optimizer, schedule.factor(config.schedule, config.steps)(STEPS))
    optimizer.step()
    assert first.before["batch"] == pytest.approx(before.item(), abs=1e-6)
    with torch.no_grad():
        assert first.after["exact"]["batch"] == pytest.approx(
            float(one_step.loss(model, ids, labels)), abs=1e-6
        )
    # The arms are three different steps.
    assert len({first.after[arm]["batch"] for arm in one_step.ARMS}) == 3
    assert 0.6 < first.length < 1.25


def test_a_large_model_is_left_out(
    checkpoint: tuple[Path, Any, optimizers.Optimizer, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_step, "MOST_PARAMETERS", 10)
    with pytest.raises(one_step.TooLarge, match="more than 10"):
        next(one_step.steps_from(checkpoint[0], STEPS, ARM, 0))
    # Nor is there a step after the last one.
    assert list(one_step.steps_from(checkpoint[0], 4, ARM, 0)) == []


def test_states_of_a_seed_are_no_replicates() -> None:
    def row(seed: int, batch: int, worse: float) -> StepRow:
        after = {
            "exact": {"batch": 1.0},
            "newton_schulz": {"batch": 1.0 + worse},
            "shortened": {"batch": 1.25},
        }
        return StepRow(ARM, seed, 40, batch, {"batch": 2.0}, after, 0.9)

    rows = [row(0, 0, 0.1), row(0, 1, 0.3), row(1, 0, 0.4), row(1, 1, 0.4)]
    (summary,) = findings.step_summaries(rows)
    # Seeds have means 0.2 and 0.4.
    assert (summary.difference.n, summary.states) == (2, 4)
    assert summary.difference.mean == pytest.approx(0.3)
    assert summary.difference.sd == pytest.approx(np.std([0.2, 0.4], ddof=1))
    assert summary.beyond_length.mean == pytest.approx(0.05)
    assert summary.gain == 1.0
    assert not findings.excludes_zero(summary.difference)
    assert math.isfinite(summary.difference.half_width)
