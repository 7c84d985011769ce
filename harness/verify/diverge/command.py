"""`optbench diverge RUN_A RUN_B`: is the difference between two runs rounding, or does one compute something else?"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from harness import command_line
from harness.command_line import Arguments
from harness.console import for_tables
from harness.errors import ExitCode, InputError
from harness.output import json_document
from harness.process import termination
from harness.record.readers import CONFIG
from harness.verify.diverge import sources
from harness.verify.diverge.envelope import ALPHA, FEWEST_TWINS, Verdict, judge
from harness.verify.diverge.session import Replayed, replay, replay_with_twins
from harness.verify.diverge.sources import Recorded
from harness.verify.pool import RankLost, RanksFailed

if TYPE_CHECKING:
    from harness.config.schema import RunConfig

TWINS, STEPS, MINUTES = 8, 20, 30.0
_MOST_RANKS = 8


def main(argv: Sequence[str]) -> int:
    """Compare two runs; 0 if they differ by rounding, 1 if not, 3 if a replay failed.

    Raises:
        InputError: no such run, runs of different experiments, a number that is not allowed, too little time.
    """
    arguments = command_line.parse("diverge", argv)
    twins = _whole(arguments, "twins", TWINS, FEWEST_TWINS)
    steps = _whole(arguments, "steps", STEPS, 1)
    alpha = ALPHA / _whole(arguments, "comparisons", 1, 1)
    minutes = _minutes(arguments)
    path_a, path_b = _paths(arguments)
    a = sources.folder("RUN_A", path_a, steps)
    assert a.config is not None
    steps = min(steps, a.config.steps)
    b = _other(path_b, steps, a.config)
    if not arguments.options.force:
        sources.refuse_other_runs(a, b)
    world_size = _replayable(b) if arguments.options.replay else None
    console = for_tables(stderr=True)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    with termination.terminable(), tempfile.TemporaryDirectory(prefix="optbench-diverge-") as scratch:
        try:
            words = _in_one_process(path_a, a.config, scratch)
            replayed = replay_with_twins(words, steps, twins, Path(scratch), say, minutes)
            tested = (
                replay(_words(b.path, scratch), steps, world_size, Path(scratch))
                if world_size
                else b.trajectory
            )
        except (RankLost, RanksFailed) as error:
            if arguments.options.json:
                print(json_document(error={"key": "diverge", "message": str(error).splitlines()[0]}))
            print(error, file=sys.stderr, flush=True)
            return ExitCode.RUN_FAILED
    own = judge(replayed.run, replayed.twins, a.trajectory, alpha / 2)
    theirs = judge(replayed.run, replayed.twins, tested, alpha / 2)
    if arguments.options.json:
        print(json_document(**content(own, theirs, replayed, alpha)))
    else:
        _show(own, theirs, replayed, alpha, for_tables())
    return ExitCode.DONE if own.inside and theirs.inside else ExitCode.CHECK_FAILED


def _whole(arguments: Arguments, name: str, default: int, least: int) -> int:
    text = getattr(arguments.options, name)
    if text is None:
        return default
    if not text.isdecimal() or int(text) < least:
        raise InputError(
            f"--{name}", text, allowed=f"a whole number from {least} on", fix=f"--{name} {default}"
        )
    return int(text)


def _minutes(arguments: Arguments) -> float:
    text = arguments.options.minutes
    try:
        minutes = MINUTES if text is None else float(text)
    except ValueError:
        minutes = -1.0
    if not 0 < minutes < 1e6:
        raise InputError("--minutes", text, allowed="a number above 0", fix=f"--minutes {MINUTES:g}")
    return minutes


def _paths(arguments: Arguments) -> tuple[Path, Path]:
    rest = arguments.rest
    if len(rest) != 2:
        raise InputError(
            "diverge",
            " ".join(rest) or "nothing",
            "needs two runs",
            allowed="RUN_A, a run folder, and RUN_B, a run folder or a table",
            fix="optbench diverge runs/GROUP/one runs/GROUP/other",
        )
    return Path(rest[0]), Path(rest[1])


def _other(path: Path, steps: int, config: RunConfig) -> Recorded:
    if path.suffix.lower() in sources.TABLES:
        return sources.table("RUN_B", path, steps, config.optimizer.name, config.seed)
    return sources.folder("RUN_B", path, steps)


def _in_one_process(path: Path, config: RunConfig, scratch: str) -> list[str]:
    return [
        *_words(path, scratch),
        "engine=single",
        "world_size=1",
        f"micro_batch_size={config.micro_batch_size}",
    ]


def _words(path: Path, scratch: str) -> list[str]:
    return [
        str((path / CONFIG).absolute()),
        f"runs_dir={scratch}/runs",
        "resume=false",
        "wandb.mode=disabled",
    ]


def _replayable(b: Recorded) -> int:
    """Return the number of processes of RUN_B.

    Raises:
        InputError: it is a table, or of more processes than are started here.
    """
    world_size = b.config.world_size if b.config is not None else None
    if world_size is None or world_size > _MOST_RANKS:
        raise InputError(
            "--replay",
            str(b.path),
            "cannot be replayed here",
            allowed=f"a run folder of up to {_MOST_RANKS} processes",
            fix="leave out --replay",
        )
    return world_size


def pair_p_value(own: Verdict, theirs: Verdict) -> float:
    """Return the p-value of the pair: twice the smaller one (Bonferroni), because either run can make it outside."""
    return min(1.0, 2 * min(own.p_value, theirs.p_value))


def content(own: Verdict, theirs: Verdict, replayed: Replayed, alpha: float = ALPHA) -> dict[str, object]:
    """Return the JSON document's content: the verdict on the pair, and where the run that is outside leaves.

    Args:
        own: on RUN_A against its replay, at ``alpha`` / 2.
        theirs: on RUN_B against the same replay, at ``alpha`` / 2.
        replayed: RUN_A and its twins.
        alpha: share of right pairs that may be outside: `ALPHA` over the pairs that are read together (Bonferroni).
    """
    worst = theirs if own.inside else own
    last = max(replayed.growth)
    return {
        "inside": own.inside and theirs.inside,
        "p_value": pair_p_value(own, theirs),
        "first_step": worst.first_step,
        "parameter": worst.parameter,
        "figure": worst.figure,
        "excess": worst.excess,
        "amplification": replayed.growth[last],
        "amplification_per_step": replayed.growth[last] ** (1 / last),
        "run": "RUN_B" if own.inside else "RUN_A",
        "alpha": alpha,
        "twins": len(replayed.twins),
        "steps": last,
    }


def _show(own: Verdict, theirs: Verdict, replayed: Replayed, alpha: float, console: Console) -> None:
    table = Table(box=box.SIMPLE, highlight=False)
    for name in ("run", "verdict", "p-value", "first step", "figure", "parameter", "times the twins'"):
        table.add_column(name, overflow="fold")
    for name, verdict in (("RUN_A", own), ("RUN_B", theirs)):
        table.add_row(
            name,
            "inside" if verdict.inside else "OUTSIDE",
            f"{verdict.p_value:.2g}",
            "–" if verdict.first_step is None else str(verdict.first_step),
            verdict.figure or "–",
            verdict.parameter or "–",
            "–" if verdict.excess is None else f"{verdict.excess:.3g}",
        )
    console.print(table)
    last = max(replayed.growth)
    if own.inside and theirs.inside:
        console.print("The runs differ by no more than rounding does.")
    else:
        which = "RUN_B" if own.inside else "RUN_A"
        console.print(f"{which} differs from the replay of RUN_A by more than rounding does.")
    console.print(f"p-value of the pair: {pair_p_value(own, theirs):.2g} (outside below {alpha:.2g})")
    growth = f"one ulp grows {replayed.growth[last]:.3g} times in {last} steps"
    console.print(f"{len(replayed.twins)} twins; {growth}")
