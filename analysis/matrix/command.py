"""`optbench matrix`: fine-tune the models of several optimizers with several optimizers, and report the interaction."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.matrix import arguments
from harness.errors import ExitCode
from harness.output import json_document

if TYPE_CHECKING:
    from analysis.matrix.arguments import MatrixPlan


def main(argv: Sequence[str]) -> int:
    """Run ``optbench matrix OPTIMIZER … pretrained=DIR [key=value …]``, or report the runs of a folder.

    The model of a seed is fine-tuned with that seed by every optimizer. Its weights are exported once, next to the
    folder of the runs. Runs that finished with the same settings are not repeated.

    Returns:
        0: all runs finished. 3: a run failed or diverged (the others were made). 75: interrupted (call again with the
        same group to continue).

    Raises:
        InputError: bad input of any run; nothing was started.
    """
    read = arguments.read(argv)
    if isinstance(read, Path):
        _report(read, as_json="--json" in argv)
        return ExitCode.DONE
    if read.dry_run:
        _print_plan(read)
        return ExitCode.DONE
    from analysis.compare import sessions
    from harness.preparation import prepare

    plan = read.comparison
    trainer = sessions.Trainer(as_json=plan.as_json, verbosity=plan.verbosity, concurrency=plan.concurrency)
    _export(read, trainer)
    runs = [prepare(words, say=trainer.say, writes_folder=False) for words in read.runs()]
    folder = runs[0].folder.parent
    session = sessions.Session(runs, trainer, group=plan.group)
    with sessions.lock_group(folder):
        code = session.train()
    if not folder.is_dir():
        print("no run left a folder: there is nothing to report", file=sys.stderr)
        return code or ExitCode.RUN_FAILED
    sessions.write_provenance(folder, plan)
    _report(folder, as_json=plan.as_json)
    return code


def _export(plan: MatrixPlan, trainer: object) -> None:
    """Write the last weights of every model that has no folder yet."""
    from analysis.compare.sessions import Trainer
    from harness import export

    assert isinstance(trainer, Trainer)
    for start in plan.starts:
        if start.folder.is_dir():
            continue
        source = export.find(start.run)
        start.folder.parent.mkdir(parents=True, exist_ok=True)
        has_tokenizer = export.write(source.folder, start.folder, export.choice(source.folder, None))
        trainer.say(f"{start.run}, step {source.step}: {start.folder}")
        for warning in source.warnings:
            trainer.say(f"warning: {warning}")
        if not has_tokenizer:
            trainer.say("warning: without the tokenizer: its corpus is not in the cache (data.cache_dir)")


def _report(folder: Path, *, as_json: bool) -> None:
    from analysis.matrix import outputs, results

    outputs.finish(results.read(folder), folder, as_json=as_json)


def _print_plan(plan: MatrixPlan) -> None:
    """Print the runs; nothing is started."""
    runs = plan.runs()
    if plan.comparison.as_json:
        print(json_document(dry_run=True, models=[str(start.folder) for start in plan.starts], runs=runs))
        return
    for words in runs:
        print(words[-1].removeprefix("name="))
    models = sum(not start.folder.is_dir() for start in plan.starts)
    print(f"{len(runs)} runs of {len(plan.starts)} models, {models} of them to be exported")
