"""The comparison table as a model: columns, and a row per arm and per run that did not finish. `renderings`
writes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from analysis import formatting
from analysis.compare.comparison import Arm, ComparisonSet
from analysis.compare.standing_cautions import lr_standing
from analysis.runs.reading import number
from analysis.runs.run import Run
from harness.record.schema import TIME_PARTS


@dataclass(frozen=True)
class Column:
    """``block`` says in which half the column stands where the width does not hold all of them."""

    key: str
    label: str
    unit: str
    meaning: str
    block: str
    numeric: bool = True


@dataclass(frozen=True)
class Cell:
    """``text`` for people, ``value`` for machines: a float (NaN: missing) or the same text."""

    text: str
    value: float | str


@dataclass(frozen=True)
class Row:
    """``arm``: index of the arm. ``failed``: the row of one run that did not finish; its story is in
    ``outcome``.
    """

    arm: int
    failed: bool
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str]


STEP_PARTS = tuple(part for part in TIME_PARTS if part != "probes")

_RESULT, _COST = "result", "cost"
COLUMNS = [
    Column("optimizer", "optimizer", "", "preset, and the options that tell its arms apart", "both", False),
    Column("loss", "val loss", "nats/token", "validation loss at the last step, mean over seeds", _RESULT),
    Column("interval", "± 95 %", "nats/token", "half width of the t-interval of that mean", _RESULT),
    Column("n", "n", "seeds", "runs that finished", _RESULT),
    Column("perplexity", "ppl", "", "exp(val loss)", _RESULT),
    Column("steps_to_target", "to target", "steps", "where the mean curve first reaches the target", _RESULT),
    Column(
        "seconds_to_target", "to target", "s", "the same in seconds, with evaluations and probes", _RESULT
    ),
    Column("lr", "lr", "", "peak learning rate", _RESULT),
    Column(
        "lr_standing",
        "lr is",
        "",
        "tuned (n trials): by optbench sweep; tuned default: found by tuning at this model size; "
        "default tuned at another size; untuned default: published for other sizes or models; "
        "given: by the command line",
        _RESULT,
        False,
    ),
    Column("lr_source", "lr from", "", "where the learning rate came from", _RESULT, False),
    Column("outcome", "outcome", "", "how many runs finished, and what became of the others", _RESULT, False),
    Column("state", "state", "MiB", "optimizer state of rank 0, exact", _COST),
    Column("state_kinds", "state by kind", "MiB", "the same by kind", _COST, False),
    Column("optimizer_ms", "optimizer", "ms/step", "time in the optimizer, mean over steps", _COST),
    Column("step_ms", "step", "ms", "time per step, mean, without evaluation and probes", _COST),
    Column("tokens_per_s", "throughput", "tokens/s", "median over rows, all processes together", _COST),
    Column(
        "peak",
        "peak",
        "MiB",
        "allocator's peak on CUDA, resident set on CPU; max over processes",
        _COST,
    ),
    Column(
        "certificate",
        "certificate",
        "",
        "whether this rule on this engine makes the update that it should (optbench certify), and the replay error; "
        "stale: found with other sources than the run's",
        _COST,
        False,
    ),
]


def build(chosen: ComparisonSet) -> Table:
    """The table of one set: a row per arm, lowest mean loss first, and a row per run that did not finish.

    The order says no more than the numbers do; what is shown of differences is the verdict's.
    """
    ranked = chosen.ranked()
    order = ranked + [i for i in range(len(chosen.arms)) if i not in ranked]
    rows_of = {index: _arm(chosen.arms[index], chosen.target) for index in order}
    rows = []
    for index, cells in rows_of.items():
        arm = chosen.arms[index]
        rows.append(Row(index, False, cells))
        rows.extend(Row(index, True, _failure(arm, run)) for run in arm.runs if not run.finished)
    notes = []
    if math.isfinite(chosen.target):
        worst = next(arm for arm in chosen.arms if arm.final.mean == chosen.target)
        notes.append(
            f"target: {formatting.loss(chosen.target)} nats/token, the mean final loss of {worst.label}"
        )
    if math.isfinite(chosen.entropy):
        notes.append(f"unigram entropy of the corpus: {formatting.loss(chosen.entropy)} nats/token")
    sources: dict[str, list[str]] = {}
    for index in order:
        if (source := rows_of[index]["lr_source"].text) not in ("given", formatting.MISSING):
            sources.setdefault(source, []).append(chosen.arms[index].label)
    for source, labels in sources.items():
        whose = "learning rates" if len(sources) == 1 else f"learning rate of {formatting.listing(labels)}"
        notes.append(f"{whose}: {source}")
    return Table(chosen.title, COLUMNS, rows, notes)


def _arm(arm: Arm, target: float) -> dict[str, Cell]:
    run = (arm.finished or arm.runs)[0]
    kinds, mib = state_kinds(run), 2**20
    finished, curve = len(arm.finished), arm.curve
    perplexity = math.exp(min(arm.final.mean, 700)) if arm.final.n else math.nan
    steps = curve.first_below(target, "steps") if curve else math.nan
    seconds = curve.first_below(target, "seconds") if curve else math.nan
    state = sum(kinds.values()) / mib if kinds else math.nan
    return {
        "optimizer": _word(arm.label),
        "loss": Cell(formatting.loss(arm.final.mean), arm.final.mean),
        "interval": _number(arm.final.half_width, 2),
        "n": Cell(str(finished), float(finished)),
        "perplexity": _number(perplexity, 4),
        "steps_to_target": Cell(formatting.grouped(steps), steps),
        "seconds_to_target": _number(seconds),
        "lr": _number(run.fact("lr")),
        "lr_standing": _word(lr_standing(arm)),
        "lr_source": _word(run.text("lr_source")),
        "outcome": _word(f"{finished} of {len(arm.runs)} finished"),
        "state": _number(state),
        "state_kinds": _word(
            ", ".join(f"{kind} {formatting.significant(size / mib)}" for kind, size in kinds.items())
        ),
        "optimizer_ms": _number(arm.mean_time("optimizer") * 1000),
        "step_ms": _number(arm.mean_time(*STEP_PARTS) * 1000),
        "tokens_per_s": Cell(formatting.grouped(arm.mean("tokens_per_s")), arm.mean("tokens_per_s")),
        "peak": _number(arm.mean("memory_bytes", "peak") / mib),
        "certificate": _word(_certificate(arm)),
    }


def state_kinds(run: Run) -> dict[str, float]:
    """Bytes of the optimizer's state by kind, as far as they are numbers."""
    kinds = run.summary.get("state_bytes")
    sizes = {str(kind): number(size) for kind, size in kinds.items()} if isinstance(kinds, dict) else {}
    return {kind: size for kind, size in sizes.items() if math.isfinite(size)}


def _certificate(arm: Arm) -> str:
    """The certificate of the arm's runs: failed if one failed, none if one has none, else the largest error."""
    found = [run.certified for run in arm.runs]
    if any(c is not None and c.get("passed") is False for c in found):
        return "✗ failed"
    if not all(c is not None and c.get("passed") for c in found):
        return "none"
    errors = [run.replay_error for run in arm.runs if math.isfinite(run.replay_error)]
    stale = " (stale)" if any(c is not None and c.get("current") is False for c in found) else ""
    return (f"✓ {max(errors):.1e}" if errors else "✓") + stale


def _failure(arm: Arm, run: Run) -> dict[str, Cell]:
    """A run that did not finish: whose it is and what became of it; figures it can't vouch for stay blank."""
    cells = {column.key: Cell(formatting.MISSING, math.nan if column.numeric else "") for column in COLUMNS}
    step = f"at step {formatting.grouped(run.steps)}" if math.isfinite(run.steps) else ""
    reason = "" if run.reason.startswith(run.state) and step in run.reason else run.reason
    story = " ".join(part for part in (run.state, step) if part)
    cells["optimizer"] = _word(f"{arm.label} seed {run.seed}")
    cells["lr"] = _number(run.fact("lr"))
    cells["outcome"] = _word(f"{story}: {reason}" if reason else story)
    return cells


def _word(text: str) -> Cell:
    return Cell(text or formatting.MISSING, text)


def _number(value: float, digits: int = 3) -> Cell:
    return Cell(formatting.significant(value, digits), value)
