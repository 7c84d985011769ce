"""The studies of docs/RESULTS.md, and the command that runs them one after the other. Torch-free.

    python -m analysis.results.studies --runs runs/studies              # all; goes on where it ended
    python -m analysis.results.studies --runs runs/studies --minutes 60 # stops after an hour; the same command goes on
    python -m analysis.results.studies --dry-run                        # what they cost

Each study is `optbench sweep study=NAME`, which does not repeat runs that have ended. Runs have one thread each and
train side by side, one for each core: the results do not depend on their number.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.formatting import seconds
from harness.errors import ExitCode

MOST_AT_ONCE = 8
"""Runs side by side, where there are more cores."""
WAIT_S = 120.0
"""Time for a study to end its run after the limit; then it is killed, and the run starts again later."""


@dataclass(frozen=True)
class StudyPlan:
    """A study of the page.

    Attributes:
        name: of its file in configs/study, of its group, and of its summary in docs/results.
        runs: trials and runs on fresh seeds, without added trials.
        minutes: expected on two quiet cores.
        question: what it is for.
    """

    name: str
    runs: int
    minutes: int
    question: str


STUDIES = (
    StudyPlan("budget_1", 40, 4, "four optimizers at 1 token per parameter"),
    StudyPlan("budget_5", 40, 8, "four optimizers at 5 tokens per parameter"),
    StudyPlan("family_tiny", 80, 60, "eight optimizers on llama_tiny; the claims about SUMO"),
    StudyPlan("rank_interval", 72, 45, "SUMO's rank and refresh interval"),
    StudyPlan("budget_20", 40, 30, "four optimizers at 20 tokens per parameter"),
    StudyPlan("family_9m", 72, 120, "eight optimizers on llama_9m; the claims about SUMO"),
)
"""In the order of training: those that give a section soonest come first."""


def command(name: str, runs: Path | None = None, extra: Sequence[str] = ()) -> list[str]:
    """Return the words of the command that runs a study, after ``optbench``."""
    place = [f"runs_dir={runs}"] if runs is not None else []
    return ["sweep", f"study={name}", f"group={name}", *place, *extra]


def main(argv: Sequence[str]) -> int:
    """Run the studies.

    Returns:
        0: all are done. 75: stopped by the limit or a signal; the same command goes on. Otherwise the first exit code
        of a study that is not 0; the others were run all the same.
    """
    parser = argparse.ArgumentParser(prog="python -m analysis.results.studies")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=[study.name for study in STUDIES], metavar="STUDY")
    parser.add_argument("--minutes", type=float, help="stop after this long")
    parser.add_argument(
        "--concurrency",
        type=int,
        default=_cores(),
        help=f"runs side by side (one for each core, up to {MOST_AT_ONCE})",
    )
    parser.add_argument("--dry-run", action="store_true", help="only show the studies and what they cost")
    parser.add_argument("words", nargs="*", metavar="key=value", help="further words of optbench sweep")
    options = parser.parse_args(argv)
    chosen = [study for study in STUDIES if options.only is None or study.name in options.only]
    _print_plan(chosen)
    if options.dry_run:
        return 0
    began, code = time.monotonic(), 0
    for index, study in enumerate(chosen):
        left = sum(later.minutes for later in chosen[index:])
        print(f"[{index + 1}/{len(chosen)}] {study.name}: {_left(chosen[:index], began, left)}", flush=True)
        limit = None if options.minutes is None else options.minutes * 60 - (time.monotonic() - began)
        words = [f"concurrency={options.concurrency}", *options.words]
        ended = _run(command(study.name, options.runs, words), limit)
        if ended == ExitCode.RESUMABLE:
            print(f"stopped in {study.name}; the same command goes on from here", flush=True)
            return ended
        code = code or ended
    return code


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(cores, MOST_AT_ONCE)


def _print_plan(chosen: Sequence[StudyPlan]) -> None:
    for study in chosen:
        print(f"{study.name:14} {study.runs:3} runs  about {study.minutes:3} min  {study.question}")
    runs, minutes = sum(study.runs for study in chosen), sum(study.minutes for study in chosen)
    print(f"{'together':14} {runs:3} runs  about {minutes:3} min on two quiet cores; added trials take more")


def _left(done: Sequence[StudyPlan], began: float, left: float) -> str:
    """Return the remaining time: the expected one, scaled by how long the studies before took."""
    expected = sum(study.minutes for study in done)
    pace = (time.monotonic() - began) / (60 * expected) if expected else 1.0
    basis = "at the pace so far" if expected else "on two quiet cores"
    return f"about {seconds(60 * left * pace)} left {basis}"


def _run(words: Sequence[str], limit_s: float | None) -> int:
    """Run a command of optbench; after ``limit_s`` it is interrupted and returns 75."""
    if limit_s is not None and limit_s <= 0:
        return ExitCode.RESUMABLE
    # A session of its own: a terminal's Ctrl-C reaches it once, through us.
    process = subprocess.Popen([sys.executable, "-m", "harness.cli", *words], start_new_session=True)
    try:
        return process.wait(limit_s)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.send_signal(signal.SIGINT)
    try:
        process.wait(WAIT_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()
    return ExitCode.RESUMABLE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
