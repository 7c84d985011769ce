"""Write docs/audit.md: audit every optimizer of several packages, as far as the catalogue's file lacks them.

    python -m benchmarks.audit_catalogue [--short] [--package NAME …] [--only-page]

An interrupted run goes on where it ended. Packages that are not installed are named on the page; install them without
their dependencies, in a folder of their own:

    pip install --no-deps --target peers pytorch_optimizer galore-torch apollo-torch heavyball bitsandbytes
    PYTHONPATH=peers python -m benchmarks.audit_catalogue
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.audit_catalogue import entries, page
from benchmarks.audit_catalogue.entries import Entry

STORE = Path(__file__).with_name("catalogue.json")


def main() -> int:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit_catalogue")
    parser.add_argument("--short", action="store_true", help="only the engines of the page's table")
    parser.add_argument("--package", action="append", help="measure these packages only")
    parser.add_argument("--no-checks", action="store_true", help="only the engines")
    parser.add_argument("--time-limit", type=float, help="of one cell, s; default: 60")
    parser.add_argument("--only-page", action="store_true", help="measure nothing")
    parser.add_argument("--store", type=Path, default=STORE, help="the catalogue's file")
    arguments = parser.parse_args()
    known = entries.read(arguments.store)
    if not arguments.only_page:
        from benchmarks.audit_catalogue import measure
        from harness.verify.audit.cells import CELLS

        def say(entry: Entry, number: int, total: int) -> None:
            words = entry.error or f"{len(entry.cells)} cells, {len(entry.failed)} failed checks"
            print(
                f"{time.strftime('%H:%M:%S')} [{number}/{total}] {entry.target}: {words}",
                file=sys.stderr,
                flush=True,
            )

        labels = measure.ENGINES if arguments.short else [cell.label for cell in CELLS]
        missing = measure.measure(
            known,
            lambda: entries.write(arguments.store, known),
            say,
            packages=arguments.package or measure.PACKAGES,
            labels=labels,
            has_checks=not arguments.no_checks,
            cell_s=arguments.time_limit or measure.CELL_S,
        )
        for package in arguments.package or measure.PACKAGES:
            known.pop(package, None)
        for package, reason in missing.items():
            print(f"{package} {reason}", file=sys.stderr)
            if not any(page.package_of(entry) == package for entry in known.values()):
                known[package] = Entry(package, error=reason)
        entries.write(arguments.store, known)
    page.PAGE.write_text(page.text(list(known.values())), encoding="utf-8")
    print(page.PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
