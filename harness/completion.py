"""`optbench completion SHELL`: print a script that completes commands, options, groups, keys and values on TAB.

The candidates are written into the script when it is printed, so completing starts no Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness import command_line
from harness.commands import COMMANDS, JSON, load
from harness.config import sources
from harness.config.schema import run_keys
from harness.errors import InputError
from harness.output import json_document

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
# optbench completion bash >> ~/.bash_completion   (or: source <(optbench completion bash))
_optbench() {{
    local keys="{keys}" candidates="" word line
    COMPREPLY=()
    # The line as typed: bash itself breaks words at "=".
    line="${{COMP_LINE:0:COMP_POINT}}"
    word="${{line##* }}"
    local rest="${{line#* }}"
    local command="${{rest%% *}}"
    if [[ "$rest" == "$word" || "$rest" == "$line" ]]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
        return
    fi
    case "$command" in
{cases}
    esac
    local found=($(compgen -W "$candidates" -- "$word"))
    # Only what comes after the last "=" is replaced.
    local head=""
    [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]] && head="${{word%=*}}="
    COMPREPLY=("${{found[@]#"$head"}}")
    [[ ${{#found[@]}} == 1 && "${{found[0]}}" == *= ]] && compopt -o nospace
}}
complete -F _optbench optbench
"""

_ZSH = """\
# optbench completion zsh > a file named _optbench in your fpath   (or: source <(optbench completion zsh))
autoload -U +X bashcompinit && bashcompinit
"""

_FISH = """\
# optbench completion fish > ~/.config/fish/completions/optbench.fish
complete -c optbench -f
complete -c optbench -n __fish_use_subcommand -a "{commands}"
"""


def main(argv: Sequence[str]) -> int:
    """Print the completion script of one shell.

    Raises:
        InputError: an argument that is not one of `SHELLS`.
    """
    arguments = command_line.parse("completion", argv)
    names = arguments.rest
    if len(names) != 1 or names[0] not in SHELLS:
        value = " ".join(names) or "no shell"
        raise InputError(
            "completion", value, "is not one shell", allowed=SHELLS, fix="optbench completion bash"
        )
    text = script(names[0])
    print(json_document(shell=names[0], script=text) if arguments.options.json else text.rstrip("\n"))
    return 0


def script(shell: str) -> str:
    """Return the completion script for one of `SHELLS`."""
    commands = " ".join(COMMANDS)
    if shell == "fish":
        return _FISH.format(commands=commands) + "".join(map(_fish, COMMANDS))
    bash = _BASH.format(commands=commands, keys=" ".join(_keys()), cases="\n".join(map(_bash_case, COMMANDS)))
    return (_ZSH if shell == "zsh" else "") + bash


def _bash_case(name: str) -> str:
    keys_ = ["$keys"] if COMMANDS[name].takes_keys else []
    options = [option.names[0] for option in (*COMMANDS[name].options, JSON)]
    return f'        {name}) candidates="{" ".join([*_values(name), *options, *keys_])}" ;;'


def _fish(name: str) -> str:
    seen = f'complete -c optbench -n "__fish_seen_subcommand_from {name}"'
    lines = []
    candidates = [*_values(name), *(_keys() if COMMANDS[name].takes_keys else [])]
    if candidates:
        lines.append(f'{seen} -a "{" ".join(candidates)}"')
    for option in (*COMMANDS[name].options, JSON):
        needs_value = " -r" if option.metavar and not option.is_value_optional else ""
        lines.append(f"{seen} -l {option.names[0].lstrip('-')}{needs_value}")
    return "".join(f"{line}\n" for line in lines)


def _values(name: str) -> list[str]:
    """Return the names that a command takes as arguments."""
    if COMMANDS[name].takes_optimizers:
        return sources.options("optimizer")
    if not COMMANDS[name].values:
        return []
    values = load(COMMANDS[name].values)
    names: Any = values() if callable(values) else values
    return list(names)


def _keys() -> list[str]:
    """Return ``group=option`` of every choice, ``key=value`` of keys with listed values, and ``key=`` of the others."""
    candidates = [f"{group}={option}" for group in sources.GROUPS for option in sources.options(group)]
    for key in run_keys().values():
        values = () if isinstance(key.allowed, str) else key.allowed
        candidates += [f"{key.name}={value}" for value in values if _is_plain(value)] or [f"{key.name}="]
    return list(dict.fromkeys(candidates))


def _is_plain(value: str) -> bool:
    return value.replace("_", "").replace("-", "").replace(".", "").isalnum()
