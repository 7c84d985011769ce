"""`optbench memorize RUN_OR_GROUP …`: what the models of several optimizers memorize, at equal validation loss."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.memorization import config as configuration
from harness.console import for_tables
from harness.errors import ExitCode
from harness.output import json_document


def main(argv: Sequence[str]) -> int:
    """Measure every checkpoint, write the files, print tables or the JSON document.

    Returns:
        0 done · 1 a check failed: canaries in no document are exposed · 75 interrupted; the same command goes on.

    Raises:
        InputError: bad input; nothing was measured.
    """
    request = configuration.read(argv)
    # torch is imported here: a mistyped key must not wait for it.
    from analysis.memorization import measures, outputs, runs

    console = for_tables(stderr=True)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    comparison, measured = runs.find(request.places, say, last_only=request.config.checkpoints == "last")
    view = runs.open_corpus(measured, say)
    measurer = measures.Measurer(view, request.config, request.out / "memorize")
    try:
        results = measures.measure_all(measured, measurer, say)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on with the next checkpoint")
        return ExitCode.RESUMABLE
    job = outputs.judge(comparison, request.config, view, results)
    files = outputs.write(job, request.out)
    if request.as_json:
        print(json_document(**outputs.document(job)))
    else:
        shown = for_tables()
        for line in (outputs.markdown(job), *map(str, files)):
            shown.print(line, markup=False, soft_wrap=True)
    return ExitCode.DONE if job.passed else ExitCode.CHECK_FAILED
