"""Show an audit in a terminal, and as Markdown. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.console import cell as text
from harness.verify.audit.cells import CELLS, ENGINES
from harness.verify.audit.document import CONTROL, FIRST_STEP, TargetReport, is_good
from harness.visible import markdown as escaped

STYLES = {"safe": "green", "wrong": "bold red", "crashes": "red", "refused": "yellow"}
_LABELS = tuple(cell.label for cell in CELLS)
_WORST = ("wrong", "crashes", "refused", "safe")


def line(report: TargetReport, number: int, total: int) -> Text:
    """Return one line of progress."""
    counts = ", ".join(
        f"{n} {verdict}" for verdict in _WORST if (n := sum(cell.verdict == verdict for cell in report.cells))
    )
    if report.not_run:
        counts = ", ".join(filter(None, [counts, f"{len(report.not_run)} not run"]))
    seconds = f" {report.seconds:.0f} s" if report.seconds is not None else ""
    style = "green" if report.passed else "red"
    return text(
        f"[{number}/{total}] {report.target}: {report.update_class or report.error}; {counts}{seconds}", style
    )


def not_run(report: TargetReport) -> str:
    """Return the sentence that says for what there was no time, and what to type."""
    engines = dict.fromkeys(label.partition(" ")[0] for label in report.not_run if label in _LABELS)
    engine = f" --engine {','.join(engines)}" if engines else ""
    if report.target.startswith(CONTROL):
        command = f"optbench audit torch.optim.AdamW{engine} --include-controls"
    else:
        command = f"optbench audit '{report.target}'{engine}"
    first = next((check for check in report.checks if check.name == FIRST_STEP), None)
    why = first.detail if first else "the time of --ci was over"
    again = f"With more time: {command} --time-limit 600" if first else f"Without the limit: {command}"
    return (
        f"{report.target}: not run, because {why}: {', '.join(report.not_run)}. "
        f"This says nothing about the optimizer. {again}"
    )


def show(reports: Sequence[TargetReport], console: Console) -> None:
    """Print one table of a single target, or one row per target."""
    whole = [report for report in reports if (report.cells or report.not_run) and not _is_control(report)]
    if len(whole) == 1:
        _show_cells(whole[0], console)
        _show_checks(whole[0], console)
    elif whole:
        _show_rows(whole, console)
    controls = [report for report in reports if _is_control(report)]
    if controls:
        _show_controls(controls, console)
    for report in reports:
        if report.error:
            console.print(text(f"{report.target}: {report.error}", "yellow"), soft_wrap=True)


def _show_cells(report: TargetReport, console: Console) -> None:
    title = " · ".join(filter(None, [report.target, report.version, report.update_class]))
    table = Table(title=text(title), title_justify="left")
    for column in (
        "engine",
        "ranks",
        "verdict",
        "replay error",
        "noise floor",
        "step",
        "parameter",
        "reason",
    ):
        table.add_column(column, justify="right" if column in ("ranks", "step") else "left")
    for cell in report.cells:
        table.add_row(
            cell.label,
            str(cell.world_size),
            Text(cell.verdict, STYLES[cell.verdict]),
            _number(cell.replay_error),
            _number(cell.noise_floor),
            str(cell.first_step or ""),
            text(cell.parameter or ""),
            text(cell.reason),
        )
    console.print(table)
    for sentence in (report.explanation, *report.notes):
        console.print(text(sentence), soft_wrap=True)


def _show_checks(report: TargetReport, console: Console) -> None:
    if not report.checks:
        return
    table = Table()
    for column in ("check", "passed", "detail"):
        table.add_column(column)
    marks = {True: Text("yes", "green"), False: Text("no", "red"), None: Text("–")}
    for check in report.checks:
        table.add_row(text(check.name), marks[check.passed], text(check.detail))
    console.print(table)


def _show_rows(reports: Sequence[TargetReport], console: Console) -> None:
    table = Table()
    for column in ("optimizer", "class", *ENGINES, "checks"):
        table.add_column(column)
    for report in reports:
        failed = [check.name for check in report.checks if check.passed is False]
        table.add_row(
            text(report.target),
            report.update_class or "",
            *(_worst(report, engine) for engine in ENGINES),
            text(", ".join(failed) or ("passed" if report.checks else "not run" if report.not_run else "")),
        )
    console.print(table)


def _show_controls(reports: Sequence[TargetReport], console: Console) -> None:
    table = Table(title="controls: defects that were put in on purpose", title_justify="left")
    for column in ("defect", "engine", "detected", "replay error", "reason"):
        table.add_column(column)
    for report in reports:
        for cell in report.cells:
            detected = Text("yes", "green") if is_good(cell) else Text("no", "bold red")
            table.add_row(
                text(cell.control or ""), cell.label, detected, _number(cell.replay_error), text(cell.reason)
            )
    console.print(table)


def markdown(reports: Sequence[TargetReport]) -> str:
    """Return a table with one row per target, and one per cell that is not safe."""
    rows = [f"| optimizer | class | {' | '.join(ENGINES)} |", f"|---|---|{'---|' * len(ENGINES)}"]
    reasons = []
    for report in reports:
        verdicts = " | ".join(str(_worst(report, engine)) for engine in ENGINES)
        rows.append(f"| {escaped(report.target)} | {report.update_class or ''} | {verdicts} |")
        reasons += [
            f"- {escaped(report.target)} on {cell.label}: {cell.verdict}, {escaped(cell.reason)}"
            for cell in report.cells
            if not is_good(cell)
        ]
        reasons += [
            f"- {escaped(report.target)}, {escaped(check.name)}: {escaped(check.detail)}"
            for check in report.checks
            if check.passed is False
        ]
        if report.not_run:
            reasons.append(f"- {escaped(not_run(report))}")
    return "\n".join([*rows, "", *reasons, ""])


def _worst(report: TargetReport, engine: str) -> Text:
    """Return the worst verdict on an engine, with its variant where another one is better."""
    found = [cell for cell in report.cells if cell.engine == engine]
    if not found:
        return Text("")
    worst = min(found, key=lambda cell: _WORST.index(cell.verdict))
    same = all(cell.verdict == worst.verdict for cell in found)
    variants = ", ".join(cell.variant or "plain" for cell in found if cell.verdict == worst.verdict)
    return Text(worst.verdict if same else f"{worst.verdict} ({variants})", STYLES[worst.verdict])


def _is_control(report: TargetReport) -> bool:
    return report.target.startswith(CONTROL)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
