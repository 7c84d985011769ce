"""`optbench margin [key=value …]`: how slowly training reaches its robustness margin."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from analysis.margin import outputs, toy
from analysis.margin.config import MarginConfig, load
from analysis.margin.outputs import MarginReport
from analysis.margin.trajectory import MarginRun
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
    config = load(arguments.rest)
    folder = Path(arguments.options.out) if arguments.options.out else _default_folder(config)
    atomic.check_folder("--out", folder, fix="--out runs/margin/mine")
    console = for_tables(stderr=True)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    report = _run(config, say)
    files = outputs.write(config, report, folder)
    code = _exit_code(report.runs)
    outputs.mirror(config, report, folder, say, code)
    if arguments.options.json:
        print(json_document(**outputs.document(config, report)))
    else:
        _show(report, files)
    return code


def _run(config: MarginConfig, say: Callable[[str], None]) -> MarginReport:
    if config.mode == "mlp":
        # torch is imported here: the toy does without.
        from analysis.margin import mlp

        return mlp.report(config, mlp.run_mlp(config, say))
    if config.mode == "disks":
        from analysis.margin import disks

        return disks.report(config, disks.run_disks(config, say))
    if config.mode == "head":
        from analysis.margin import head

        return head.report(config, head.run_head(config, say))
    runs = toy.run_flow(config, say) if config.mode == "flow" else toy.run_toy(config, say)
    return toy.report(config, runs)


def _default_folder(config: MarginConfig) -> Path:
    # The digest separates jobs whose names agree but whose keys differ. What it is taken of has kept its form, so that
    # a command goes on writing to the folder that it wrote to before.
    fixed = {key: tuple(getattr(config, key)) for key in ("optimizer", "hidden", "norms")}
    content = ", ".join(f"{key}={value!r}" for key, value in {**config.settings(), **fixed}.items())
    digest = hashlib.sha256(f"Settings({content})".encode()).hexdigest()[:6]
    name = config.name or "-".join([config.mode or "toy", *config.optimizer[:4], digest])
    return Path(config.runs_dir) / config.group / name


def _exit_code(runs: Sequence[MarginRun]) -> int:
    if any(run.status == "diverged" for run in runs):
        return FAILED
    joins = [run.facts["join"]["passed"] for run in runs if "join" in run.facts]
    return NO if all(run.status == "dead" for run in runs) or not all(joins) else DONE


def _show(report: MarginReport, files: Sequence[Path]) -> None:
    console = for_tables()
    notes = (f"note: {note}" for note in report.notes)
    for line in (outputs.markdown(report), *notes, *map(str, files)):
        console.print(line, markup=False, soft_wrap=True)
