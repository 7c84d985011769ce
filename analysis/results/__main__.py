"""Write docs/RESULTS.md from the summaries in docs/results/.

    python -m analysis.results                   # the page, from the summaries that are there
    python -m analysis.results --studies FOLDER  # first the summaries of the studies whose runs are in FOLDER
    python -m analysis.results --track3 FOLDER   # first the summary of the logs below FOLDER

A summary is the data, and the page is computed from it: the page can be made again, and checked, without runs and logs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.results import (
    budget_section,
    family_section,
    grid_section,
    profile_section,
    studies,
    study_summary,
    track3_section,
    track3_summary,
)
from analysis.results.markdown import render as render_template
from analysis.results.markdown import table
from harness.errors import InputError
from harness.files import atomic

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, FOLDER = "RESULTS.md", "results"
FAMILIES = {
    "family_tiny": "Eight optimizers on a Llama of 1.8 M parameters",
    "family_9m": "Eight optimizers on a Llama of 8.8 M parameters",
}
BUDGETS = ("budget_1", "budget_5", "budget_20")
GRID = "rank_interval"


def main(argv: Sequence[str]) -> int:
    """Write the summaries of runs and logs that are given, then the page.

    Returns:
        0, or 2 for bad input; nothing is overwritten then.
    """
    parser = argparse.ArgumentParser(prog="python -m analysis.results")
    parser.add_argument("--studies", type=Path, help="folder with the run folders of the studies")
    parser.add_argument("--track3", type=Path, help="folder of the logs of modded-nanogpt's track 3")
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(argv)
    folder = options.docs / FOLDER
    try:
        summaries = {} if options.studies is None else _summarize_studies(options.studies)
        if options.track3 is not None:
            summaries["track3"] = track3_summary.summarize(options.track3)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    for name, summary in summaries.items():
        atomic.write_text(folder / f"{name}.json", to_text(summary))
    atomic.write_text(options.docs / PAGE, render(folder))
    print(options.docs / PAGE)
    return 0


def _summarize_studies(runs: Path) -> dict[str, dict[str, Any]]:
    """Return the summaries of the studies that have their comparison below a folder.

    Raises:
        InputError: none has, or the runs of one are not one study.
    """
    present = [study.name for study in studies.STUDIES if (runs / study.name).is_dir()]
    ready = [name for name in present if any((runs / name).glob("*/summary.json"))]
    for name in present:
        if name not in ready:
            print(f"{name}: no run on a fresh seed has ended, so that it has no section", file=sys.stderr)
    if not ready:
        known = [study.name for study in studies.STUDIES]
        raise InputError("--studies", runs, "holds no runs of a study", allowed=known, fix="make studies")
    return {name: study_summary.summarize(runs / name, name) for name in ready}


def render(folder: Path) -> str:
    """Return the page of the summaries in a folder; what has none has no section, but the command that makes it."""
    known = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))
    }
    missing = [study for study in studies.STUDIES if study.name not in known]
    commands = [
        (
            study.question,
            f"`{shlex.join(['optbench', *studies.command(study.name)])}`",
            f"{study.minutes} min",
        )
        for study in missing
    ]
    head = render_template(
        "page.md.j2", {"missing": table(("study", "command", "on two cores"), commands) if commands else ""}
    )
    parts = [head]
    parts += [family_section.section(title, known[name]) for name, title in FAMILIES.items() if name in known]
    if GRID in known:
        parts.append(grid_section.section(known[GRID]))
    if budgets := [known[name] for name in BUDGETS if name in known]:
        parts.append(budget_section.section(*budgets))
    parts.append(profile_section.section([known[name] for name in (*FAMILIES, *BUDGETS) if name in known]))
    if "track3" in known:
        parts.append(track3_section.render(known["track3"]))
    return "\n".join(part for part in parts if part)


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
