"""`optbench margin [key=value …]`: how slowly training reaches its robustness margin."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from analysis.margin import outputs
from analysis.margin.settings import Settings, read
from analysis.margin.trajectory import Run
from harness.cli import document
from harness.config.errors import InputError

DONE, NO, FAILED = 0, 1, 3


def main(argv: Sequence[str]) -> int:
    """Run one job, write its files, print the table or the JSON document.

    Returns:
        0 done · 1 no run separates the points, or flow and steps disagree at the join · 3 a run diverged.

    Raises:
        InputError: bad input; nothing was computed.
    """
    settings, folder, as_json = _words(argv)
    console = Console(stderr=True, highlight=False)
    say: Callable[[str], None] = lambda text: console.print(text, markup=False, soft_wrap=True)  # noqa: E731
    runs, notes = _computed(settings, say)
    files = outputs.write(settings, runs, notes, folder)
    if as_json:
        print(document(**outputs.document(settings, runs, notes)))
    else:
        _show(runs, notes, files)
    return _code(runs)


def _computed(settings: Settings, say: Callable[[str], None]) -> tuple[list[Run], list[str]]:
    from analysis.margin import toy

    runs = toy.run_flow(settings, say) if settings.mode == "flow" else toy.run_toy(settings, say)
    return runs, notes_on(runs)


def notes_on(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before believing a number, once per optimizer."""
    found: list[str] = []
    for run in runs:
        name = run.optimizer
        if run.facts.get("stagnated_at") is not None:
            found.append(
                f"{name}: from step {run.facts['stagnated_at']} on {run.facts['stagnation']}; "
                "nothing after it is used for a rate"
            )
        join = run.facts.get("join")
        if join and not join["passed"]:
            found.append(
                f"{name}: flow and steps disagree at step {join['t']}: the learning rate is too large for flow"
            )
        if run.facts.get("flow_stuck"):
            found.append(f"{name}: every neuron is off, so that flow stops")
        if run.facts.get("note"):
            found.append(f"{name}: {run.facts['note']}")
    return list(dict.fromkeys(found))


def _words(argv: Sequence[str]) -> tuple[Settings, Path, bool]:
    words: list[str] = []
    out: Path | None = None
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word == "--json":
            continue
        if name == "--out":
            if not equals and not rest:
                raise InputError("--out", "nothing", "names no folder", fix="--out runs/margin/mine")
            out = Path(value if equals else rest.pop(0))
        else:
            words.append(word)
    settings = read(words)
    return settings, out or _folder(settings), "--json" in argv


def _folder(settings: Settings) -> Path:
    name = settings.name or "-".join([settings.mode, *settings.optimizer[:4], f"seed{settings.seed}"])
    return Path(settings.runs_dir) / settings.group / name


def _code(runs: Sequence[Run]) -> int:
    if any(run.status == "diverged" for run in runs):
        return FAILED
    joins = [run.facts["join"]["passed"] for run in runs if "join" in run.facts]
    return NO if all(run.status == "dead" for run in runs) or not all(joins) else DONE


def _show(runs: Sequence[Run], notes: Sequence[str], files: Sequence[Path]) -> None:
    # Piped output must not be folded at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(outputs.markdown(outputs.table(runs), outputs.counts(runs)), markup=False, soft_wrap=True)
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    for path in files:
        console.print(str(path), markup=False, soft_wrap=True)
