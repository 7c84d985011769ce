"""Evaluation of answers: loss of the reference, and exact match of what greedy decoding gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from harness.loop import Run
from harness.model import CausalLMObjective
from harness.probes.validation import perplexity
from harness.tasks import example_facts, metrics
from harness.tasks.answer import AnswerBatches, answer_lengths, prompts
from harness.tasks.example_passes import of_examples
from harness.tasks.examples import Examples
from harness.tasks.extraction import extract
from harness.tasks.generation import cut_at, generate
from harness.tasks.predictions import Prediction, write


class AnswerEvaluator:
    """The `Evaluator` of answers, over all validation examples.

    Args:
        run: assembled.
        data: of the run.
        folder: of the run, in the process that writes it; else None.
    """

    def __init__(self, run: Run, data: Examples, folder: Path | None) -> None:
        self._run, self._data, self._folder = run, data, folder
        self._tokenizer = Tokenizer.from_file(str(data.tokenizer_folder / "tokenizer.json"))

    def figures(self, *, is_last: bool) -> dict[str, float]:
        """Return ``val/loss`` per token of answers, ``val/perplexity``, and ``val/<metric>`` where it is due.

        A collective; the processes return the same.
        """
        config, split = self._run.config, self._data.validation
        losses = self._losses()
        loss = float(losses.sum()) / int(answer_lengths(split).sum())
        figures = {"val/loss": loss, "val/perplexity": perplexity(loss)}
        # The loss of raw weights at the end, next to that of their average, needs no answers.
        is_between = self._run.state.step < config.steps
        if not is_last and not (is_between and config.task.generate == "every"):
            return figures
        texts = self._answers()
        how = config.task.extract
        references = [extract(split.reference(index), how) for index in range(len(split))]
        found = [extract(text, how) or None for text in texts]
        for metric in example_facts.metrics_of(config, self._data):
            figures[f"val/{metric}"] = metrics.score(metric, references, found)
        if is_last and self._folder is not None:
            rows = zip(references, found, losses.tolist(), texts, strict=True)
            predictions = [
                Prediction(split.row(index), reference, answer, reference == answer, loss, text=text)
                for index, (reference, answer, loss, text) in enumerate(rows)
            ]
            write(self._folder, predictions)
        return figures

    def _losses(self) -> torch.Tensor:
        """Return the loss of each answer in nats, summed over its tokens: ``(examples,)`` fp64 (a collective)."""
        run, split = self._run, self._data.validation
        objective = run.objective
        assert isinstance(objective, CausalLMObjective)
        collate = AnswerBatches(split, self._data.pad_id, run.config.seq_len)
        return of_examples(
            run, split, collate, 1, lambda outputs, batch: [objective.row_losses(outputs, batch)]
        )[0]

    def _answers(self) -> list[str]:
        """Return the text that continues each validation prompt, up to where it ends (a collective)."""
        run, task = self._run, self._run.config.task
        tokens = generate(
            run.engine,
            run.model,
            prompts(self._data.validation),
            max_new_tokens=task.max_new_tokens,
            eos_id=self._data.eos_id,
            batch_size=task.generation_batch_size,
            stop=task.stop,
            decode=self._decode,
        )
        return [cut_at(text, task.stop) for text in self._decode(tokens)]

    def _decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return self._tokenizer.decode_batch([list(row) for row in rows], skip_special_tokens=True)
