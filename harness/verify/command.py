"""`optbench certify [key=value …]`: does an optimizer on an engine compute what its rule computes?"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from harness.cli import FAILED, document
from harness.config.errors import InputError
from harness.console import for_tables
from harness.files import atomic
from harness.record.certificates import Cell
from harness.verify import cells, page
from harness.verify.pool import RankLost
from harness.verify.session import Certified, certify
from harness.verify.verdict import Result

FLAGS = ("--full", "--include-controls", "--include-peers", "--json")
OUT = "runs/certificates"


def main(argv: Sequence[str]) -> int:
    """Certify cells; 0 if all are green and all controls red, 1 if not, 3 if a rank died or hung.

    Raises:
        InputError: words that choose no cells, an unknown flag, a folder that cannot be written.
    """
    words, flags, out = _parsed(argv)
    chosen = _chosen(words, flags)
    atomic.check_folder("--out", out, fix=f"--out {OUT}")
    is_json = "--json" in flags
    console = for_tables(stderr=True)

    def say(result: Result, number: int, total: int) -> None:
        console.print(page.line(result, number, total), soft_wrap=True)

    with tempfile.TemporaryDirectory(prefix="optbench-certify-") as scratch:
        try:
            found = certify(chosen, Path(scratch), say)
        except RankLost as error:
            if is_json:
                print(document(error={"key": "certify", "message": str(error).splitlines()[0]}))
            print(error, file=sys.stderr, flush=True)
            return FAILED
    _write(found, out)
    if is_json:
        print(document(**_content(found)))
    else:
        page.show(found, for_tables())
        print(out / "certificates.json")
    return 0 if found.passed else 1


def _parsed(argv: Sequence[str]) -> tuple[list[str], set[str], Path]:
    words: list[str] = []
    flags: set[str] = set()
    out = Path(OUT)
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name == "--out":
            if not equals and not rest:
                raise InputError("--out", "nothing", "names no folder", fix=f"--out {OUT}")
            out = Path(value if equals else rest.pop(0))
        elif word in FLAGS:
            flags.add(word)
        elif word.startswith("-"):
            raise InputError("certify", word, "is not an option", allowed=[*FLAGS, "--out"])
        else:
            words.append(word)
    return words, flags, out


def _chosen(words: Sequence[str], flags: set[str]) -> list[Cell]:
    chosen = cells.select(words, full="--full" in flags)
    if "--include-controls" in flags:
        chosen += cells.controls()
    if "--include-peers" in flags:
        chosen += cells.peers()
    return chosen


def _content(found: Certified) -> dict[str, object]:
    return {
        "passed": found.passed,
        "made": datetime.now(UTC).date().isoformat(),
        "seconds": round(found.seconds, 1),
        "sources_sha256": found.sources,
        "machine": found.machine,
        "cells": [result.as_dict() for result in found.results],
    }


def _write(found: Certified, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    atomic.write_text(out / "certificates.json", _one_line_a_cell(_content(found)))
    atomic.write_text(out / "certificates.md", page.markdown(found))


def _one_line_a_cell(content: dict[str, object]) -> str:
    """Return the JSON document with each cell on a line of its own, so that a committed file has small diffs."""
    cells_ = content["cells"]
    assert isinstance(cells_, list)
    lines = [json.dumps(cell, ensure_ascii=False, allow_nan=False) for cell in cells_]
    text = document(**{**content, "cells": []}) + "\n"
    return text.replace('"cells": []', '"cells": [\n' + ",\n".join(lines) + "\n]")
