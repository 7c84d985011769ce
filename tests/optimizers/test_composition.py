"""What a preset is composed of, in one line, and how it differs from its neighbour."""

from __future__ import annotations

import json

import pytest

from harness.listing import show_command
from optimizers.composition import composition, difference, nearest
from optimizers.presets import PRESETS


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "sumo",
            "basis randomized (refresh 200, moment carried over) · inner orthogonalize(exact) · residual sgd · "
            "scale rms_max",
        ),
        (
            "apollo_mini",
            "basis gaussian (refresh 200) · inner adam · whole gradient, scaled by tensor · "
            "growth of the total ≤ 1.01 · alpha 11.31",
        ),
        ("muon", "whole matrix · inner orthogonalize(newton_schulz, 5 steps) · scale rows_cols"),
        ("adamw", "every parameter · inner adamw"),
    ],
)
def test_the_composition_in_one_line(name: str, line: str) -> None:
    assert composition(name) == line


@pytest.mark.parametrize(
    ("name", "other", "options"),
    [
        ("sumo", "sumo_paper", {"refresh_stagger"}),
        ("sumo_ns5", "sumo_paper", {"orthogonalizer"}),
        ("apollo_mini", "apollo", {"alpha", "rank", "gradient_scaling"}),
        ("subtrack", "fira", {"basis", "transport", "track_step"}),
    ],
)
def test_the_nearest_preset(name: str, other: str, options: set[str]) -> None:
    found, differences = nearest(name)
    # Options of exact factors that have no effect do not count.
    assert (found, set(differences) - {"orthogonalizer_steps", "orthogonalizer_dtype"}) == (other, options)


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_has_both(name: str) -> None:
    assert " · inner " in composition(name)
    assert difference(name).split(",")[0].removeprefix("the same rule as ") in PRESETS


def test_show_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert show_command(["fira", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["composition"] == composition("fira")
    assert shown["nearest"] == difference("fira")
