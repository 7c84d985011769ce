"""The results table of a set: its cells, and its form on a terminal, in Markdown and in CSV.

A row per arm, and one per run that did not finish. report.html.j2 writes the same table as HTML.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable

from analysis import formatting
from analysis.comparison import memorization
from analysis.comparison.examples import ExampleResults
from analysis.comparison.memorization import SetMemorization
from analysis.comparison.sets import Arm, ComparisonSet
from analysis.comparison.warnings import lr_standing
from analysis.runs.measure import FRACTION, Measure, loss_beside
from analysis.runs.reading import number
from analysis.runs.run import LoadedRun
from analysis.text_tables import markdown_lines
from harness import visible
from harness.console import cell
from harness.record.schema import TIME_PARTS


@dataclass(frozen=True)
class ResultsColumn:
    """A column. ``block`` is the half of the table that has it where the width does not hold both."""

    key: str
    label: str
    unit: str
    meaning: str
    block: str
    numeric: bool = True

    @property
    def head(self) -> str:
        """Label with the unit in parentheses."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


@dataclass(frozen=True)
class ResultsCell:
    """``text`` for people, ``value`` for programs: a float (NaN: missing) or the same text."""

    text: str
    value: float | str


@dataclass(frozen=True)
class ResultsRow:
    """A row of the arm with index ``arm``. If ``failed``, it is one unfinished run, explained in ``outcome``."""

    arm: int
    failed: bool
    cells: dict[str, ResultsCell]


@dataclass(frozen=True)
class ResultsTable:
    """The table of one set, with notes below it."""

    title: str
    columns: list[ResultsColumn]
    rows: list[ResultsRow]
    notes: list[str]


STEP_PARTS = tuple(part for part in TIME_PARTS if part != "probes")

_RESULT, _COST = "result", "cost"
_NAMES = ResultsColumn(
    "optimizer", "optimizer", "", "preset, and the options that differ between its arms", "both", False
)
_SEEDS = ResultsColumn("n", "n", "seeds", "runs that finished", _RESULT)
_BY_LOSS = [
    _NAMES,
    ResultsColumn(
        "loss", "val loss", "nats/token", "validation loss at the last step, mean over seeds", _RESULT
    ),
    ResultsColumn("interval", "± 95 %", "nats/token", "half width of the t-interval of that mean", _RESULT),
    _SEEDS,
    ResultsColumn("perplexity", "ppl", "", "exp(val loss)", _RESULT),
]
_REST = [
    ResultsColumn(
        "steps_to_target", "to target", "steps", "where the mean curve first reaches the target", _RESULT
    ),
    ResultsColumn(
        "seconds_to_target", "to target", "s", "the same in seconds, with evaluations and probes", _RESULT
    ),
    ResultsColumn("lr", "lr", "", "peak learning rate", _RESULT),
    ResultsColumn(
        "lr_standing",
        "lr is",
        "",
        "tuned (n trials): by optbench sweep; tuned default: tuned at this model size; "
        "default tuned at another size; untuned default: published for other sizes or models; "
        "given: by the command line",
        _RESULT,
        False,
    ),
    ResultsColumn("lr_source", "lr from", "", "where the learning rate came from", _RESULT, False),
    ResultsColumn(
        "outcome", "outcome", "", "how many runs finished, and how the others ended", _RESULT, False
    ),
    ResultsColumn("state", "state", "MiB", "optimizer state of rank 0, exact", _COST),
    ResultsColumn("state_kinds", "state by kind", "MiB", "the same by kind", _COST, False),
    ResultsColumn("optimizer_ms", "optimizer", "ms/step", "time in the optimizer, mean over steps", _COST),
    ResultsColumn("step_ms", "step", "ms", "time per step, mean, without evaluation and probes", _COST),
    ResultsColumn(
        "tokens_per_s", "throughput", "tokens/s", "median over rows, all processes together", _COST
    ),
    ResultsColumn(
        "peak",
        "peak",
        "MiB",
        "in training steps: allocator's peak on CUDA, resident set on CPU; max over processes (older runs: whole run)",
        _COST,
    ),
    ResultsColumn(
        "certificate",
        "certificate",
        "",
        "whether this rule computes the correct update on this engine (optbench certify), and the replay error; "
        "stale: certified with other sources than the run's",
        _COST,
        False,
    ),
]


COLUMNS = [*_BY_LOSS, *_REST]
"""Of a table whose runs are compared by their validation loss."""


def columns_of(measure: Measure) -> list[ResultsColumn]:
    """Return the columns of a table whose runs are compared by ``measure``."""
    if measure.is_loss:
        return COLUMNS
    name, unit, gap = measure.shown_name, measure.shown_unit, measure.gap_unit
    return [
        _NAMES,
        ResultsColumn(
            measure.name, name, unit, f"{measure.title} at the last step, mean over seeds", _RESULT
        ),
        ResultsColumn(
            "interval",
            "± 95 %",
            gap,
            "half width of the interval of that mean over seeds and examples (both are samples)",
            _RESULT,
        ),
        ResultsColumn(
            "seeds_interval", "± seeds", gap, "the same over the seeds alone (t-interval)", _RESULT
        ),
        ResultsColumn(
            "examples_interval", "± examples", gap, "the same over the examples alone (bootstrap)", _RESULT
        ),
        _SEEDS,
        ResultsColumn(
            "loss",
            "val loss",
            loss_beside(measure).unit,
            "validation loss at the last step, mean over seeds",
            _RESULT,
        ),
        *_REST,
    ]


def _memorization_column(found: SetMemorization) -> ResultsColumn:
    """Return the column of what models of equal validation loss memorized."""
    at = f"at val loss {formatting.loss(found.val_loss)}"
    shared = "at one validation loss for all, mean over seeds ± 95 % (optbench memorize)"
    if found.copies is None:
        meaning = f"how well its loss tells a training row, {shared}; its level of chance is in memorize.md"
        return ResultsColumn("memorization", "membership AUC", at, meaning, _COST)
    times = "once" if found.copies == 1 else f"{found.copies} times"
    meaning = (
        f"exposure of random secrets that training text holds {times}, {shared}; 1.4 bits: chance; 7: most"
    )
    return ResultsColumn("memorization", f"exposure ×{found.copies}", f"bits {at}", meaning, _COST)


def _memorization_cell(found: SetMemorization, label: str) -> ResultsCell:
    of_arm = found.means.get(label)
    if of_arm is None or of_arm.mean is None:
        return _number_cell(math.nan)
    half = math.nan
    if of_arm.low is not None and of_arm.high is not None:
        # One end of the interval may have been cut at the largest exposure.
        half = max(of_arm.high - of_arm.mean, of_arm.mean - of_arm.low)
    text = formatting.significant(of_arm.mean)
    text += f" ± {formatting.significant(half, 2)}" if math.isfinite(half) else ""
    return ResultsCell(text, of_arm.mean)


def build(comparison: ComparisonSet) -> ResultsTable:
    """Build the table of one set: a row per arm, best mean first, and a row per unfinished run.

    The order is that of the means only; the verdict states which differences are significant.
    """
    ranked = comparison.ranked()
    order = ranked + [i for i in range(len(comparison.arms)) if i not in ranked]
    columns, measure = columns_of(comparison.measure), comparison.measure
    rows_of = {
        index: {**_arm(comparison, comparison.arms[index]), **_result(comparison, index)} for index in order
    }
    memorized = comparison.memorization
    if memorized is not None:
        # Before the certificate, next to speed and memory.
        columns = [*columns[:-1], _memorization_column(memorized), columns[-1]]
        for index, cells in rows_of.items():
            cells["memorization"] = _memorization_cell(memorized, comparison.arms[index].label)
    rows = []
    for index, cells in rows_of.items():
        arm = comparison.arms[index]
        rows.append(ResultsRow(index, False, cells))
        rows.extend(
            ResultsRow(index, True, _failure(arm, run, columns)) for run in arm.runs if not run.finished
        )
    notes = []
    if math.isfinite(comparison.target):
        last = next(arm for arm in comparison.arms if arm.final.mean == comparison.target)
        target = measure.text(comparison.target)
        notes.append(f"target: {target}, the mean final {measure.shown_name} of {last.label}")
    if comparison.examples is not None:
        notes.append(_worth(comparison.examples, measure))
    if math.isfinite(comparison.entropy):
        notes.append(f"unigram entropy of the corpus: {formatting.loss(comparison.entropy)} nats/token")
    if memorized is not None and memorized.unmeasured:
        which = formatting.listing(memorized.unmeasured)
        notes.append(
            f"memorization of {which} is not shown: {memorization.FILE} is older than these runs or lacks them; "
            "optbench memorize measures them"
        )
    sources: dict[str, list[str]] = {}
    for index in order:
        if (source := rows_of[index]["lr_source"].text) not in ("given", formatting.MISSING):
            sources.setdefault(source, []).append(comparison.arms[index].label)
    for source, labels in sources.items():
        subject = "learning rates" if len(sources) == 1 else f"learning rate of {formatting.listing(labels)}"
        notes.append(f"{subject}: {source}")
    return ResultsTable(comparison.title, columns, rows, notes)


def _worth(examples: ExampleResults, measure: Measure) -> str:
    """Return the number of examples, and what one of them is worth under a metric that is their mean."""
    count = formatting.grouped(len(examples))
    if measure.unit != FRACTION:
        return f"{count} validation examples"
    return f"{count} validation examples, each worth {measure.gap_text(1 / len(examples), 2)}"


def _result(comparison: ComparisonSet, index: int) -> dict[str, ResultsCell]:
    """Return the cells of an arm that differ between a loss and the metric of a task."""
    arm, measure = comparison.arms[index], comparison.measure
    if measure.is_loss:
        perplexity = math.exp(min(arm.final.mean, 700)) if arm.final.n else math.nan
        return {
            "loss": ResultsCell(formatting.loss(arm.final.mean), arm.final.mean),
            "interval": _number_cell(arm.final.half_width, 2),
            "perplexity": _number_cell(perplexity, 4),
        }
    by_examples = both = math.nan
    if comparison.examples is not None and arm.final.n:
        by_examples, both = comparison.examples.half_widths(index, arm.final)
    loss = arm.mean("val/loss")
    halves = {"interval": both, "seeds_interval": arm.final.half_width, "examples_interval": by_examples}
    return {
        # Shown values, so that a column has one unit in every form of the table.
        measure.name: ResultsCell(measure.number(arm.final.mean), measure.scale * arm.final.mean),
        **{key: _number_cell(measure.scale * half, 2) for key, half in halves.items()},
        "loss": ResultsCell(formatting.loss(loss), loss),
    }


def _arm(comparison: ComparisonSet, arm: Arm) -> dict[str, ResultsCell]:
    run = (arm.finished or arm.runs)[0]
    kinds, mib = state_kinds(run), 2**20
    finished, curve = len(arm.finished), arm.curve
    target, sign = comparison.target, comparison.measure.sign
    steps = curve.first_reaching(target, "steps", sign) if curve else math.nan
    seconds = curve.first_reaching(target, "seconds", sign) if curve else math.nan
    state = sum(kinds.values()) / mib if kinds else math.nan
    return {
        "optimizer": _text_cell(arm.label),
        "n": ResultsCell(str(finished), float(finished)),
        "steps_to_target": ResultsCell(formatting.grouped(steps), steps),
        "seconds_to_target": _number_cell(seconds),
        "lr": _number_cell(run.fact("lr")),
        "lr_standing": _text_cell(lr_standing(arm)),
        "lr_source": _text_cell(run.text("lr_source")),
        "outcome": _text_cell(f"{finished} of {len(arm.runs)} finished"),
        "state": _number_cell(state),
        "state_kinds": _text_cell(
            ", ".join(f"{kind} {formatting.significant(size / mib)}" for kind, size in kinds.items())
        ),
        "optimizer_ms": _number_cell(arm.mean_time("optimizer") * 1000),
        "step_ms": _number_cell(arm.mean_time(*STEP_PARTS) * 1000),
        "tokens_per_s": ResultsCell(formatting.grouped(arm.mean("tokens_per_s")), arm.mean("tokens_per_s")),
        "peak": _number_cell(arm.mean("memory_bytes", comparison.peak_kind) / mib),
        "certificate": _text_cell(_certificate(arm)),
    }


def state_kinds(run: LoadedRun) -> dict[str, float]:
    """Return the bytes of the optimizer state by kind."""
    kinds = run.summary.get("state_bytes")
    sizes = {str(kind): number(size) for kind, size in kinds.items()} if isinstance(kinds, dict) else {}
    return {kind: size for kind, size in sizes.items() if math.isfinite(size)}


def _certificate(arm: Arm) -> str:
    """Return the certificate of the arm: failed if one run's failed, none if one is missing, else the largest error."""
    certificates = [run.certified for run in arm.runs]
    if any(c is not None and c.get("passed") is False for c in certificates):
        return "✗ failed"
    if not all(c is not None and c.get("passed") for c in certificates):
        return "none"
    errors = [run.replay_error for run in arm.runs if math.isfinite(run.replay_error)]
    stale = " (stale)" if any(c is not None and c.get("current") is False for c in certificates) else ""
    return (f"✓ {max(errors):.1e}" if errors else "✓") + stale


def _failure(arm: Arm, run: LoadedRun, columns: Sequence[ResultsColumn]) -> dict[str, ResultsCell]:
    """Return the row of an unfinished run: its name and outcome; the other cells stay blank."""
    cells = {
        column.key: ResultsCell(formatting.MISSING, math.nan if column.numeric else "") for column in columns
    }
    step = f"at step {formatting.grouped(run.steps)}" if math.isfinite(run.steps) else ""
    reason = "" if run.reason.startswith(run.state) and step in run.reason else run.reason
    story = " ".join(part for part in (run.state, step) if part)
    cells["optimizer"] = _text_cell(f"{arm.label} seed {run.seed}")
    cells["lr"] = _number_cell(run.fact("lr"))
    cells["outcome"] = _text_cell(f"{story}: {reason}" if reason else story)
    return cells


def _text_cell(text: str) -> ResultsCell:
    return ResultsCell(text or formatting.MISSING, text)


def _number_cell(value: float, digits: int = 3) -> ResultsCell:
    return ResultsCell(formatting.significant(value, digits), value)


WIDTH_WHOLE, WIDTH_OUTCOME = 205, 100
"""Terminal widths for the table as one piece, and for a column of its own for failures."""


def print_table(table: ResultsTable, console: Console) -> None:
    """Print to a terminal: as one table if it fits, else results, failures as text, and costs below."""
    if console.width >= WIDTH_WHOLE:
        console.print(_rich(table, table.columns, table.rows, table.title))
    else:
        spelled = console.width < WIDTH_OUTCOME
        kept = [row for row in table.rows if not row.failed]
        result = [c for c in table.columns if c.block != "cost" and not (spelled and c.key == "outcome")]
        console.print(_rich(table, result, kept if spelled else table.rows, table.title))
        for row in table.rows if spelled else ():
            if row.failed:
                console.print(cell(f"{row.cells['optimizer'].text}: {row.cells['outcome'].text}", "red"))
        console.print()
        console.print(_rich(table, [c for c in table.columns if c.block != "result"], kept, None))
    for note in table.notes:
        console.print(cell(note, "dim"))


def _rich(
    table: ResultsTable, columns: list[ResultsColumn], rows: list[ResultsRow], title: str | None
) -> RichTable:
    heading = cell(title) if title else None
    drawn = RichTable(title=heading, title_justify="left", header_style="bold", pad_edge=False, box=None)
    shown = [c for c in columns if c.key not in ("lr_source", "lr_standing")]
    for column in shown:
        head = f"{column.label}\n{column.unit}" if column.unit else column.label
        justify = "right" if column.numeric else "left"
        drawn.add_column(head, justify=justify, no_wrap=column.numeric, overflow="fold")
    for row in rows:
        drawn.add_row(*(cell(row.cells[c.key].text) for c in shown), style="red" if row.failed else None)
    return drawn


def markdown(tables: Iterable[tuple[ResultsTable, str]]) -> str:
    """Return GitHub-flavoured Markdown of tables, each with its verdict above."""
    parts = []
    for table, verdict in tables:
        lines = [f"## {visible.markdown(table.title)}", "", visible.markdown(verdict), ""]
        lines += markdown_lines(
            (c.head for c in table.columns),
            ([row.cells[c.key].text for c in table.columns] for row in table.rows),
            [c.numeric for c in table.columns],
        )
        lines += ["", *(f"- {visible.markdown(note)}" for note in table.notes)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def to_csv(tables: Iterable[ResultsTable]) -> str:
    """Return CSV with the set's title in the first column, numbers in full precision, and blanks for missing values."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    tables = list(tables)
    columns = list(dict.fromkeys(column for table in tables or () for column in table.columns)) or COLUMNS
    writer.writerow(["set", *(f"{c.key} [{c.unit}]" if c.unit else c.key for c in columns)])
    for table in tables:
        for row in table.rows:
            values = [_csv_value(row.cells[c.key].value) if c in table.columns else "" for c in columns]
            writer.writerow([visible.csv_cell(table.title), *values])
    return out.getvalue()


def _csv_value(value: float | str) -> str:
    if isinstance(value, str):
        return visible.csv_cell(value)
    return "" if math.isnan(value) else repr(float(value)).removesuffix(".0")
