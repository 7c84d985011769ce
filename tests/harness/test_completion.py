"""What TAB gives, in a real bash."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from harness import completion
from harness.errors import InputError

_ASK = """
source /dev/stdin <<'SCRIPT'
{script}
SCRIPT
COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}
compopt() {{ :; }}
_optbench
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def completed(line: str) -> list[str]:
    bash = shutil.which("bash")
    assert bash is not None
    text = _ASK.format(script=completion.script("bash"), line=line)
    done = subprocess.run([bash, "-c", text], capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("optbench tr", ["train"]),
        ("optbench comp", ["compare", "completion"]),
        ("optbench train model=llama_1", ["llama_130m", "llama_1b", "llama_1b_5464"]),
        ("optbench train optimizer=sumo steps=3 engine=hs", ["hsdp"]),
        ("optbench train checkpoint.keep_b", ["checkpoint.keep_best=true", "checkpoint.keep_best=false"]),
        ("optbench train time_l", ["time_limit="]),
        ("optbench compare sumo gal", ["galore", "galore_muon"]),
        ("optbench show llama_7", ["llama_7b"]),
        ("optbench paper sumo_table3", ["sumo_table3"]),
        ("optbench paper --li", ["--list"]),
        ("optbench train --js", ["--json"]),
        ("optbench report --", ["--format", "--out", "--figures", "--wandb", "--export", "--json"]),
        ("optbench completion z", ["zsh"]),
        ("optbench report ru", []),
        ("optbench train nothing_like_it", []),
    ],
)
def test_what_bash_completes(line: str, expected: list[str]) -> None:
    assert completed(line) == expected


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_shell_gets_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert completion.main([shell]) == 0
    printed = capsys.readouterr().out
    assert all(f"{word}" in printed for word in ("certify", "optimizer=sumo", "max_grad_norm="))


def test_another_shell_is_refused() -> None:
    with pytest.raises(InputError, match="completion: tcsh is not one shell; allowed: bash, zsh, fish"):
        completion.main(["tcsh"])
