"""Prove on one GPU, in at most 12 minutes, what a CPU cannot: ``make gpu-check``.

    python -m benchmarks.gpu_check [--device cuda|cpu] [--quick] [--stages A,B] [--again] [--minutes 12]
    [--out runs/gpu_check] [--docs docs/gpu.md] [--json] [--list]

Every stage runs in its own process with its own time limit, and its result is on the disk before the next one
begins. Started again, the command goes on with the first stage that has no result of these sources on this
device; ``--again`` repeats the stages. ``--device cpu --quick`` rehearses all stages that make sense on a CPU.

Exit codes: 0 all stages ran and no check failed, 1 a check failed or an output is missing, 2 bad input, 75 the time
was over before all stages had run. A check that this device cannot make counts as none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu_check import page, runner
from benchmarks.gpu_check.registry import STAGES
from harness import devices
from harness.errors import ExitCode, InputError
from harness.files import atomic


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see the module's docstring."""
    try:
        return _run(_parse(argv))
    except InputError as error:
        print(error, file=sys.stderr)
        return ExitCode.BAD_INPUT
    except OSError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return ExitCode.CHECK_FAILED


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu-check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: that the stages work")
    parser.add_argument("--stages", default="", help="names, by comma; default: all")
    parser.add_argument("--again", action="store_true", help="repeat stages that have a result")
    parser.add_argument("--minutes", type=float, default=12.0, help="for all stages together")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    parser.add_argument("--docs", type=Path, help="page that takes the tables between its markers")
    parser.add_argument("--json", action="store_true", help="print the JSON document")
    parser.add_argument("--list", action="store_true", help="print the names of the stages")
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.list:
        print("\n".join(f"{stage.name:<14} {stage.limit_s:>4.0f} s  {stage.title}" for stage in STAGES))
        return ExitCode.DONE
    wanted = _wanted(arguments.stages)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device",
            "cuda",
            "is not there: torch sees no GPU",
            fix="--device cpu --quick rehearses the check",
        )
    atomic.check_folder("--out", arguments.out, fix="--out runs/gpu_check")
    session = runner.Session(
        arguments.out.absolute(),
        arguments.device,
        arguments.quick,
        devices.device_name(torch.device(arguments.device)),
        arguments.again,
        budget_s=60 * arguments.minutes,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    runner.run(wanted, session)
    document = page.collect(STAGES, session)
    page.write(document, session.out, arguments.docs)
    print(document.model_dump_json(indent=2) if arguments.json else page.render(document))
    if document.failed:
        return ExitCode.CHECK_FAILED
    names = {stage.name for stage in wanted}
    is_complete = all(record.status == "done" for record in document.stages if record.name in names)
    return ExitCode.DONE if is_complete else ExitCode.RESUMABLE


def _wanted(names: str) -> list[runner.Stage]:
    known = {stage.name: stage for stage in STAGES}
    chosen = [name for name in names.split(",") if name]
    for name in chosen:
        if name not in known:
            raise InputError("--stages", name, "is unknown", allowed=known)
    return [stage for stage in STAGES if not chosen or stage.name in chosen]


if __name__ == "__main__":
    raise SystemExit(main())
