"""`optbench completion SHELL`: a script that completes commands, groups, keys and their values on TAB.

The words are put into the script when it is printed: completing starts no Python.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.cli import COMMANDS
from harness.config import keys, sources
from harness.config.errors import InputError

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
# optbench completion bash >> ~/.bash_completion   (or: source <(optbench completion bash))
_optbench() {{
    local commands="{commands}" with_keys="{with_keys}" named="{named}" word line
    COMPREPLY=()
    # The line as typed: bash itself breaks words at "=".
    line="${{COMP_LINE:0:COMP_POINT}}"
    word="${{line##* }}"
    local rest="${{line#* }}"
    local command="${{rest%% *}}"
    if [[ "$rest" == "$word" || "$rest" == "$line" ]]; then
        COMPREPLY=($(compgen -W "$commands" -- "$word"))
        return
    fi
    case " $with_keys " in
        *" $command "*) ;;
        *)
            [[ "$command" == show ]] && COMPREPLY=($(compgen -W "$named" -- "$word"))
            [[ "$command" == paper ]] && COMPREPLY=($(compgen -W "{tables}" -- "$word"))
            return ;;
    esac
    local found=($(compgen -W "{words}" -- "$word"))
    [[ "$command" == compare || "$command" == sweep ]] && found+=($(compgen -W "{optimizers}" -- "$word"))
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
complete -c optbench -n "__fish_seen_subcommand_from {with_keys}" -a "{words}"
complete -c optbench -n "__fish_seen_subcommand_from compare sweep" -a "{optimizers}"
complete -c optbench -n "__fish_seen_subcommand_from show" -a "{named}"
complete -c optbench -n "__fish_seen_subcommand_from paper" -a "{tables}"
"""


def main(argv: Sequence[str]) -> int:
    """Print the script for a shell.

    Raises:
        InputError: another word than one of `SHELLS`.
    """
    if len(argv) != 1 or argv[0] not in SHELLS:
        value = " ".join(argv) or "no shell"
        raise InputError(
            "completion", value, "is not one shell", allowed=SHELLS, fix="optbench completion bash"
        )
    print(script(argv[0]), end="")
    return 0


def script(shell: str) -> str:
    """The script for one of `SHELLS`."""
    choices = {group: sources.options(group) for group in sources.GROUPS}
    words = [f"{group}={option}" for group, options in choices.items() for option in options]
    for key in keys.schema_keys().values():
        listed = () if isinstance(key.allowed, str) else key.allowed
        words += [f"{key.name}={value}" for value in listed if _is_plain(value)] or [f"{key.name}="]
    names = sorted({option for options in choices.values() for option in options})
    filled = {
        "commands": " ".join(COMMANDS),
        "with_keys": " ".join(name for name, command in COMMANDS.items() if command.takes_keys),
        "words": " ".join(dict.fromkeys(words)),
        "optimizers": " ".join(choices["optimizer"]),
        "named": " ".join(names),
        "tables": " ".join(sources.options("paper")),
    }
    template = {"bash": _BASH, "zsh": _ZSH + _BASH, "fish": _FISH}[shell]
    return template.format(**filled)


def _is_plain(word: str) -> bool:
    return word.replace("_", "").replace("-", "").replace(".", "").isalnum()
