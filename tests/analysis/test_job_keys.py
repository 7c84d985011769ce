"""The base of the keys of companion jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from analysis import job_keys
from analysis.job_keys import JobKeys
from harness.config.typed_keys import TypedKeys
from harness.errors import InputError


class Attack(TypedKeys):
    steps: int = Field(default=10, ge=0)
    """Steps of the attack."""


class Keys(JobKeys):
    mode: Literal["toy", "flow"] = "toy"
    """What runs."""
    widths: list[Annotated[int, Field(ge=1)]] = Field(default_factory=lambda: [64])
    """Units of hidden layers."""
    start: Any = None
    """First layer."""
    name: str | None = None
    """Of the folder."""
    attack: Attack = Field(default_factory=Attack)


def read(*overrides: str) -> Keys:
    defaults = lambda values: {"attack.steps": 0} if values.get("mode") == "flow" else {}  # noqa: E731
    optimizers = {"optimizer": "", "adam": "adam"}
    return job_keys.read(Keys, overrides, command="margin", optimizers=optimizers, defaults=defaults)


def test_lists_options_and_texts() -> None:
    keys = read(
        "widths=8,16", "start=2,-0.5", "name=007", "adam.eps=1e-8", "optimizer.eps=0.1", "attack.steps=3"
    )
    assert (keys.widths, keys.start, keys.name, keys.attack.steps) == ([8, 16], [2, -0.5], "007", 3)
    assert keys.options == {"adam": {"eps": 1e-8}, "": {"eps": 0.1}}
    assert read("widths=8").widths == [8]


def test_defaults_that_depend_on_a_key_give_way_to_a_value() -> None:
    assert read("mode=flow").attack.steps == 0
    assert read("mode=flow", "attack.steps=5").attack.steps == 5


def test_an_experiment_gives_way_to_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs/experiment").mkdir(parents=True)
    (tmp_path / "configs/experiment/margin_mine.yaml").write_text("mode: flow\nattack: {steps: 7}\n")
    monkeypatch.chdir(tmp_path)
    assert read("attack.steps=8", "experiment=margin_mine").attack.steps == 8
    assert read("experiment=margin_mine").mode == "flow"
    assert read("experiment=margin_mine").attack.steps == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mode=tyo", "mode: tyo is wrong; did you mean toy. allowed: toy, flow; fix: mode=toy"),
        ("widths=0", "widths: .*allowed: a list of whole numbers ≥ 1"),
        ("width=8", "width: 8 is for an unknown key; did you mean widths.*fix: widths=8"),
        ("attack.steps=-1", "attack.steps: -1 is wrong; allowed: a whole number ≥ 0"),
        ("attack.stepz=1", "attack.stepz: 1 is for an unknown key; did you mean attack.steps"),
        ("sumo.rank=3", "sumo.rank: 3 is for an unknown key"),
        ("options.adam=3", "options.adam: 3 is for an unknown key"),
        ("experiment=margin_toi", "experiment: margin_toi is wrong; did you mean margin_toy"),
        ("experiment=quickstart", "experiment: quickstart is for optbench train"),
    ],
)
def test_errors_say_what_to_type(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(override)


def test_the_help_lists_every_key_but_the_options() -> None:
    lines = job_keys.text(Keys).splitlines()
    assert lines[1:3] == ["  mode=toy  What runs", "  widths=[64]  Units of hidden layers"]
    assert "  attack.steps=10  Steps of the attack" in lines
    assert not any(line.startswith("  options") for line in lines)
