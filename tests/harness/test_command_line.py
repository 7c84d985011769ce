"""The parser that every command uses."""

from __future__ import annotations

import pytest

from harness.command_line import parse
from harness.commands import COMMANDS, load
from harness.errors import InputError


def test_options_may_stand_anywhere_and_the_rest_keeps_its_order() -> None:
    arguments = parse("paper", ["--out", "a", "sumo_table3", "runs=b", "--json", "c"])
    assert (arguments.options.out, arguments.options.json, arguments.options.list) == ("a", True, False)
    assert arguments.rest == ["sumo_table3", "runs=b", "c"]
    assert (arguments.names, arguments.overrides) == (["sumo_table3", "c"], ["runs=b"])


@pytest.mark.parametrize("argv", [["--out", "x=1"], ["--out=x=1"], ["--out=y", "--out=x=1"]])
def test_a_value_with_and_without_equals_sign(argv: list[str]) -> None:
    assert parse("paper", argv).options.out == "x=1"


def test_an_optional_value_needs_the_equals_sign() -> None:
    assert parse("report", ["--wandb", "runs"]).rest == ["runs"]
    assert parse("report", ["--wandb", "runs"]).options.wandb == ""
    assert parse("report", ["--wandb=team/project"]).options.wandb == "team/project"
    assert parse("report", []).options.wandb is None


def test_an_option_that_can_be_repeated() -> None:
    assert parse("status", ["--cancel", "a", "--cancel=b"]).options.cancel == ["a", "b"]
    assert parse("status", []).options.cancel == []


def test_unknown_options_can_be_kept() -> None:
    argv = ["--steps", "5", "x=1", "-q", "--", "--json"]
    arguments = parse("train", argv, keeps_unknown=True)
    assert arguments.rest == ["--steps", "5", "x=1", "-q", "--", "--json"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ful"], "certify: --ful is not an option; did you mean --full. .*--out DIR, --json; fix: --full"),
        (["--rule=sumo"], "certify: --rule=sumo is not an option; .*fix: rule=sumo"),
        (["-x"], "certify: -x is not an option; .*fix: optbench certify --help"),
        (["--out"], "--out: needs a value; allowed: --out DIR; fix: --out runs/certificates"),
        (["--out", "--json"], "--out: needs a value"),
        (["--out="], "--out: needs a value"),
        (["--full=1"], "--full: takes no value; fix: --full"),
    ],
)
def test_errors_say_what_to_type(argv: list[str], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        parse("certify", argv)


def test_a_value_that_is_not_among_the_choices() -> None:
    with pytest.raises(InputError, match="--figures: svg is wrong; allowed: png; fix: --figures png"):
        parse("report", ["runs", "--figures", "svg"])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_declaration_can_be_parsed_and_loaded(name: str) -> None:
    command = COMMANDS[name]
    for option in command.options:
        assert not option.metavar or option.example, option
        value = [option.choices[0] if option.choices else "x"] if option.metavar else []
        parse(name, ["=".join((spelling, *value)) for spelling in option.names])
    assert all(load(target) for target in (command.values, command.keys) if target)
