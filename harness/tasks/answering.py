"""Evaluation of answers: loss of the reference, and exact match of what greedy decoding gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from harness.data.micro_batches import to_device
from harness.loop import Run
from harness.model import CausalLMObjective
from harness.probes.validation import perplexity
from harness.tasks import example_facts, metrics
from harness.tasks.answer import AnswerBatches, answer_lengths, prompts
from harness.tasks.examples import Examples
from harness.tasks.extraction import extract
from harness.tasks.generation import cut_at, generate
from harness.tasks.predictions import Prediction, write
from harness.tasks.samples import batches_by_length


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

    @torch.no_grad()
    def _losses(self) -> torch.Tensor:
        """Return the loss of each answer in nats, summed over its tokens: ``(examples,)`` fp64 (a collective)."""
        run, engine = self._run, self._run.engine
        objective = run.objective
        assert isinstance(objective, CausalLMObjective)
        split = self._data.validation
        collate = AnswerBatches(split, self._data.pad_id, run.config.seq_len)
        batches = batches_by_length(split.lengths, run.config.micro_batch_size or 1)
        losses = torch.zeros(len(split), dtype=torch.float64, device=engine.device)
        was_training = run.model.training
        # Dropout must not change the result, nor the random numbers of training.
        run.model.eval()
        try:
            with engine.inference() as forward:
                for first in range(0, len(batches), engine.world_size):
                    number = first + engine.rank
                    # A forward pass of sharded weights is a collective: who has no batch repeats one.
                    indices = batches[min(number, len(batches) - 1)]
                    batch = to_device(collate(indices), engine.device)
                    with engine.autocast():
                        outputs = forward(**objective.inputs(batch))
                    if number < len(batches):
                        places = torch.tensor(indices, device=engine.device)
                        losses[places] = objective.row_losses(outputs, batch)
        finally:
            run.model.train(was_training)
        return engine.sum(losses).cpu()

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
