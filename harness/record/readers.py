"""The one reader of each file of a run folder: validated, bounded, and never an exception. Torch-free.

Every reader returns what it could read and a list of problems, one line each. A file that is absent is ``None``
(or empty) without a problem; one that cannot be read at all is ``None`` (or empty) with one. A value of the wrong
type is left out of what is returned, and the rest of its file is kept. `schema.py` describes the files.
"""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from harness.files import bounded
from harness.files.bounded import MIB, JsonDecoder, UnreadableFile, UnreadableValue
from harness.process import heartbeat
from harness.protocols import MetricRow

STATUS, SUMMARY, CONFIG = "status.json", "summary.json", "config.yaml"
METRICS, ENVIRONMENT, PARAMETERS = "metrics.jsonl", "environment.json", "parameters.json"
METRICS_LIMIT = 2048 * MIB
"""Bytes of a metrics.jsonl; a million rows have 1 GB."""
MAX_KEYS = 1_000
"""Different metrics of one run; the table in `schema.py` has 50."""
_LINE_LIMIT = 1 * MIB
_TAIL = 1 << 16
_TEXT_LIMIT = 10_000
SILENT = "sent no heartbeat"
"""In the line about ranks that stalled."""
_LARGEST = 2**53
"""Integers up to here are exact as floats, too."""
_RANK_FILE = re.compile(r"rank_(\d{1,7})\.json")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("no text")
    return value if len(value) <= _TEXT_LIMIT else value[:_TEXT_LIMIT] + "…"


def _number(value: object) -> float | int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("no number")
    return value if math.isfinite(value) else None


def _count(value: object) -> int:
    number = _number(value)
    if number is None or number != int(number) or not 0 <= number <= _LARGEST:
        raise ValueError("no whole number from 0 on")
    return int(number)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("neither true nor false")
    return value


Text = Annotated[str, BeforeValidator(_text)]
Number = Annotated[float | int | None, BeforeValidator(_number)]
"""A number that is not finite reads as None, as the run folder's format says."""
Count = Annotated[int, BeforeValidator(_count)]
Flag = Annotated[bool, BeforeValidator(_flag)]


class Record(BaseModel):
    """An object of a run folder's file; unknown keys are kept as they are. `validated` makes one of any content."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    def facts(self) -> dict[str, Any]:
        """Return the keys that the file holds, without those that were left out."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class Attempt(Record):
    """One attempt in status.json."""

    started: Text | None = None
    ended: Text | None = None
    state: Text = ""
    reason: Text = ""
    first_step: Count = 0
    last_step: Count | None = None
    world_size: Count | None = None


class Status(Record):
    """Contents of status.json as a validated model."""

    schema_version: Number = None
    state: Text = ""
    identity: Text | None = None
    wandb_run_id: Text | None = None
    step: Count | None = None
    steps: Count | None = None
    updated: Text | None = None
    attempts: list[Attempt] = Field(default_factory=list)


Sizes = dict[str, Number]


class TaskResult(Record):
    """A metric of a task in summary.json, at the last step."""

    value: Number = None
    better: Text = ""
    unit: Text = ""


class Summary(Record):
    """summary.json; `harness.record.schema.SUMMARY_KEYS` says what the keys mean."""

    schema_version: Number = None
    state: Text = ""
    reason: Text = ""
    optimizer: Text = ""
    seed: Count | None = None
    identity: Text | None = None
    comparison_key: Text | None = None
    lr: Number = None
    lr_source: Text = ""
    lr_tuned: Flag | None = None
    steps: Count | None = None
    steps_planned: Count | None = None
    tokens: Number = None
    wall_s: Number = None
    world_size: Count | None = None
    val_loss: Number = Field(None, alias="val/loss")
    val_perplexity: Number = Field(None, alias="val/perplexity")
    val_raw_loss: Number = Field(None, alias="val/raw_loss")
    metrics: dict[str, TaskResult] = Field(default_factory=dict)
    train_loss: Number = Field(None, alias="train/loss")
    best_val_loss: Number = None
    skipped_steps: Count | None = None
    resumed_from: list[Count] = Field(default_factory=list)
    tokens_per_s: Number = None
    step_ms: Number = None
    time_s: Sizes = Field(default_factory=dict)
    memory_bytes: Sizes = Field(default_factory=dict)
    state_bytes: Sizes = Field(default_factory=dict)
    optimizer_fallbacks: Count | None = None
    parameters: Number = None
    matrix_parameters: Number = None
    corpus_sha256: Text = ""
    train_tokens_available: Number = None
    epochs: Number = None
    unigram_entropy: Number = None
    device: Text = ""
    engine: Text = ""
    precision: Text = ""
    command: Text = ""
    warnings: list[Text] = Field(default_factory=list)


class Git(Record):
    """The repository that a run was started from."""

    commit: Text = ""
    modified: Flag = False


class RunCertificate(Record):
    """The certificate of a run's cell, as the run recorded it."""

    cell: Any = None
    passed: Flag | None = None
    replay_error: Number = None
    reason: Text = ""
    coverage: Text = ""
    current: Flag | None = None


class Environment(Record):
    """Contents of environment.json as a validated model."""

    python: Text = ""
    system: Text = ""
    packages: dict[str, Text | None] = Field(default_factory=dict)
    device: Text = ""
    world_size: Count | None = None
    git: Git | None = None
    certificate: RunCertificate | None = None


class Parameter(Record):
    """An entry of parameters.json."""

    name: Text = ""
    shape: list[Count] = Field(default_factory=list)
    numel: Count | None = None
    rule: Text = ""
    reason: Text = ""


class Beat(NamedTuple):
    """The last sign of life of a process.

    Attributes:
        step: that the process is in.
        where: file, line and function that it executes; "" if unknown.
        age_s: seconds since it was written.
    """

    step: int
    where: str
    age_s: float


class _Heartbeat(Record):
    step: Count | None = None
    where: Text = ""


R = TypeVar("R", bound=Record)


def status(folder: Path) -> tuple[Status | None, list[str]]:
    """Read status.json of a run folder."""
    return record(folder / STATUS, Status)


def summary(folder: Path) -> tuple[Summary | None, list[str]]:
    """Read summary.json of a run folder."""
    return record(folder / SUMMARY, Summary)


def environment(folder: Path) -> tuple[Environment | None, list[str]]:
    """Read environment.json of a run folder."""
    return record(folder / ENVIRONMENT, Environment)


def record(path: Path, kind: type[R]) -> tuple[R | None, list[str]]:
    """Read a JSON file that holds one object of a kind."""
    content, problems = json_object(path)
    return (None if content is None else validated(content, kind, path.name, problems)), problems


def validated(content: dict[str, Any], kind: type[R], name: str, problems: list[str]) -> R:
    """Return an object of a kind without its wrong values, and add a line about those to ``problems``.

    Args:
        content: plain JSON data; wrong values are deleted from it.
        kind: of the object.
        name: of the file, for the line.
        problems: gets the line.
    """
    wrong: dict[str, str] = {}
    while True:
        try:
            # Each round deletes what is wrong, so the loop ends: fewer values are left.
            value = kind.model_validate(content)
            break
        except ValidationError as error:
            details = error.errors(include_url=False, include_context=False, include_input=False)
            places = {_place(content, detail["loc"]): detail["msg"] for detail in details}
            for place, message in places.items():
                wrong[".".join(map(str, place))] = message.removeprefix("Value error, ")
            # From the back: deleting an entry of a list moves those behind it.
            for place in reversed(places):
                _delete(content, place)
    if wrong:
        shown = "; ".join(f"{key}: {reason}" for key, reason in list(wrong.items())[:3])
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        problems.append(f"{name} holds wrong values, which are left out: {shown}{more}")
    return value


Place = tuple[int | str, ...]


def _place(content: Any, location: Place) -> Place:
    """Return the part of a pydantic location that exists; names of the branches of a union follow it."""
    place: list[int | str] = []
    for step in location:
        if not (step in content if isinstance(content, dict) else _is_index(content, step)):
            break
        content = content[step]
        place.append(step)
    return tuple(place)


def _is_index(content: Any, step: int | str) -> bool:
    return isinstance(content, list) and isinstance(step, int) and step < len(content)


def _delete(content: Any, place: Place) -> None:
    for step in place[:-1]:
        content = content[step]
    del content[place[-1]]


def json_object(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Read a JSON file that holds one object, with values that are not validated further."""
    problems: list[str] = []
    try:
        return _mapping(path, bounded.read_json(path, problems), problems), problems
    except FileNotFoundError:
        return None, []
    except UnreadableFile as error:
        return None, [str(error)]


def config(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Read a config.yaml as a nested mapping; `harness.config.compose.load_file` validates it completely."""
    problems: list[str] = []
    try:
        return _mapping(path, bounded.read_yaml(path, problems), problems), problems
    except FileNotFoundError:
        return None, []
    except UnreadableFile as error:
        return None, [str(error)]


def _mapping(path: Path, content: Any, problems: list[str]) -> dict[str, Any] | None:
    if isinstance(content, dict):
        return content
    problems.append(f"{path.name} holds no object")
    return None


def parameters(folder: Path) -> tuple[list[Parameter], list[str]]:
    """Read parameters.json of a run folder; entries that are not objects are left out."""
    path, problems = folder / PARAMETERS, []
    try:
        content = bounded.read_json(path, problems)
    except FileNotFoundError:
        return [], []
    except UnreadableFile as error:
        return [], [str(error)]
    entries = content if isinstance(content, list) else []
    kept = [entry for entry in entries if isinstance(entry, dict)]
    if not isinstance(content, list) or len(kept) < len(entries):
        problems.append(f"{path.name} holds something else than a list of objects")
    wrong: list[str] = []
    parameters = [validated(entry, Parameter, path.name, wrong) for entry in kept]
    if wrong:
        more = len(wrong) - 1
        others = f" (and in {more} more {'entry' if more == 1 else 'entries'})" if more else ""
        problems.append(f"{wrong[0]}{others}")
    return parameters, problems


def metrics(path: Path) -> tuple[list[MetricRow], list[str]]:
    """Read the rows of a metrics.jsonl, in their order; each has a whole ``step`` from 0 on.

    Lines that are no such row are skipped and counted, wherever they are. In a row, a value that is not a number is
    left out and counted; one that is not finite is None.

    Args:
        path: of metrics.jsonl or of the rows of an earlier attempt.
    """
    try:
        content = bounded.read_bytes(path, METRICS_LIMIT)
    except FileNotFoundError:
        return [], []
    except UnreadableFile as error:
        return [], [str(error)]
    return _rows(content, path.name)


def last_rows(path: Path) -> list[MetricRow]:
    """Read the rows in the last 64 KiB of a metrics.jsonl; lines that cannot be read are skipped."""
    try:
        content = bounded.read_bytes(path, _TAIL, tail=True)
    except (FileNotFoundError, UnreadableFile):
        return []
    return _rows(content, path.name)[0]


def _rows(content: bytes, name: str) -> tuple[list[MetricRow], list[str]]:
    lines = content.split(b"\n")
    decoder, rows, keys = JsonDecoder(), [], set()
    skipped: dict[int, str] = {}
    # Counted by key: a million bad lines must not make a million messages.
    wrong: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row, strange = _row(line, decoder)
        except UnreadableValue as error:
            skipped[number] = str(error)
            continue
        for key in strange:
            wrong[key] = wrong.get(key, 0) + 1
        if not row.keys() <= keys:
            # A file with a new key in each row would make a table of rows × rows numbers.
            row = {key: value for key, value in row.items() if key in keys or len(keys) < MAX_KEYS}
            keys |= row.keys()
        rows.append(row)
    return rows, [*_skipped(skipped, len(lines), name), *_repeated(decoder, name), *_wrong(wrong, name)]


def _row(line: bytes, decoder: JsonDecoder) -> tuple[MetricRow, list[str]]:
    """Return one row, and its keys whose values are left out."""
    if len(line) > _LINE_LIMIT:
        raise UnreadableValue("the line is too long")
    try:
        content = decoder.decode(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise UnreadableValue("not UTF-8") from None
    if not isinstance(content, dict):
        raise UnreadableValue("no object")
    row: MetricRow = {}
    strange: list[str] = []
    for key, value in content.items():
        try:
            row[key] = _count(value) if key == "step" else _number(value)
        except ValueError:
            if key == "step":
                raise UnreadableValue("its step is not a whole number ≥ 0") from None
            strange.append(key)
    if "step" not in row:
        raise UnreadableValue("it has no step")
    return row, strange


def _skipped(skipped: dict[int, str], lines: int, name: str) -> list[str]:
    if not skipped:
        return []
    first, reason = next(iter(skipped.items()))
    if list(skipped) == [lines]:  # a whole row ends with a line feed, behind which split finds an empty line
        return [f"the last line of {name} is torn (the run was killed while writing it)"]
    if len(skipped) == 1:
        return [f"1 line of {name} can't be read and is skipped: line {first} ({reason})"]
    return [
        f"{len(skipped)} lines of {name} can't be read and are skipped; the first is line {first} ({reason})"
    ]


def _repeated(decoder: JsonDecoder, name: str) -> list[str]:
    keys = dict.fromkeys(decoder.repeated)
    return (
        [f"rows of {name} give {', '.join(map(ascii, list(keys)[:3]))} twice: the last one is used"]
        if keys
        else []
    )


def _wrong(wrong: dict[str, int], name: str) -> list[str]:
    if not wrong:
        return []
    shown = ", ".join(f"{key!a} in {count}" for key, count in list(wrong.items())[:3])
    more = f" and {len(wrong) - 3} more keys" if len(wrong) > 3 else ""
    return [f"rows of {name} hold values that are not numbers, which are left out: {shown}{more}"]


def heartbeats(folder: Path) -> tuple[dict[int, Beat], list[str]]:
    """Read the last sign of life of every process of a run, by rank."""
    beats: dict[int, Beat] = {}
    problems: list[str] = []
    try:
        paths = sorted((folder / heartbeat.FOLDER).glob("rank_*.json"))
    except OSError as error:
        return {}, [f"{heartbeat.FOLDER} can't be read ({error.strerror or error})"]
    for path in paths:
        matched = _RANK_FILE.fullmatch(path.name)
        if matched is None:
            continue
        beat, own = record(path, _Heartbeat)
        problems += own
        try:
            # By the files' times: one file server stamps them all, while the clocks of nodes differ.
            age_s = time.time() - path.stat().st_mtime
        except OSError:
            continue  # the run was removed or begun anew meanwhile
        if beat is not None and beat.step is not None:
            beats[int(matched[1])] = Beat(beat.step, beat.where, age_s)
    return beats, problems


def stalled_ranks(folder: Path) -> str:
    """Return one line about ranks without a sign of life while others gave one; "" if there are none.

    Such a process was stopped or killed, or its node is gone.
    """
    beats, _ = heartbeats(folder)
    youngest = min((beat.age_s for beat in beats.values()), default=0.0)
    late = {
        rank: beat for rank, beat in sorted(beats.items()) if beat.age_s > youngest + 2 * heartbeat.BEAT_S
    }
    return "; ".join(
        f"rank {rank} {SILENT} for {beat.age_s:.0f} s, since step {beat.step} ({beat.where})"
        for rank, beat in late.items()
    )
