"""Loss and evaluation of classifiers: sums over examples, and the result of every validation example."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from harness.loop import Run
from harness.protocols import Losses
from harness.tasks import metrics
from harness.tasks.example_facts import references_of
from harness.tasks.example_passes import of_examples
from harness.tasks.predictions import Prediction, write

if TYPE_CHECKING:
    from harness.protocols import MicroBatch
    from harness.tasks.classify import Collate
    from harness.tasks.examples import Examples


class ClassificationObjective:
    """Cross-entropy in nats where labels are integers, squared error where they are numbers; sums over examples.

    A sum, as for tokens: means of micro-batches or processes with different numbers of examples would not average to
    the mean of the global batch. Both are computed in fp32 whatever the dtype of the logits.
    """

    def inputs(self, batch: MicroBatch) -> dict[str, Any]:
        """Return the keyword arguments of the model's forward pass."""
        ids, mask, _, *types = batch
        inputs = {"input_ids": ids, "attention_mask": mask}
        return {**inputs, "token_type_ids": types[0]} if types else inputs

    def losses(self, outputs: Any, batch: MicroBatch) -> Losses:
        """Return the losses of a forward pass, as 0-dim fp32 sums over its examples."""
        loss = example_losses(outputs.logits, batch[2]).sum()
        return Losses(loss, loss, None)

    def validation_sums(self, outputs: Any, batch: MicroBatch) -> torch.Tensor:
        """Return the summed loss and the number of examples, ``(2,)`` fp64."""
        losses = example_losses(outputs.logits, batch[2]).double()
        return torch.stack([losses.sum(), torch.full_like(losses.sum(), len(losses))])


def example_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss of each example: ``(n,)`` fp32.

    Args:
        logits: ``(n, classes)``, or ``(n, 1)`` for numbers.
        labels: ``(n,)``: int64 classes, or fp32 numbers.
    """
    if labels.dtype == torch.int64:
        return F.cross_entropy(logits.float(), labels, reduction="none")
    return (logits.float().squeeze(1) - labels).square()


class _Results(NamedTuple):
    """Columns of what is kept of validation examples.

    Attributes:
        loss: of the example.
        predicted: index of the class with the largest logit, or the number.
        probability: softmax of that class; 1 for numbers.
    """

    loss: torch.Tensor
    predicted: torch.Tensor
    probability: torch.Tensor


class ClassificationEvaluator:
    """The `Evaluator` of classifiers: mean loss and metrics over all validation examples.

    Args:
        run: assembled.
        data: of the run.
        collate: makes micro-batches of the validation split.
        names: of the metrics, the one of the run first.
        folder: of the run, in the process that writes it; else None.
    """

    def __init__(
        self, run: Run, data: Examples, collate: Collate, names: list[str], folder: Path | None
    ) -> None:
        self._run, self._data, self._collate, self._names, self._folder = run, data, collate, names, folder

    def figures(self, *, is_last: bool) -> dict[str, float]:
        """Return ``val/loss`` and, on rank 0, ``val/<metric>`` for each metric (a collective)."""
        results = self._results()
        figures = {"val/loss": float(results.loss.mean())}
        if self._run.engine.rank:
            # Rows are written by rank 0 alone, and scikit-learn takes seconds to import.
            return figures
        references = references_of(self._data)
        predictions = self._names_of(results)
        for name in self._names:
            figures[f"val/{name}"] = metrics.score(name, references, predictions, self._data.labels)
        if is_last and self._folder is not None:
            write(self._folder, self._rows(results, references, predictions))
        return figures

    def _results(self) -> _Results:
        """Return the results of all examples, in the order of the split, on every process (a collective)."""
        columns = len(_Results._fields)
        return _Results(*of_examples(self._run, self._data.validation, self._collate, columns, _of_batch))

    def _names_of(self, results: _Results) -> list[str]:
        labels = self._data.labels
        if labels is None:
            return [repr(number) for number in results.predicted.tolist()]
        return [labels[int(index)] for index in results.predicted.tolist()]

    def _rows(self, results: _Results, references: list[str], predictions: list[str]) -> list[Prediction]:
        is_class = self._data.labels is not None
        losses, probabilities = results.loss.tolist(), results.probability.tolist()
        return [
            Prediction(
                example=self._data.validation.row(index),
                reference=reference,
                prediction=prediction,
                correct=reference == prediction if is_class else None,
                loss=losses[index],
                probability=probabilities[index] if is_class else None,
            )
            for index, (reference, prediction) in enumerate(zip(references, predictions, strict=True))
        ]


def _of_batch(outputs: Any, batch: MicroBatch) -> _Results:
    logits, labels = outputs.logits, batch[2]
    losses = example_losses(logits, labels)
    if labels.dtype != torch.int64:
        numbers = logits.double().squeeze(1)
        return _Results(losses, numbers, torch.ones_like(numbers))
    probability, predicted = logits.double().softmax(1).max(1)
    return _Results(losses, predicted, probability)
