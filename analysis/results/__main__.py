"""Write docs/RESULTS.md from the summaries in docs/results/.

    python -m analysis.results                   # the page, from the summaries that are there
    python -m analysis.results --track3 FOLDER   # first the summary of the logs below FOLDER

A summary is the data, and the page is computed from it: the page can be made again, and checked, without the logs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.results import track3_section, track3_summary
from harness.errors import InputError
from harness.files import atomic

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, FOLDER = "RESULTS.md", "results"
INTRODUCTION = """\
# Results

Measured results, with intervals, and what they do not show. `make results` computes this page from the summaries in
`docs/results/`, and a test compares the two. `make results TRACK3=FOLDER` first reads the logs in FOLDER anew.
"""
SECTIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {"track3.json": track3_section.render}
"""Summary → its section, in the order of the page."""


def main(argv: Sequence[str]) -> int:
    """Write the summary of logs that are given, then the page."""
    parser = argparse.ArgumentParser(prog="python -m analysis.results")
    parser.add_argument("--track3", type=Path, help="folder of the logs of modded-nanogpt's track 3")
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(argv)
    folder = options.docs / FOLDER
    if options.track3 is not None:
        try:
            summary = track3_summary.summarize(options.track3)
        except InputError as error:
            print(error, file=sys.stderr)
            return 2
        folder.mkdir(exist_ok=True)
        atomic.write_text(folder / "track3.json", to_text(summary))
    atomic.write_text(options.docs / PAGE, render(folder))
    print(options.docs / PAGE)
    return 0


def render(folder: Path) -> str:
    """Return the page of the summaries in a folder; a summary that is absent has no section."""
    present = [(name, section) for name, section in SECTIONS.items() if (folder / name).is_file()]
    parts = [section(json.loads((folder / name).read_text(encoding="utf-8"))) for name, section in present]
    return "\n".join([INTRODUCTION, *parts])


def to_text(summary: Mapping[str, Any]) -> str:
    """Return a summary as JSON with a line for each run and file."""
    arms = []
    for arm in summary["arms"]:
        head = json.dumps({key: value for key, value in arm.items() if key != "runs"})
        runs = ",\n   ".join(map(json.dumps, arm["runs"]))
        arms.append(f'  {head[:-1]}, "runs": [\n   {runs}]}}')
    others = json.dumps({key: value for key, value in summary.items() if key != "arms"}, indent=1)
    listed = ",\n".join(arms)
    return f'{others[:-2]},\n "arms": [\n{listed}]}}\n'


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
