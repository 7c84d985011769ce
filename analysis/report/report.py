"""Report the runs of a folder: read and judge them, write the report's files, print the tables or the JSON document.

The files are one self-contained HTML page (`report_page`), and the comparison as Markdown, CSV, JSON and a picture.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from analysis import formatting
from analysis.comparison import results_table
from analysis.comparison.document import Document, judge_folder, to_json
from analysis.pages import matplotlib_figures, screenshot
from analysis.report import report_page
from analysis.report.main_plot import main_plot
from harness.console import cell, for_tables
from harness.errors import InputError
from harness.files import atomic
from harness.visible import markdown, visible

PICTURE_FILE, PICTURE_SIZE = "comparison.png", (1200, 640)
MIN_WIDTH = 110
"""Width of tables where the output is not a terminal."""
_TEMPORARY = ".report-"
"""Prefix of the folder in which a report is written before its files are moved into place."""


@dataclass(frozen=True)
class WrittenReport:
    """Files that were written, remarks about those that could not be, and links to copies elsewhere."""

    html: Path
    files: list[Path]
    remarks: list[str]
    links: dict[str, str] = field(default_factory=dict)
    """Name → address."""


Publish = Callable[[Document, WrittenReport], WrittenReport]
"""Publishes a comparison elsewhere; returns the report with the added files, remarks and links."""


def finish(
    folder: Path,
    out: Path,
    *,
    as_json: bool,
    publish: Publish | None = None,
    extra: Mapping[str, object] | None = None,
    figures: bool = False,
    log_format: str | None = None,
) -> None:
    """Judge the runs below ``folder``, write the report into ``out``, and print the result.

    Args:
        folder: contains the runs.
        out: receives the report.
        as_json: print the JSON document in place of the tables.
        publish: called with the comparison after its report is written.
        extra: additional keys of the JSON document.
        figures: also write each plot as a PNG.
        log_format: read public logs of this format instead of runs.

    Raises:
        InputError: no such folder, or ``out`` cannot be written to.
    """
    document = judge_folder(folder, log_format=log_format)
    written = write(document, out, figures=figures)
    if publish is not None:
        written = publish(document, written)
    if as_json:
        _print_json(document, written, extra or {})
    else:
        _print_tables(document, written)


def write(document: Document, out: Path, *, figures: bool = False) -> WrittenReport:
    """Write report.html, comparison.md, comparison.csv, comparison.json and comparison.png into ``out``.

    All files are made before the first one is moved into place, so that a report is never incomplete. Chromium takes
    the picture; without it matplotlib draws the picture if ``figures`` is set, else a remark says why it is missing.

    Args:
        document: the judged runs.
        out: folder; created if necessary.
        figures: also write each plot as ``figures/NAME.png`` with matplotlib.

    Raises:
        InputError: the folder cannot be written to, or matplotlib is required and missing.
    """
    if figures:
        matplotlib_figures.require()
    tables = [(judged.table, f"{judged.verdict.sentence} {judged.verdict.scope}") for judged in document.sets]
    texts = {
        "comparison.md": results_table.markdown(tables) if tables else f"{markdown(document.sentence)}\n",
        "comparison.csv": results_table.to_csv(table for table, _ in tables),
        "comparison.json": json.dumps(to_json(document), indent=1, allow_nan=False) + "\n",
        "report.html": report_page.render(document),
    }
    files = {name: text.encode("utf-8", "replace") for name, text in texts.items()}
    picture, remark = _make_picture(document, figures)
    if picture is not None:
        files[PICTURE_FILE] = picture
    if figures:
        files |= {
            f"figures/set{index}-{plot.key}.png": matplotlib_figures.png(plot)
            for index, judged in enumerate(document.sets)
            for plot in report_page.build_plots(judged.comparison).in_order()
        }
    _write_together(files, out, stale=[PICTURE_FILE])
    html = out / "report.html"
    others = [out / name for name in files if name != html.name]
    return WrittenReport(html, [html, *others], [remark] if remark else [])


def _make_picture(document: Document, figures: bool) -> tuple[bytes | None, str | None]:
    """Return the main plot of the first set that has one as a PNG, or the reason why there is none."""
    plots = ((judged, main_plot(judged.comparison)) for judged in document.sets)
    judged, plot = next(((judged, plot) for judged, plot in plots if plot is not None), (None, None))
    if judged is None or plot is None:
        return None, f"{PICTURE_FILE} is not written: no run logged a loss" if document.runs else None
    with tempfile.TemporaryDirectory(prefix="optbench-") as scratch:
        target = Path(scratch, PICTURE_FILE)
        width, height = PICTURE_SIZE
        remark = screenshot.take_screenshot(
            report_page.render_picture(judged), target, width=width, height=height
        )
        if remark is None:
            return target.read_bytes(), None
    if figures:
        return matplotlib_figures.png(plot, heading=judged.verdict.headline), None
    return None, f"{remark}; --figures png draws it with matplotlib"


def _write_together(files: Mapping[str, bytes], out: Path, stale: Sequence[str]) -> None:
    """Write all files to a temporary folder, flush them, and move them into place in order.

    Args:
        files: name below ``out`` → content; the page is the last one.
        out: folder.
        stale: files of an earlier report that are removed if this one does not have them.

    Raises:
        InputError: a file cannot be written; the earlier report is left unchanged.
    """
    temporary = out / f"{_TEMPORARY}{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        for name, content in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_bytes(path, content)
        for name in files:
            target = out / name
            target.parent.mkdir(exist_ok=True)
            os.replace(temporary / name, target)
        for name in set(stale) - files.keys():
            (out / name).unlink(missing_ok=True)
        atomic.sync_folder(out)
    except OSError as error:
        reason = f"can't be written to: {error.strerror or error}"
        raise InputError("report", out, reason, fix="--out FOLDER, on a disk with room") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    """Remove the temporary folders of processes that were killed while they wrote a report."""
    for path in out.glob(f"{_TEMPORARY}*"):
        pid = path.name.removeprefix(_TEMPORARY)
        is_ours = path.is_dir() and not path.is_symlink() and pid.isdecimal()
        if is_ours and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _print_json(document: Document, written: WrittenReport, extra: Mapping[str, object]) -> None:
    for remark in written.remarks:
        print(visible(remark), file=sys.stderr)
    content = {**to_json(document), **extra, "files": [str(path) for path in written.files]}
    if written.links:
        content["links"] = written.links
    print(json.dumps(content, indent=2, allow_nan=False))


def _print_tables(document: Document, written: WrittenReport) -> None:
    """Print table, verdict and severe warnings of each set; the last line is the path of the page."""
    console = for_tables(width=MIN_WIDTH)
    for judged in document.sets:
        console.print()
        results_table.print_table(judged.table, console)
        console.print()
        console.print(cell(judged.verdict.headline, "bold"))
        if judged.verdict.detail:
            console.print(cell(judged.verdict.detail))
        severe = [warning for warning in judged.warnings if warning.severe]
        for warning in severe:
            console.print(cell(f"! {warning.message}", "red"))
        if notes := len(judged.warnings) - len(severe):
            console.print(cell(f"In the report: {formatting.plural(notes, 'more note')}", "dim"))
    if len(document.sets) != 1:
        console.print()
        console.print(cell(document.sentence, "bold"))
    for remark in document.notices:
        console.print(cell(f"! {remark}", "red"))
    for remark in written.remarks:
        print(visible(remark))
    for name, address in written.links.items():
        print(visible(f"{name}: {address}"))
    print(visible(written.html))
