"""`optbench margin [key=value …]`: how slowly training reaches its robustness margin."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from analysis.margin import outputs, toy, toy_results
from analysis.margin.mirror import mirror
from analysis.margin.outputs import Finished
from analysis.margin.settings import Settings, read
from analysis.margin.trajectory import Run
from harness import command_line
from harness.console import for_tables
from harness.files import atomic
from harness.output import json_document

DONE, NO, FAILED = 0, 1, 3


def main(argv: Sequence[str]) -> int:
    """Run one job, write its files, print the table or the JSON document.

    Returns:
        0 done · 1 no run separates the points, or flow and steps disagree at the join · 3 a run diverged.

    Raises:
        InputError: bad input; nothing was computed.
    """
    arguments = command_line.parse("margin", argv)
    settings = read(arguments.rest)
    folder = Path(arguments.options.out) if arguments.options.out else _folder(settings)
    atomic.check_folder("--out", folder, fix="--out runs/margin/mine")
    console = for_tables(stderr=True)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    done = _done(settings, say)
    files = outputs.write(settings, done, folder)
    code = _code(done.runs)
    mirror(settings, done, folder, say, code)
    if arguments.options.json:
        print(json_document(**outputs.document(settings, done)))
    else:
        _show(done, files)
    return code


def _done(settings: Settings, say: Callable[[str], None]) -> Finished:
    if settings.mode == "mlp":
        # torch is imported here: the toy does without.
        from analysis.margin import mlp, net_results

        return net_results.mlp(settings, mlp.run_mlp(settings, say))
    if settings.mode == "head":
        from analysis.margin import head, net_results

        return net_results.head(settings, head.run_head(settings, say))
    runs = toy.run_flow(settings, say) if settings.mode == "flow" else toy.run_toy(settings, say)
    return toy_results.finished(settings, runs)


def _folder(settings: Settings) -> Path:
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:6]
    name = settings.name or "-".join([settings.mode, *settings.optimizer[:4], digest])
    return Path(settings.runs_dir) / settings.group / name


def _code(runs: Sequence[Run]) -> int:
    if any(run.status == "diverged" for run in runs):
        return FAILED
    joins = [run.facts["join"]["passed"] for run in runs if "join" in run.facts]
    return NO if all(run.status == "dead" for run in runs) or not all(joins) else DONE


def _show(done: Finished, files: Sequence[Path]) -> None:
    console = for_tables()
    for text in (outputs.markdown(done), *(f"note: {note}" for note in done.notes), *map(str, files)):
        console.print(text, markup=False, soft_wrap=True)
