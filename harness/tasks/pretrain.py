"""Next-token prediction on a corpus. Importing it imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import data as corpora
from harness.config import derived_defaults
from harness.config.model_facts import facts
from harness.config.schema import RunConfig
from harness.data import Batches, Corpus, Validation
from harness.tasks.task import Say

if TYPE_CHECKING:
    from torch import nn

    from harness.loop import Run
    from harness.model import ClassificationHead
    from harness.protocols import Objective, Probe


class Pretrain:
    """A `Task`: cross-entropy of every next token, and its mean over a fixed number of validation tokens."""

    def prepare(self, config: RunConfig, say: Say) -> Corpus:
        """Return the corpus, which suffices for the batch and fits the model; see `harness.data.check`."""
        return corpora.check(
            config.data,
            config.seq_len,
            config.batch_size,
            # Only `check` knows it where the steps follow from the data.
            None,
            facts(config.model).vocab_size,
            say=say,
            trust_remote_code=config.trust_remote_code,
        )

    def samples(self, config: RunConfig, data: Corpus) -> Batches:
        """Return rows of the training split."""
        return Batches(data, seq_len=config.seq_len, seed=config.seed, mode=config.data.mode)

    def check(self, config: RunConfig, data: Corpus) -> None:
        """Refuse an evaluation on more tokens than the validation split has."""
        corpora.check_evaluation(
            data, config.seq_len, config.data.mode, derived_defaults.evaluation_tokens(config)
        )

    def resolve(self, config: RunConfig, data: Corpus) -> RunConfig:
        """Return the configuration unchanged."""
        return config

    def context_length(self, config: RunConfig, data: Corpus) -> float:
        """Return the length of all rows: padding is computed, too."""
        return config.seq_len

    def head(self, config: RunConfig, data: Corpus) -> ClassificationHead | None:
        """Return None: the model is a language model."""
        return None

    def objective(self, config: RunConfig, network: nn.Module) -> Objective:
        """Return the cross-entropy of the next token."""
        from harness.model import CausalLMObjective

        return CausalLMObjective(
            network, is_padded=config.data.mode == "padded", loss_chunk=config.model.loss_chunk
        )

    def evaluation(self, run: Run, data: Corpus, folder: Path | None) -> Probe:
        """Return the probe of the validation loss."""
        from harness.data.micro_batches import ValidationLoader
        from harness.probes.validation import Evaluation, TokenLoss

        config = run.config
        rows = Validation(data, seq_len=config.seq_len, mode=config.data.mode)
        return Evaluation(run, TokenLoss(run, ValidationLoader(rows, run.engine.device)))

    def facts(self, data: Corpus) -> Mapping[str, Any]:
        """Return the size and the unigram entropy of the training split."""
        return {
            "labels": None,
            "examples": None,
            "train_tokens_available": data.train_tokens,
            "unigram_entropy": data.unigram_entropy,
        }

    def warnings(self, data: Corpus) -> list[str]:
        """Return nothing: the log line says what was left out."""
        return []

    def describe(self, config: RunConfig, data: Corpus) -> str:
        """Return size, entropy and evaluation of the corpus in one line."""
        return (
            f"corpus {data.sha256[:12]}: {data.train_tokens:,} training tokens, unigram entropy "
            f"{data.unigram_entropy:.3f} nats; evaluation on {derived_defaults.evaluation_tokens(config):,} tokens"
            f"{data.left_out}"
        )
