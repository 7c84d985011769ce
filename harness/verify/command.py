"""`optbench certify [key=value …]`: does an optimizer on an engine compute what its rule computes?"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from harness import command_line
from harness.command_line import Arguments
from harness.console import for_tables
from harness.errors import ExitCode
from harness.files import atomic
from harness.output import json_document
from harness.process import termination
from harness.record.certificates import Cell
from harness.verify import cells, grid, page
from harness.verify.pool import RankLost
from harness.verify.session import Certified, certify
from harness.verify.verdict import Result

OUT = "runs/certificates"


def main(argv: Sequence[str]) -> int:
    """Certify cells; 0 if all are green and all controls red, 1 if not, 3 if a rank died or hung.

    Raises:
        InputError: a selection without cells, an unknown option, a folder that cannot be written.
    """
    arguments = command_line.parse("certify", argv)
    selected = _selected(arguments)
    out = Path(arguments.options.out or OUT)
    atomic.check_folder("--out", out, fix=f"--out {OUT}")
    is_json = arguments.options.json
    console = for_tables(stderr=True)

    def say(result: Result, number: int, total: int) -> None:
        console.print(page.line(result, number, total), soft_wrap=True)

    with termination.terminable(), tempfile.TemporaryDirectory(prefix="optbench-certify-") as scratch:
        try:
            certified = certify(selected, Path(scratch), say)
        except RankLost as error:
            if is_json:
                print(json_document(error={"key": "certify", "message": str(error).splitlines()[0]}))
            print(error, file=sys.stderr, flush=True)
            return ExitCode.RUN_FAILED
    _write(certified, out)
    if is_json:
        print(json_document(**_content(certified)))
    else:
        page.show(certified, for_tables())
        print(out / "certificates.json")
    return 0 if certified.passed else 1


def _selected(arguments: Arguments) -> list[Cell]:
    selected = grid.select(arguments.rest, full=arguments.options.full)
    if arguments.options.include_controls:
        selected += cells.controls()
    if arguments.options.include_peers:
        selected += cells.peers()
    return selected


def _content(certified: Certified) -> dict[str, object]:
    return {
        "passed": certified.passed,
        "made": datetime.now(UTC).date().isoformat(),
        "seconds": round(certified.seconds, 1),
        "sources_sha256": certified.sources,
        "machine": certified.machine,
        "cells": [result.as_dict() for result in certified.results],
    }


def _write(certified: Certified, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    atomic.write_text(out / "certificates.json", _one_line_a_cell(_content(certified)))
    atomic.write_text(out / "certificates.md", page.markdown(certified))


def _one_line_a_cell(content: dict[str, object]) -> str:
    """Return the JSON document with each cell on a line of its own, so that a committed file has small diffs."""
    cells_ = content["cells"]
    assert isinstance(cells_, list)
    lines = [json.dumps(cell, ensure_ascii=False, allow_nan=False) for cell in cells_]
    text = json_document(**{**content, "cells": []}) + "\n"
    return text.replace('"cells": []', '"cells": [\n' + ",\n".join(lines) + "\n]")
