"""Keys of `optbench memorize`. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, Field

from analysis import job_keys
from harness import command_line
from harness.config.overrides import leaves, parse
from harness.config.typed_keys import TypedKeys, format_value, keys_of, unknown, validate
from harness.errors import InputError
from harness.files import atomic


class MemorizeConfig(TypedKeys):
    """What is measured on each checkpoint, and at which validation loss optimizers are compared."""

    model_config = ConfigDict(frozen=True)

    checkpoints: Literal["all", "last"] = "all"
    """Checkpoints of a run that are measured: all of them (needed for a comparison at equal loss), or the last one."""
    windows: int = Field(default=256, ge=8)
    """Training rows, and validation rows, for membership inference and the validation loss, as far as there are any."""
    extracted: int = Field(default=64, ge=2)
    """How many of these training and validation rows are continued greedily."""
    prefix: int = Field(default=32, ge=1)
    """Tokens of a row that are given for its continuation."""
    continuation: int = Field(default=32, ge=1)
    """Tokens that are generated and compared with the row."""
    min_k: float = Field(default=0.2, gt=0, le=1)
    """Share of a row's tokens, the least likely ones, that Min-K % averages."""
    reference: str | None = None
    """Run folder or checkpoint of a model that did not see the training rows: its loss is subtracted."""
    val_loss: list[float] | None = Field(default=None, min_length=1)
    """Validation losses (nats/token) to compare at; null: the lowest one that every run has reached."""


class MemorizeRequest(NamedTuple):
    """A call of `optbench memorize`.

    Attributes:
        places: run folders, or folders of runs.
        config: the keys.
        out: folder of the files; results of single checkpoints are kept below it.
        as_json: print one JSON document.
    """

    places: list[Path]
    config: MemorizeConfig
    out: Path
    as_json: bool


def read(argv: Sequence[str]) -> MemorizeRequest:
    """Parse the arguments.

    Raises:
        InputError: no folder, a folder that does not exist, or a wrong key or value.
    """
    arguments = command_line.parse("memorize", argv)
    places = [Path(name) for name in arguments.names]
    if not places:
        raise InputError("memorize", "nothing", "names no run", fix="optbench memorize runs/GROUP")
    for place in places:
        if not place.is_dir():
            raise InputError("memorize", place, "is not a folder of runs", fix="optbench memorize runs/GROUP")
    if arguments.options.out is None and len(places) > 1:
        raise InputError("--out", "nothing", "is needed for several folders", fix="--out runs/memorize")
    out = Path(arguments.options.out or places[0])
    atomic.check_folder("--out", out, fix="--out runs/memorize")
    return MemorizeRequest(places, load(arguments.overrides), out, arguments.options.json)


def load(overrides: Sequence[str]) -> MemorizeConfig:
    """Parse ``key=value`` overrides.

    Raises:
        InputError: an unknown key, or a value of the wrong type or out of bounds.
    """
    values: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for assignment in parse([job_keys.bracketed(override) for override in overrides], lambda *_: None):
        values |= leaves(assignment.key, assignment.value)
        texts[assignment.key] = assignment.text
    known = list(keys_of(MemorizeConfig))
    for key, value in values.items():
        if key not in known:
            raise unknown(key, value, known)
    return validate(MemorizeConfig, values, texts)


def help_text() -> str:
    """Return every key with default and meaning, one a line, for ``--help``."""
    rows = [f"  {k.name}={format_value(k.default)}  {k.doc}" for k in keys_of(MemorizeConfig).values()]
    return "\n".join(["keys (default; meaning):", *rows])
