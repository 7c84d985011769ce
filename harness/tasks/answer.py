"""The answer to a prompt: trained on its tokens alone, measured by generating it. Importing it imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harness.config.schema import RunConfig
from harness.data import Order
from harness.data.batches import IGNORED
from harness.errors import InputError
from harness.tasks import example_facts
from harness.tasks.examples import Examples, ExampleSplit, prepare_examples
from harness.tasks.samples import ExampleSamples, Ids, pad, padded_length
from harness.tasks.task import Say

if TYPE_CHECKING:
    from torch import nn

    from harness.loop import Run
    from harness.protocols import Objective, Probe


class Answer:
    """A `Task`: cross-entropy of the answer's tokens and its end, and exact match of what greedy decoding gives."""

    def prepare(self, config: RunConfig, say: Say) -> Examples:
        """Return the tokenized prompts and answers of both splits."""
        return prepare_examples(config, say)

    def samples(self, config: RunConfig, data: Examples) -> ExampleSamples:
        """Return the training examples in the order of the run; the loss is divided by tokens of answers."""
        order = Order(data.sha256, config.seed, len(data.train))
        collate = AnswerBatches(data.train, data.pad_id, config.seq_len)
        micro = config.micro_batch_size or config.batch_size
        return ExampleSamples(
            data.train, order, config.batch_size, micro, collate, answer_lengths(data.train)
        )

    def check(self, config: RunConfig, data: Examples) -> None:
        """Refuse answers that could not be generated or measured.

        Raises:
            InputError: see `check_stop`; a batch larger than an epoch, or a metric of another task.
        """
        example_facts.check(config, data)
        check_stop(config, data)

    def resolve(self, config: RunConfig, data: Examples) -> RunConfig:
        """Return the configuration with the metric."""
        metric = example_facts.metric_of(config, data)
        return config.model_copy(update={"task": config.task.model_copy(update={"metric": metric})})

    def context_length(self, config: RunConfig, data: Examples) -> float:
        """Return the length of the example that a token is in, on average over training tokens."""
        return example_facts.context_length(data)

    def head(self, config: RunConfig, data: Examples) -> None:
        """Return None: the head of the language model."""

    def objective(self, config: RunConfig, network: nn.Module) -> Objective:
        """Return next-token prediction, whose labels leave out prompts and padding."""
        from harness.model import CausalLMObjective

        return CausalLMObjective(network, is_padded=True, loss_chunk=config.model.loss_chunk)

    def evaluation(self, run: Run, data: Examples, folder: Path | None) -> Probe:
        """Return the probe of the validation loss and the metric, which writes predictions.parquet in the end."""
        from harness.probes.validation import Evaluation
        from harness.tasks.answering import AnswerEvaluator

        return Evaluation(run, AnswerEvaluator(run, data, folder))

    def facts(self, data: Examples) -> Mapping[str, Any]:
        """Return the number of examples, and the tokens of the longest answer with its eos."""
        return {
            **example_facts.facts(data),
            "longest_answer": {
                name: int(answer_lengths(split).max(initial=0))
                for name, split in (("train", data.train), ("validation", data.validation))
            },
        }

    def warnings(self, data: Examples) -> Sequence[str]:
        """Return what was left out and truncated, and validation prompts that are also training prompts."""
        return data.warnings

    def describe(self, config: RunConfig, data: Examples) -> str:
        """Return the number of examples, the metric, and what generation cuts off in one line."""
        line = f"{example_facts.describe(config, data)} of {config.task.extract}"
        # Without the token that ends an answer, which needs no room.
        longer = int((answer_lengths(data.validation) - 1 > config.task.max_new_tokens).sum())
        if not longer:
            return line
        return (
            f"{line}; {longer:,} validation answers are longer than task.max_new_tokens={config.task.max_new_tokens} "
            "and cannot be generated whole"
        )


class AnswerBatches:
    """Makes micro-batches of prompts with answers, padded on the right.

    Args:
        split: of the examples.
        pad_id: token that fills rows.
        seq_len: longest row.
    """

    def __init__(self, split: ExampleSplit, pad_id: int, seq_len: int) -> None:
        self._split, self._pad_id, self._seq_len = split, pad_id, seq_len

    def __call__(self, indices: Sequence[int]) -> tuple[Ids, Ids, Ids]:
        """Return ids, labels and attention mask, (rows, length) int64 each.

        Labels are shifted: ``labels[t]`` is the token after ``ids[t]``. Tokens of the prompt, and padding, have none.
        """
        rows = [self._split.ids(index) for index in indices]
        # The last token has no successor.
        length = padded_length(max(map(len, rows)) - 1, self._seq_len)
        labels = [row[1:].copy() for row in rows]
        for row, index in zip(labels, indices):
            row[: max(self._split.prompt_length(index) - 1, 0)] = IGNORED
        return (
            pad([row[:-1] for row in rows], length, self._pad_id),
            pad(labels, length, IGNORED),
            pad([np.ones_like(row[1:]) for row in rows], length, 0),
        )


def answer_lengths(split: ExampleSplit) -> NDArray[np.int64]:
    """Return the tokens of every answer with its eos: those that carry loss."""
    # The first token of a row is no label, also where the prompt is empty.
    return split.lengths - np.maximum(split.prompt_lengths, 1)


def prompts(split: ExampleSplit) -> list[Ids]:
    """Return the prompt of every example, as it is continued."""
    return [split.ids(index)[: split.prompt_length(index)] for index in range(len(split))]


def check_stop(config: RunConfig, data: Examples) -> None:
    """Refuse texts at which generation stops that answers hold: those could never be generated whole.

    Raises:
        InputError: naming task.stop, and the row.
    """
    for name, split in (("training", data.train), ("validation", data.validation)):
        for index in range(len(split)) if config.task.stop else ():
            # What ends an answer is no part of it.
            text = split.reference(index).strip()
            if stop := next((stop for stop in config.task.stop if stop in text), None):
                reason = (
                    f"is in the answer of row {split.row(index)} of the {name} data, which would end there"
                )
                raise InputError("task.stop", repr(stop), reason, fix="another text, or task.stop=[]")
