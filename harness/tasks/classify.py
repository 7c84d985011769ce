"""A class or a number for a text, or for a pair of texts. Importing it imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.config.model_facts import full_config
from harness.config.schema import RunConfig
from harness.data import Order
from harness.errors import InputError
from harness.tasks import example_facts
from harness.tasks.examples import Examples, ExampleSplit, prepare_examples
from harness.tasks.samples import ExampleSamples, pad, padded_length
from harness.tasks.task import Say

if TYPE_CHECKING:
    from torch import nn

    from harness.loop import Run
    from harness.model import ClassificationHead
    from harness.protocols import Objective, Probe


class Classify:
    """A `Task`: cross-entropy of the class, or the squared error of the number, summed over examples."""

    def prepare(self, config: RunConfig, say: Say) -> Examples:
        """Return the tokenized examples of both splits."""
        return prepare_examples(config, say)

    def samples(self, config: RunConfig, data: Examples) -> ExampleSamples:
        """Return the training examples in the order of the run."""
        order = Order(data.sha256, config.seed, len(data.train))
        micro = config.micro_batch_size or config.batch_size
        return ExampleSamples(data.train, order, config.batch_size, micro, Collate(data.train, data, config))

    def check(self, config: RunConfig, data: Examples) -> None:
        """Refuse data that cannot be learned from or measured, and a vocabulary larger than the model's.

        Raises:
            InputError: one number only, a batch larger than an epoch, an undefined metric.
        """
        labels = data.train.labels
        if data.labels is None and labels.min() == labels.max():
            reason = f"is {labels[0]} in all {len(labels):,} training examples: nothing can be learned"
            raise InputError("task.label", config.task.label, reason, fix="data with different numbers")
        example_facts.check(config, data)

    def resolve(self, config: RunConfig, data: Examples) -> RunConfig:
        """Return the configuration with the classes and the metric that were found."""
        found = {
            "labels": None if data.labels is None else list(data.labels),
            "target": "number" if data.labels is None else "class",
            "metric": example_facts.metric_of(config, data),
        }
        return config.model_copy(update={"task": config.task.model_copy(update=found)})

    def context_length(self, config: RunConfig, data: Examples) -> float:
        """Return the length of the example that a token is in, on average over training tokens."""
        return example_facts.context_length(data)

    def head(self, config: RunConfig, data: Examples) -> ClassificationHead:
        """Return the head with one output a class, or one for a number."""
        from harness.model import ClassificationHead

        return ClassificationHead(data.labels, data.pad_id)

    def objective(self, config: RunConfig, network: nn.Module) -> Objective:
        """Return cross-entropy or squared error, which the outputs of the model tell apart."""
        from harness.tasks.classification import ClassificationObjective

        return ClassificationObjective()

    def evaluation(self, run: Run, data: Examples, folder: Path | None) -> Probe:
        """Return the probe of the validation loss and metrics, which writes predictions.parquet in the end."""
        from harness.probes.validation import Evaluation
        from harness.tasks.classification import ClassificationEvaluator

        names = example_facts.metrics_of(run.config, data)
        collate = Collate(data.validation, data, run.config)
        evaluator = ClassificationEvaluator(run, data, collate, names, folder)
        return Evaluation(run, evaluator, len(data.validation))

    def facts(self, data: Examples) -> Mapping[str, Any]:
        """Return the classes and the number of examples."""
        return example_facts.facts(data)

    def warnings(self, data: Examples) -> Sequence[str]:
        """Return what was left out and truncated, and validation texts that are also training texts."""
        return data.warnings

    def describe(self, config: RunConfig, data: Examples) -> str:
        """Return the number of examples, the metric and the classes in one line."""
        classes = "numbers" if data.labels is None else f"{len(data.labels)} classes"
        return f"{example_facts.describe(config, data)}; {classes}"


class Collate:
    """Makes the micro-batches of a classifier: ids, attention mask, labels, and token types where the model reads them.

    Args:
        split: of the examples.
        data: that it is a split of.
        config: of the run.
    """

    def __init__(self, split: ExampleSplit, data: Examples, config: RunConfig) -> None:
        self._split, self._pad_id, self._seq_len = split, data.pad_id, config.seq_len
        self._label_type = np.int64 if data.labels is not None else np.float32
        # BERT has an embedding for either text of a pair; models without one refuse the argument.
        self._has_types = (full_config(config.model).get("type_vocab_size") or 0) > 1

    def __call__(self, indices: Sequence[int]) -> tuple[np.ndarray, ...]:
        """Return ids and mask, (n, length) int64, labels, (n,) int64 or float32, and types as the ids."""
        rows = [self._split.ids(index) for index in indices]
        length = padded_length(max(map(len, rows)), self._seq_len)
        ids, mask = pad(rows, length, self._pad_id), pad([np.ones_like(row) for row in rows], length, 0)
        labels = self._split.labels[list(indices)].astype(self._label_type)
        if not self._has_types:
            return ids, mask, labels
        return ids, mask, labels, pad([self._split.type_ids(index) for index in indices], length, 0)
