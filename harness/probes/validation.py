"""Evaluations: when they are due, of which weights, and the loss on a fixed set of validation tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from harness.config import derived_defaults
from harness.loop import Run
from harness.protocols import Engine, Evaluator, MetricRow, Objective
from harness.tracked_optimizer import tracked

if TYPE_CHECKING:
    from harness.protocols import MicroBatch


class ValidationRows(Protocol):
    """Rows of the validation split."""

    def count(self, tokens: int) -> int:
        """Return how many rows, from the first, hold ``tokens`` loss tokens."""
        ...

    def rows(self, start: int, count: int) -> MicroBatch:
        """Return ``count`` rows from row ``start`` on, on this process' device."""
        ...


class Evaluation:
    """Adds what an evaluator measures, ``val/loss`` among it, every ``eval.every`` steps and at the end.

    Where the optimizer keeps an average of the weights, it is that of the average. The last evaluation also adds
    ``val/raw_loss``, that of the weights themselves: a second pass each time would double what evaluation costs.

    Args:
        run: assembled.
        evaluator: of the run's task.
        examples: that it reads in an evaluation, where it is due by their number.
    """

    def __init__(self, run: Run, evaluator: Evaluator, examples: int | None = None) -> None:
        self._run, self._evaluator = run, evaluator
        self._every = derived_defaults.evaluation_interval(run.config, examples)
        self.best: float | None = None
        self.last: tuple[int, float | None] = (0, None)
        """Steps done at the last evaluation, and what it gave (None where that was not finite)."""

    def due(self, step: int) -> bool:
        return step + 1 == self._run.config.steps or (
            self._every is not None and (step + 1) % self._every == 0
        )

    def before_update(self, step: int) -> None:
        """Do nothing: validation runs after the step."""

    def measure(self, step: int, row: MetricRow) -> None:
        run, is_last = self._run, step + 1 == self._run.config.steps
        with run.clock.part("probes"), run.memory.phase("evaluation"):
            if tracked(run.optimizer).keeps_average:
                if is_last:
                    row["val/raw_loss"] = self._evaluator.figures(is_last=False)["val/loss"]
                with averaged_weights(run):
                    figures = self._evaluator.figures(is_last=is_last)
            else:
                figures = self._evaluator.figures(is_last=is_last)
        row.update(figures)
        loss = figures["val/loss"]
        if self.best is None or loss < self.best:
            self.best = loss
        self.last = (step + 1, loss if math.isfinite(loss) else None)

    def state(self) -> dict[str, Any]:
        """Return the best loss so far."""
        return {"best": self.best}

    def restore(self, state: dict[str, Any], steps: int) -> None:
        """Continue from the best loss of an earlier process."""
        self.best = state["best"]


class TokenLoss:
    """The `Evaluator` of pretraining: mean loss of a fixed number of validation tokens, and its perplexity.

    Args:
        run: assembled.
        validation: rows to evaluate on.
    """

    def __init__(self, run: Run, validation: ValidationRows) -> None:
        self._run, self._validation = run, validation
        self._rows = validation.count(derived_defaults.evaluation_tokens(run.config))

    def figures(self, *, is_last: bool) -> dict[str, float]:
        """Return ``val/loss`` and ``val/perplexity`` (a collective)."""
        run = self._run
        loss = evaluate(
            run.engine,
            run.model,
            run.objective,
            self._validation,
            rows=self._rows,
            micro_batch_size=run.config.micro_batch_size or 1,
        )
        return {"val/loss": loss, "val/perplexity": perplexity(loss)}


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite where that is no fp64 number."""
    return math.exp(loss) if loss < 700 else math.inf


@contextmanager
def averaged_weights(run: Run) -> Iterator[None]:
    """Put the optimizer's averages in the place of the weights inside the context (a collective).

    An exception inside the context brings the weights back, too. What an engine of several processes derives from
    them then stays that of the averages, because the other processes may not have failed.
    """
    is_exchanged = False
    try:
        with tracked(run.optimizer).averaged_weights():
            is_exchanged = True
            run.engine.sync_from_masters()
            yield
    except BaseException:
        # A collective of this process alone would wait for the others, and nobody would see the error.
        if is_exchanged and run.engine.world_size == 1:
            run.engine.sync_from_masters()
        raise
    run.engine.sync_from_masters()


@torch.no_grad()
def evaluate(
    engine: Engine,
    model: torch.nn.Module,
    objective: Objective,
    validation: ValidationRows,
    *,
    rows: int,
    micro_batch_size: int,
) -> float:
    """Return the token-weighted mean loss over the first ``rows`` validation rows (a collective).

    The rows are dealt out to the processes and sums are taken in fp64, so the result does not depend on how.
    A process that holds fewer rows than others repeats one without counting it, because a forward pass of
    sharded weights is itself a collective.
    """
    # Dropout must not change the loss, nor the random numbers of training.
    was_training = model.training
    model.eval()
    try:
        total = torch.zeros(2, dtype=torch.float64, device=engine.device)
        share = -(-rows // engine.world_size)
        end = min((engine.rank + 1) * share, rows)
        with engine.inference() as forward:
            for start in range(engine.rank * share, (engine.rank + 1) * share, micro_batch_size):
                count = min(micro_batch_size, end - start)
                # Forward passes of sharded weights are collectives: every process makes as many.
                batch = validation.rows(start, count) if count > 0 else validation.rows(0, 1)
                with engine.autocast():
                    outputs = forward(**objective.inputs(batch))
                if count > 0:
                    total += objective.validation_sums(outputs, batch)
    finally:
        model.train(was_training)
    loss, tokens = engine.sum(total).tolist()
    return loss / tokens
