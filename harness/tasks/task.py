"""The interface of a task. Importing it imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from harness.config.schema import RunConfig

if TYPE_CHECKING:
    from torch import nn

    from harness.loop import Run
    from harness.model import ClassificationHead
    from harness.protocols import Objective, Probe, Samples

Say = Callable[[str], None]


class TaskData(Protocol):
    """The data of a run, prepared: on the disk, read through a memory map."""

    @property
    def sha256(self) -> str:
        """Return the hash of all that the model reads, and of the split."""
        ...

    @property
    def tokenizer_sha256(self) -> str:
        """Return the hash of the tokenizer."""
        ...

    @property
    def pad_id(self) -> int:
        """Return the token that fills rows."""
        ...


Data = TypeVar("Data", bound=TaskData)


class Task(Protocol[Data]):
    """What a run learns and how it is measured; the loop, the engines and the record know no more than this.

    The methods are called in this order. `prepare` and `check` run before torch is imported, and may run in many
    processes at once.
    """

    def prepare(self, config: RunConfig, say: Say) -> Data:
        """Return the data of a run: from the cache, or built into it.

        Args:
            config: checked; its steps may still follow from `epochs` and the data.
            say: takes a line about what takes long.

        Raises:
            InputError: anything about the data that is wrong.
        """
        ...

    def samples(self, config: RunConfig, data: Data) -> Samples:
        """Return the training samples in the order of the run."""
        ...

    def check(self, config: RunConfig, data: Data) -> None:
        """Refuse what does not fit together, now that the steps are known.

        Raises:
            InputError: see the task.
        """
        ...

    def resolve(self, config: RunConfig, data: Data) -> RunConfig:
        """Return the configuration with what the data decide, such as the classes: a function of data and keys."""
        ...

    def context_length(self, config: RunConfig, data: Data) -> float:
        """Return the tokens of the row that a training token is in, on average over tokens: what attention costs."""
        ...

    def head(self, config: RunConfig, data: Data) -> ClassificationHead | None:
        """Return what the model ends in; None: the head of a language model."""
        ...

    def objective(self, config: RunConfig, network: nn.Module) -> Objective:
        """Return what is minimized."""
        ...

    def evaluation(self, run: Run, data: Data, folder: Path | None) -> Probe:
        """Return the probe that evaluates the model on the validation data.

        Args:
            run: assembled.
            data: from `prepare`.
            folder: of the run, in the process that writes it; else None.
        """
        ...

    def facts(self, data: Data) -> Mapping[str, Any]:
        """Return what `summary.json` says of the data."""
        ...

    def warnings(self, data: Data) -> Sequence[str]:
        """Return what a user should know about the data, one line each."""
        ...

    def describe(self, config: RunConfig, data: Data) -> str:
        """Return one line about the data for the log."""
        ...
