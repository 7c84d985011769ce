"""What the Newton-Schulz error costs in one step: exact and approximate factors of the same gradients, from one state.

From a checkpoint's weights, optimizer state and next batches the run's own optimizer takes the step three times:

- exact: with the exact polar factor,
- newton_schulz: with five Newton-Schulz steps of the same moment,
- shortened: the exact step, with each matrix' orthogonal part scaled by the length that the approximate one has along
  it, c = ⟨O_NS, O⟩/⟨O, O⟩. It has the approximation's step length, and none of its other errors.

Arithmetic is the rules' own, in fp32; losses are means over tokens, nats, in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import optimizers
from analysis.paper.theory.arms import TheoryArm
from analysis.paper.theory.polar_bound import STEPS
from analysis.paper.theory.run_moments import checkpoints_of, is_exact
from analysis.runs.run import LoadedRun
from harness import data, schedule
from harness import model as models
from harness.checkpoint.contents import WEIGHT
from harness.checkpoint.files import Saved
from harness.checkpoint.store import DamagedCheckpoint
from harness.config.compose import load_file
from harness.config.schema import RunConfig
from harness.loop import set_lr
from harness.model.loss import IGNORED
from optimizers import named_state

BATCHES = 2
"""Next batches that are tried from each state."""
VALIDATION_TOKENS = 2048
MOST_PARAMETERS = 50_000_000
"""Larger models are left out: each state costs about ten passes over the validation tokens."""
ARMS = ("exact", "newton_schulz", "shortened")

Weights = dict[str, Tensor]
Step = Callable[[Mapping[str, Any]], Weights]


class StepRow(NamedTuple):
    """The losses around one step from one state.

    Attributes:
        arm, seed, step, batch: of the state, and which of the next batches gave the gradients.
        before: split → loss before the step; splits are ``batch`` (the gradients' own) and ``validation``.
        after: arm → split → loss after the step.
        length: mean over matrices of c.
    """

    arm: TheoryArm
    seed: int
    step: int
    batch: int
    before: dict[str, float]
    after: dict[str, dict[str, float]]
    length: float


def step_rows(runs: Sequence[LoadedRun], arms: Mapping[Path, TheoryArm], notes: list[str]) -> list[StepRow]:
    """Take the steps from all checkpoints of runs with an exact factor.

    Args:
        runs: finished.
        arms: run folder → arm (`arms_of`).
        notes: receives a line for each run that is left out.
    """
    rows = []
    for run in runs:
        if not is_exact(run):
            continue
        for step, folder in checkpoints_of(run):
            try:
                rows += list(steps_from(folder, step, arms[run.folder], run.seed))
            except (DamagedCheckpoint, TooLarge) as error:
                notes.append(f"{run.where}: no steps are taken from step {step}: {error}")
                break
    return rows


class TooLarge(Exception):
    """A model has more parameters than is tried here."""


def steps_from(folder: Path, step: int, arm: TheoryArm, seed: int) -> Iterator[StepRow]:
    """Yield a row for each of the next batches of a checkpoint.

    Args:
        folder: of the checkpoint.
        step: steps taken.
        arm, seed: of its run.

    Raises:
        TooLarge: more than `MOST_PARAMETERS`.
        DamagedCheckpoint: a tensor is missing.
    """
    config = load_file(folder / "config.yaml")
    if step >= config.steps:
        # The schedule has no rate for a step after the last one.
        return
    saved = Saved(folder)
    try:
        model = models.build(
            config.model, seed=0, trust_remote_code=config.trust_remote_code, weights=False
        ).float()
        count = sum(parameter.numel() for parameter in model.parameters())
        if count > MOST_PARAMETERS:
            raise TooLarge(f"{count:,} parameters, more than {MOST_PARAMETERS:,}")
        start = {
            name: saved.whole(name, WEIGHT).float()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        corpus = data.check(config.data, config.seq_len, 1, 1, None, say=lambda line: None)
        training = data.Batches(corpus, config.seq_len, config.seed, config.data.mode)
        validation = data.Validation(corpus, config.seq_len, config.data.mode)
        held_out = _tensors(
            validation.batch(0, min(validation.length, -(-VALIDATION_TOKENS // config.seq_len)))
        )
        for batch in range(BATCHES):
            rows = _tensors(training.rows((step + batch) * config.batch_size, config.batch_size))
            splits = {"batch": rows, "validation": held_out}
            take = _stepper(config, model, start, _gradients(config, model, start, rows), saved, step)
            before = _losses(model, start, splits)
            weights, length = three_steps(take, start, config.optimizer.options)
            after = {name: _losses(model, w, splits) for name, w in weights.items()}
            yield StepRow(arm, seed, step, batch, before, after, length)
    finally:
        saved.close()


def three_steps(take: Step, start: Weights, options: Mapping[str, Any]) -> tuple[dict[str, Weights], float]:
    """Return the weights after each arm's step, and the mean length c of the approximate factor along the exact one.

    Args:
        take: option overrides → weights after one step from the same state with the same gradients.
        start: weights before.
        options: of the run.
    """
    exact = take({"orthogonalizer": "auto"})
    approximate = take({"orthogonalizer": "newton_schulz", "orthogonalizer_steps": STEPS})
    # The orthogonal part alone: no gradient outside the subspace, no decay.
    bare = {"orthogonalizer": "auto", "weight_decay": 0.0}
    if "residual" in options:
        bare |= {"residual": "drop", "residual_scale": 0.0}
    orthogonal = take(bare)
    shortened, lengths = {}, []
    for name, weight in exact.items():
        difference = (approximate[name] - weight).double()
        part = (orthogonal[name] - start[name]).double()
        shortened[name] = weight
        if difference.any():
            excess = float((difference * part).sum() / part.square().sum())
            lengths.append(1.0 + excess)
            shortened[name] = (weight.double() + excess * part).to(weight.dtype)
    length = float(np.mean(lengths)) if lengths else math.nan
    return {"exact": exact, "newton_schulz": approximate, "shortened": shortened}, length


def _stepper(
    config: RunConfig, model: nn.Module, start: Weights, gradients: Weights, saved: Saved, step: int
) -> Step:
    def take(overrides: Mapping[str, Any]) -> Weights:
        _load(model, start)
        section = config.optimizer
        optimizer = optimizers.build(
            section.name,
            model.named_parameters(),
            modules=model,
            lr=section.lr,
            **{**section.options, **overrides},
        )
        assert isinstance(optimizer, optimizers.Optimizer)
        named_state.load(optimizer, saved.facts[0]["optimizer"]["steps"], saved.read)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone() if name in gradients else None
        set_lr(optimizer, schedule.factor(config.schedule, config.steps)(step))
        optimizer.step()
        return {name: p.detach().clone() for name, p in model.named_parameters() if name in start}

    return take


def _gradients(config: RunConfig, model: nn.Module, start: Weights, rows: tuple[Tensor, Tensor]) -> Weights:
    """Return the gradients of a batch at the weights `start`, clipped as in the run."""
    _load(model, start)
    model.zero_grad(set_to_none=True)
    model.train()
    loss(model, *rows).backward()
    if config.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def _load(model: nn.Module, weights: Weights) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])


def _losses(
    model: nn.Module, weights: Weights, splits: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, float]:
    _load(model, weights)
    model.eval()
    with torch.no_grad():
        return {name: float(loss(model, *rows)) for name, rows in splits.items()}


def loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the labels (rows, seq_len) that are not ignored."""
    scores = model(input_ids=ids).logits
    return nn.functional.cross_entropy(scores.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


def _tensors(rows: tuple[np.ndarray, ...]) -> tuple[Tensor, Tensor]:
    ids, labels = (torch.from_numpy(array) for array in rows)
    return ids, labels
