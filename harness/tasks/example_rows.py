"""From rows of the data to texts with a label or an answer, before any tokenizer: what is left out is counted."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from harness.config.schema import RunConfig, TaskConfig
from harness.data.row_files import Wanted
from harness.data.rows import Row, Split, Value, read_rows
from harness.errors import InputError
from harness.tasks.extraction import extract
from harness.tasks.templates import columns_of, fill, text_of


@dataclass
class RawExamples:
    """Examples of a split as text.

    Attributes:
        inputs: one (text,), (first, second) or (prompt,) per example.
        labels: values of the label's column (classify).
        classes: those that the source declares for that column, in its order; empty where it declares none.
        answers: filled answer templates (answer).
        rows: number of each example's row in the source, from 0.
        places: where each row is, for messages.
        read: rows of the source.
        null_rows: rows left out because a value that they need is null.
        blank_rows: rows left out because their input or label is empty or white space.
        without_answer: examples whose answer holds nothing to extract.
    """

    inputs: list[tuple[str, ...]] = field(default_factory=list)
    labels: list[Value] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    read: int = 0
    null_rows: int = 0
    blank_rows: int = 0
    without_answer: int = 0

    def hashes(self) -> list[bytes]:
        """Return a 128-bit hash of each example's input: the same for equal texts, in any split."""
        return [
            hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
            for texts in self.inputs
        ]


def wanted_columns(task: TaskConfig) -> Wanted:
    """Return the columns that a task reads, each with the configuration key that names it.

    Raises:
        InputError: a template that cannot be read, or names no column.
    """
    wanted: dict[str, str] = {}
    if task.name == "classify":
        wanted |= dict.fromkeys(task.text, "task.text")
        if task.label is not None:
            wanted[task.label] = "task.label"
        return wanted
    for key, template in (("task.prompt", task.prompt), ("task.answer", task.answer)):
        columns = columns_of(template or "", key)
        if not columns:
            reason = "names no column: each example would have the same text"
            raise InputError(key, template, reason, fix=f'{key}="{{column}}"')
        for column in columns:
            wanted.setdefault(column, key)
    return wanted


def read_examples(config: RunConfig, split: Split) -> RawExamples:
    """Read the examples of a split.

    Raises:
        InputError: as `harness.data.rows.read_rows`; an answer that is empty, or holds nothing that
            ``task.extract`` finds (one validation answer, or all training answers); no example at all.
    """
    task = config.task
    raw = RawExamples()
    rows = read_rows(config.data, split, wanted_columns(task))
    for row in rows:
        # Tables of numbers spell a missing value as NaN, the one value that differs from itself.
        if any(value is None or value != value for value in row.values()):
            raw.null_rows += 1
            continue
        inputs = _inputs(task, row)
        label = row[task.label] if task.label is not None else None
        is_blank = not any(text.strip() for text in inputs) or (isinstance(label, str) and not label.strip())
        if is_blank:
            raw.blank_rows += 1
            continue
        if task.name == "answer":
            raw.answers.append(_answer(task, row, rows.place))
            if not extract(raw.answers[-1], task.extract):
                if split == "validation":
                    raise _nothing_to_extract(task, raw.answers[-1], rows.place)
                raw.without_answer += 1
        else:
            raw.labels.append(label)
        raw.inputs.append(inputs)
        raw.rows.append(rows.read - 1)
        raw.places.append(rows.place)
    raw.read = rows.read
    raw.classes = rows.classes.get(task.label or "", [])
    if not raw.inputs:
        raise _no_examples(config, split, raw)
    if raw.without_answer == len(raw.inputs):
        raise _nothing_to_extract(task, raw.answers[0], raw.places[0])
    return raw


def draw_shots(config: RunConfig, training: RawExamples, validation: RawExamples) -> list[int]:
    """Return the indices of the worked examples: those of the training data with the lowest hash of their prompt.

    The choice depends on the data alone, neither on the seed nor on the order of the rows. A prompt that is also one
    of the validation data is not drawn: it would give an answer away.

    Raises:
        InputError: ``task.shots`` is more than the training data have.
    """
    taken = set(validation.hashes())
    candidates: dict[bytes, int] = {}
    for index, digest in enumerate(training.hashes()):
        if digest not in taken:
            candidates.setdefault(digest, index)
    if config.task.shots > len(candidates):
        reason = f"is more than the training data have ({len(candidates)} prompts that are not in the validation data)"
        raise InputError("task.shots", config.task.shots, reason, fix=f"task.shots={len(candidates)}")
    return [candidates[digest] for digest in sorted(candidates)[: config.task.shots]]


def with_shots(raw: RawExamples, training: RawExamples, shots: list[int]) -> list[tuple[str, ...]]:
    """Return the prompts of ``raw`` with the worked examples in front, each followed by a blank line."""
    worked = "".join(f"{training.inputs[index][0]}{training.answers[index]}\n\n" for index in shots)
    return [(worked + prompt,) for (prompt,) in raw.inputs]


def _inputs(task: TaskConfig, row: Row) -> tuple[str, ...]:
    if task.name == "classify":
        return tuple(text_of(row[name]) for name in task.text)
    return (fill(task.prompt or "", row),)


def _answer(task: TaskConfig, row: Row, place: str) -> str:
    answer = fill(task.answer or "", row, "task.answer")
    if not answer.strip():
        raise InputError("task.answer", task.answer, f"is empty in {place}", allowed="an answer in every row")
    return answer


def _nothing_to_extract(task: TaskConfig, answer: str, place: str) -> InputError:
    what = "no number after ####" if task.extract == "hashes" else "no number"
    shown = answer if len(answer) <= 60 else f"… {answer[-58:]}"
    others = [how for how in ("hashes", "last_number") if how != task.extract and extract(answer, how)]
    fix = f"task.extract={others[0] if others else 'text'}"
    return InputError(
        "task.extract", task.extract, f"finds {what} in the answer of {place}: {shown!r}", fix=fix
    )


def _no_examples(config: RunConfig, split: Split, raw: RawExamples) -> InputError:
    of_set = {"train": "data.split", "validation": "data.validation_split"}
    of_files = {"train": "data.files", "validation": "data.validation_files"}
    data = config.data
    key = (of_set if data.source == "datasets" else of_files)[split]
    value = getattr(data, key.removeprefix("data."))
    counts = (
        f": of {raw.read:,} rows {raw.null_rows:,} are null and {raw.blank_rows:,} blank" if raw.read else ""
    )
    return InputError(
        key, value, f"holds no example{counts}", allowed="at least one row with text and label or answer"
    )
