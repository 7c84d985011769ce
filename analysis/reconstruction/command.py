"""`optbench reconstruct [key=value …]`: words in, tables, pictures and exit code out."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from analysis.reconstruction import config as configuration
from analysis.reconstruction.config import ReconstructionConfig
from harness import command_line
from harness.console import for_tables
from harness.errors import ExitCode
from harness.output import json_document


def main(argv: Sequence[str]) -> int:
    """Run the job; 0 done, 1 if a control passed or an exact alternative failed, 75 interrupted.

    Raises:
        InputError: words that are not understood, or a victim that did not separate its images.
    """
    arguments = command_line.parse("reconstruct", argv)
    config = configuration.load(arguments.rest)
    _precheck(config)
    return _run(config, is_json=arguments.options.json)


def _precheck(config: ReconstructionConfig) -> None:
    """Check what can be known before torch is imported: files, classes and numbers of images."""
    from analysis.reconstruction import samples

    if config.checkpoint is None:
        samples.of_config(config)


def _run(config: ReconstructionConfig, *, is_json: bool) -> int:
    from analysis.reconstruction import job, report, subjects

    subjects.check_folder(config)
    console = for_tables(stderr=True)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    try:
        results = job.run(config, say)
    except KeyboardInterrupt:
        say(f"interrupted; the same command resumes from {config.folder}")
        return ExitCode.RESUMABLE
    code = 0 if results.controls_failed and results.exact_passed else 1
    files = report.write(results)
    report.mirror(results, files[1:], say, code)
    if is_json:
        print(json_document(**results.document()))
    else:
        report.show(results, sys.stdout)
        print(files[0])
    return code
