"""What `optbench memorize` has found about the runs of a set, for a column of its table.

It is read from the file of that command, which measures checkpoints and takes longer than a report. A number is shown
for an optimizer if the file is of the runs that the set has: their mean final loss is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from analysis.comparison.sets import ComparisonSet
from harness.record import readers

FILE = "memorize.json"
"""In the folder of the runs."""


class MemorizationMean(BaseModel):
    """A measure of one optimizer at a validation loss, mean over seeds with a 95 % t-interval."""

    optimizer: str
    mean: float | None
    low: float | None
    high: float | None
    seeds: int


class _Entry(BaseModel):
    val_loss: float
    measure: str = Field(pattern=r"^(exposure_\d{1,9}|[a-z_]+)$")
    optimizers: list[MemorizationMean]


class _Cost(BaseModel):
    optimizer: str
    final_val_loss: float | None


class _Document(BaseModel):
    comparison_key: str
    comparison: list[_Entry]
    costs: list[_Cost]


class SetMemorization(BaseModel):
    """How much the models of a set memorized at equal validation loss.

    Attributes:
        val_loss: at which they are compared, nats/token: the lowest one of the file.
        copies: of the canaries whose exposure it is, the fewest; None: without canaries it is the membership AUC.
        means: by the label of the arm; arms that the file says nothing about, or whose runs have changed, have none.
        unmeasured: labels of these arms.
    """

    val_loss: float
    copies: int | None
    means: dict[str, MemorizationMean]
    unmeasured: list[str]


def attach(sets: Iterable[ComparisonSet], folders: Iterable[Path], remarks: list[str]) -> None:
    """Give every set what the file in one of the folders says about it.

    Args:
        sets: whose ``memorization`` is set.
        folders: of the runs.
        remarks: receives a line for every file that cannot be read or is of no set.
    """
    by_key = {comparison.key: comparison for comparison in sets}
    for folder in folders:
        content, problems = readers.json_object(folder / FILE)
        name = f"{folder.resolve().name}/{FILE}"
        remarks += problems
        if content is None:
            continue
        try:
            document = _Document.model_validate(content)
        except ValidationError as error:
            place = ".".join(map(str, error.errors()[0]["loc"]))
            remarks.append(
                f"{name} is not used: {place} is missing or wrong; optbench memorize writes it again"
            )
            continue
        comparison = by_key.get(document.comparison_key)
        if comparison is None:
            remarks.append(f"{name} is not used: it is of other runs; optbench memorize measures these")
        elif comparison.memorization is None:
            comparison.memorization = _of_set(comparison, document)


def _of_set(comparison: ComparisonSet, document: _Document) -> SetMemorization | None:
    """Return the first measure at the lowest loss; None where no loss was reached by all runs."""
    entry = min(document.comparison, key=lambda entry: entry.val_loss, default=None)
    if entry is None:
        return None
    finals = {cost.optimizer: cost.final_val_loss for cost in document.costs}
    unchanged = {
        arm.label for arm in comparison.arms if arm.final.n and finals.get(arm.label) == arm.final.mean
    }
    means = {mean.optimizer: mean for mean in entry.optimizers if mean.optimizer in unchanged}
    labels = [arm.label for arm in comparison.arms if arm.final.n and arm.label not in means]
    name, _, copies = entry.measure.partition("_")
    return SetMemorization(
        val_loss=entry.val_loss,
        copies=int(copies) if name == "exposure" else None,
        means=means,
        unmeasured=labels,
    )
