"""No name leads out of the folder of its group, whichever key it comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config import checks, compose, value_formats
from harness.config.schema import RunConfig
from harness.errors import InputError
from harness.record.folder import path_of

BAD = [
    "../x",
    "../../../x",
    "/tmp/x",
    "a/b",
    "..",
    ".",
    "",
    " a",
    "a\\b",
    "a\nb",
    "\x1b[2J",
    "x" * 201,
    "é" * 101,
    "a\u202eb",
]
GOOD = ["mine", "a b", "run=1", "v1.2", "ü-β", "😀", "-x", ".hidden"]


def folder(**changes: object) -> Path:
    config = checks.check(RunConfig.model_validate({"world_size": 1, **changes}), {}, 0)
    return path_of(config, "0123456789abcdef")


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_a_bad_name_is_refused_in_every_place(name: str) -> None:
    for changes in (
        {"name": name},
        {"group": name},
        {"model": {**compose.load([]).model.model_dump(), "name": name}},
        {"optimizer": {"name": name, "target": "torch.optim.SGD", "lr": 0.1}},
    ):
        with pytest.raises(InputError):
            folder(**changes)


@pytest.mark.parametrize("name", GOOD)
def test_a_good_name_stays_as_typed(name: str) -> None:
    assert folder(name=name, group=name) == Path("runs") / name / name
    value_formats.check_folder_name("name", name)


def test_a_name_of_parts_that_is_too_long_as_a_whole_is_refused() -> None:
    model = {**compose.load([]).model.model_dump(), "name": "m" * 190}
    with pytest.raises(InputError, match="at most 200 bytes"):
        folder(model=model)
    assert folder(model=model, name="short").name == "short"


def test_the_path_as_a_whole_has_a_limit() -> None:
    with pytest.raises(InputError, match="too long"):
        value_formats.check_run_folder(Path("/x" * 2000) / "group/name", Path("/x" * 2000) / "group")
    with pytest.raises(InputError, match="is not a folder in"):
        value_formats.check_run_folder(Path("runs/group/../../x"), Path("runs/group"))
