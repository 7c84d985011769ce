"""Parse the arguments of a command by its declaration in `harness.commands`.

Options are parsed by argparse: ``--flag value`` and ``--flag=value``, anywhere between the other arguments. What
remains, names and ``key=value`` overrides, is kept in order for the command.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from harness.commands import COMMANDS, JSON, Option
from harness.errors import InputError, closest


class Arguments(NamedTuple):
    """The parsed arguments of a command.

    Attributes:
        rest: names and overrides, in the order in which they were typed.
        options: one attribute for each declared option (``--dry-run`` is ``dry_run``): bool for a switch, text or
            None for an option with a value, a list where the option can be repeated, and for an option whose value
            is optional "" where the value was left out.
    """

    rest: list[str]
    options: argparse.Namespace

    @property
    def names(self) -> list[str]:
        """Return what is neither an option nor an override."""
        return [argument for argument in self.rest if "=" not in argument]

    @property
    def overrides(self) -> list[str]:
        """Return the ``key=value`` overrides."""
        return [argument for argument in self.rest if "=" in argument]


def parse(command: str, argv: Sequence[str], *, keeps_unknown: bool = False) -> Arguments:
    """Parse the arguments of a command.

    Args:
        command: a key of `harness.commands.COMMANDS`.
        argv: the arguments after it.
        keeps_unknown: leave options that are not declared among the other arguments instead of refusing them.

    Raises:
        InputError: an unknown option, an option without its value, or a value that is not among its choices.
    """
    options = (*COMMANDS[command].options, JSON)
    optional = {name for option in options if option.is_value_optional for name in option.names}
    # argparse would take the argument after such an option for its value.
    argv = [f"{argument}=" if argument in optional else argument for argument in argv]
    try:
        namespace, rest = _parser(options).parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise _wrong_use(command, options, error) from None
    if not keeps_unknown:
        for argument in rest:
            if argument.startswith("-"):
                raise unknown_option(command, argument)
    _check_values(options, namespace)
    return Arguments(rest, namespace)


def unknown_option(command: str, argument: str) -> InputError:
    """Return the error for an option that the command does not have."""
    options = (*COMMANDS[command].options, JSON)
    name, equals, _ = argument.partition("=")
    names = [name for option in options if option.metavar or not equals for name in option.names]
    guess = closest(name, names)
    bare = argument.lstrip("-")
    fix = guess or (bare if equals and bare else f"optbench {command} --help")
    allowed = [option.usage for option in options]
    return InputError(command, argument, "is not an option", allowed=allowed, suggestion=guess, fix=fix)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def _parser(options: Sequence[Option]) -> argparse.ArgumentParser:
    parser = _Parser(prog="optbench", add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in options:
        if not option.metavar:
            parser.add_argument(*option.names, action="store_true")
        elif option.is_repeatable:
            parser.add_argument(*option.names, action="append", default=[])
        else:
            parser.add_argument(*option.names)
    return parser


def _wrong_use(command: str, options: Sequence[Option], error: argparse.ArgumentError) -> InputError:
    """Translate argparse's error: an option without its value, or a switch with one."""
    names = (error.argument_name or "").split("/")
    option = next((option for option in options if option.names[0] in names), None)
    if option is None:
        return InputError(command, str(error), "cannot be parsed", fix=f"optbench {command} --help")
    if option.metavar:
        return _without_value(option)
    return InputError(option.names[0], "", "takes no value", fix=option.names[0])


def _check_values(options: Sequence[Option], namespace: argparse.Namespace) -> None:
    for option in options:
        value = getattr(namespace, option.names[0].lstrip("-").replace("-", "_"))
        values = value if isinstance(value, list) else [value]
        if option.metavar and not option.is_value_optional and "" in values:
            raise _without_value(option)
        if option.choices and value not in (None, *option.choices):
            raise InputError(option.names[0], value, allowed=option.choices, fix=option.example)


def _without_value(option: Option) -> InputError:
    return InputError(option.names[0], "", "needs a value", allowed=option.usage, fix=option.example)
