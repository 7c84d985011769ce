"""Show certificates to people: a line per cell as it comes, tables at the end, and docs/certificates.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.record.certificates import ENGINES, Cell
from harness.verify import cells, verdict
from harness.verify.grid import PLACES
from harness.verify.session import Certified
from harness.verify.verdict import Result
from harness.visible import markdown_row

MISSING = "–"


def line(result: Result, number: int, total: int) -> Text:
    """Return the line of one cell, as it comes."""
    text = Text(f"[{number}/{total}] {result.cell}: ")
    text.append(*_word(result))
    text.append(
        f"  replay {_figure(result, 'replay_error')}, end to end {_figure(result, 'end_to_end_error')} "
        f"(one ulp {_figure(result, 'noise_floor')})"
    )
    if result.reasons:
        text.append(f"  {result.reasons[0]}", style="dim")
    return text


def _word(result: Result) -> tuple[str, str]:
    if result.cell.is_peer:
        return ("agrees" if result.passed else "differs"), "cyan"
    if result.cell.control:
        return (
            "stays green" if result.passed else "red, as expected"
        ), "bold red" if result.passed else "green"
    return ("green", "green") if result.passed else ("RED", "bold red")


def show(certified: Certified, console: Console) -> None:
    """Print the tables of a session."""
    ours = _ours(certified)
    if ours:
        console.print(_rich(*_worst(ours), "replay error, the worst cell of each rule and engine"))
    if any(result.cell.options for result in ours):
        console.print(_rich(*_options(ours), "replay error, the worst cell of each option value and layout"))
    if ours:
        console.print(
            _rich(*_end_to_end(ours), f"end to end (bound {verdict.END_TO_END_BOUND:g}), and of one ulp")
        )
    for title, head, rows in _lists(certified):
        console.print(_rich(head, rows, title))
    good = sum(result.passed for result in ours)
    controls = [result for result in certified.results if result.cell.control]
    words = [f"{good} of {len(ours)} cells green"]
    if controls:
        words.append(f"{sum(not result.passed for result in controls)} of {len(controls)} controls red")
    console.print(", ".join(words) + f"; {certified.seconds:.0f} s")


def _ours(certified: Certified) -> list[Result]:
    return [result for result in certified.results if not result.cell.control and not result.cell.is_peer]


def _lists(certified: Certified) -> Iterable[tuple[str, list[str], list[list[str]]]]:
    """Yield (title, head, rows) of the tables with one row per cell."""
    red = [r for r in certified.results if not r.passed and not r.cell.control and not r.cell.is_peer]
    if red:
        yield "red cells", ["cell", "why"], [[str(r.cell), "; ".join(r.reasons)] for r in red]
    controls = [r for r in certified.results if r.cell.control]
    if controls:
        rows = [
            [
                r.cell.control,
                cells.CONTROLS[r.cell.control][1],
                _place(r.cell),
                _word(r)[0],
                r.reasons[0] if r.reasons else "",
            ]
            for r in controls
        ]
        yield "controls", ["defect", "what is wrong", "in", "verdict", "by"], rows
    peers = [r for r in certified.results if r.cell.is_peer]
    if peers:
        head = ["peer", "in", "end to end", "replay", "orthogonalizations", "collectives", "verdict", "why"]
        yield (
            "peers",
            head,
            [
                [
                    r.cell.rule,
                    _place(r.cell),
                    _figure(r, "end_to_end_error"),
                    _figure(r, "replay_error"),
                    _count(r, "orthogonalizations_per_step"),
                    _count(r, "collectives_per_step"),
                    _word(r)[0],
                    "; ".join(r.reasons),
                ]
                for r in peers
            ],
        )


def _worst(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return the table rules × engines with the largest replay error of each pair, at the presets' options."""
    results = [result for result in results if not result.cell.options]
    engines = [engine for engine in ENGINES if any(r.cell.engine == engine for r in results)]
    rows = []
    for rule in dict.fromkeys(result.cell.rule for result in results):
        row = [rule]
        for engine in engines:
            row.append(_largest([r for r in results if r.cell.rule == rule and r.cell.engine == engine]))
        rows.append(row)
    return ["rule", *engines], rows


def _options(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return the table option values × places with the largest replay error of the cells of each pair."""
    places = [
        p for p in PLACES if any((r.cell.engine, r.cell.variant) == p and r.cell.options for r in results)
    ]
    rows = []
    for word in sorted({word for result in results for word in result.cell.options.split()}):
        having = [r for r in results if word in r.cell.options.split()]
        row = [_largest([r for r in having if (r.cell.engine, r.cell.variant) == place]) for place in places]
        rows.append([word, ", ".join(dict.fromkeys(r.cell.rule for r in having)), *row])
    return ["option", "under", *(" ".join(filter(None, place)) for place in places)], rows


def _largest(results: Sequence[Result]) -> str:
    """Return the largest replay error of some cells, marked if one is red."""
    known = [r.figures["replay_error"] for r in results if r.figures.get("replay_error") is not None]
    mark = "" if all(r.passed for r in results) else " RED"
    return f"{_short(max(known))}{mark}" if known else mark.strip() or MISSING


def _end_to_end(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return the table rule × (noise floor, largest end-to-end error of its fp32 cells, and where that is)."""
    rows = []
    for rule in dict.fromkeys(result.cell.rule for result in results):
        own = [r for r in results if r.cell.rule == rule and r.cell.dtype == "fp32" and not r.cell.options]
        known = [r for r in own if r.figures.get("end_to_end_error") is not None]
        if known:
            worst = max(known, key=lambda r: r.figures["end_to_end_error"])
            # Of the rule; the worst cell may be one that has none of its own.
            floors = [r.figures["noise_floor"] for r in own if r.figures.get("noise_floor") is not None]
            floor = _short(floors[0]) if floors else MISSING
            rows.append([rule, floor, _figure(worst, "end_to_end_error"), _place(worst.cell)])
    return ["rule", "noise floor", "end-to-end error", "in"], rows


def _place(cell: Cell) -> str:
    words = [cell.rule] if not cell.is_peer else []
    words += [cell.engine, cell.dtype]
    if cell.accumulation > 1:
        words.append(f"accumulation {cell.accumulation}")
    words.append(cell.variant if cell.variant else f"clipping {cell.clipping}")
    return ", ".join(words)


def _figure(result: Result, key: str) -> str:
    value = result.figures.get(key)
    return MISSING if value is None else _short(value)


def _count(result: Result, key: str) -> str:
    value = result.figures.get(key)
    return MISSING if value is None else f"{value:,.0f}"


def _rich(head: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, highlight=False)
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style="bold red" if cell.endswith("RED") else "") for cell in row))
    return table


def markdown(certified: Certified) -> str:
    """Return the text of docs/certificates.md."""
    ours = _ours(certified)
    good = sum(result.passed for result in ours)
    controls = [result for result in certified.results if result.cell.control]
    parts = [
        "# Certificates",
        "Written by `make certify`; do not edit.",
        f"**{good} of {len(ours)} cells green"
        + (
            f", {sum(not r.passed for r in controls)} of {len(controls)} controls red.**"
            if controls
            else ".**"
        ),
        _INTRODUCTION.format(
            steps=cells.STEPS,
            bound=_short(verdict.REPLAY_BOUND, 0),
            multiple=f"{verdict.ROUNDING_MULTIPLE:g}",
            ceiling=_short(verdict.REPLAY_CEILING, 0),
        ),
        "## Replay error, the worst cell of each rule and engine",
        _table(*_worst(ours)),
        *_with_floors(ours),
        _ROUNDED,
        _table(*_rounded(ours)),
        "## End-to-end error and noise floor",
        _NOISE.format(
            bound=_short(verdict.END_TO_END_BOUND, 0),
            multiple=f"{verdict.ROUNDING_MULTIPLE:g}",
            ceiling=f"{verdict.END_TO_END_CEILING:g}",
        ),
        _table(*_end_to_end(ours)),
        *_with_tasks(ours),
        *_on_cuda(ours),
        *_with_options(ours),
        "## Every setting of every engine",
        "The largest error where several rules share a setting.",
        _table(*_settings(ours)),
        "## What the optimizer does in a step",
        "On the worst rank: bytes sent for the optimizer (ring convention, without the reduction of gradients; mean "
        f"over {cells.STEPS} steps with 2 refreshes) and collectives issued (in the step with the most).",
        _table(*_traffic(ours)),
    ]
    for title, head, rows in _lists(certified):
        parts += [f"## {title[0].upper()}{title[1:]}", _table(head, rows)]
        if title == "peers":
            parts.append(_PEERS)
    parts += ["## Machine", _table(["", ""], _machine(certified))]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """\
Each cell trains a LLaMA of 3 layers on the King James Bible for {steps} steps through the harness's own engine and
loop. A recorder stores the gradients that the optimizer receives. *Replay* runs the rule on whole matrices in fp64,
in one process, on these gradients. The replay error is the largest ‖ΔW − ΔW_ref‖_F / ‖ΔW_ref‖_F over the
parameters. A cell is green up to {bound}, which is fp32 rounding. Rules that amplify rounding are green up to
{multiple} times the error of the same replay in fp32, which no engine touches, and up to {ceiling} at most. A green
cell also meets these conditions: the first gradients are those of one fp32 process and have the norm that clipping
leaves; every matrix takes the rule and is orthogonalized once per step, where the rule orthogonalizes; replicas are
bit-equal; in fp32, the weights after four steps are those of one process. Ranks are processes on one CPU machine, over
gloo; nothing here was run on GPUs. Polynomial orthogonalizers
iterate in fp32 here (`optimizer.orthogonalizer_dtype`)."""

_ROUNDED = "With bf16 iterations, the default on devices with bf16 units (not judged):"

_NOISE = """\
The largest difference from one process after four steps, in fp32, next to the same figure between two runs of one
process of which one starts with each weight moved by one ulp: what the rule makes of rounding by itself, with clipping
and at the preset's options. A cell is green up to {bound}, and up to {multiple} times that noise floor ({ceiling} at
most), which is measured with the cell's own clipping and options where it decides. Rules that turn rounding into signs
or choices of columns need the latter; wrong gradients show in their first step."""

_FLOORS = "Cells above {bound}, which are judged by the error of the same replay in fp32, on whole matrices:"

_TASKS = """\
Cells that learn classes or answers from generated rows instead of next tokens, or that train adapters (`lora`), with
two micro-batches in each step. The loss of a task is a mean over examples or over the tokens of answers, of which ranks
and micro-batches hold unequal numbers. Frozen weights are no part of an optimizer; the factors A and B of an adapter
take its rule."""

_ON_CUDA = f"""\
Rules that leave the exact factor to the device take `gram` on CPUs and `dwh` on CUDA. These cells run `dwh`, which
computes the same on a CPU without a host read, with the cut raised to {cells.RAISED_CUT:g} σ1: each moment has
directions at either side of it. The replay takes QR and SVD in fp64 at the same cut, and the one process of the
end-to-end error takes `gram`."""

_OPTIONS = """\
Values that no preset has, each in every class of layouts under a rule that takes it. A cell may have several of them.
"columns" is fsdp2 with matrices sharded along axis 1."""

_PEERS = """\
Errors of a peer are differences from optbench's Muon: end to end from one process in fp32, replay from fp64 on
whole matrices. *Agrees* means that the differences are within those of half-precision iterations. torch's Muon
iterates in bf16, DeepSpeed's on a CPU in fp32. By default, DeepSpeed's Muon clips the orthogonalized update at 1.0
(its `gradient_clipping`, unset). Counts are per step, over all ranks: a matrix across the boundary of two ranks of
ZeRO-1 and 2 is orthogonalized on both."""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([_row(head), _row(["---"] * len(head)), *map(_row, rows)])


def _with_floors(results: Sequence[Result]) -> list[str]:
    """Return the table of cells that were judged by what fp32 does without an engine; nothing where there is none."""
    known = [r for r in results if r.figures.get("replay_floor") is not None]
    if not known:
        return []
    rows = []
    for rule, options in dict.fromkeys((r.cell.rule, r.cell.options) for r in known):
        own = [r for r in known if (r.cell.rule, r.cell.options) == (rule, options)]
        worst = max(own, key=lambda r: r.figures["replay_error"])
        figures = [_figure(worst, "replay_error"), _figure(worst, "replay_floor")]
        rows.append([" ".join(filter(None, (rule, options))), str(len(own)), *figures, _place(worst.cell)])
    head = ["rule and options", "cells", "largest replay error", "of fp32 alone", "in"]
    return [_FLOORS.format(bound=_short(verdict.REPLAY_BOUND, 0)), _table(head, rows)]


def _with_tasks(results: Sequence[Result]) -> list[str]:
    """Return the section on other tasks than pretraining and on adapters; nothing where no such cell was run."""
    known = [r for r in results if cells.task_of(r.cell) or cells.adapter_of(r.cell)]
    if not known:
        return []
    figures = "replay_error", "end_to_end_error", "delivery_error"
    rows = [
        [r.cell.variant, r.cell.rule, r.cell.engine, *(_figure(r, key) for key in figures), _word(r)[0]]
        for r in known
    ]
    head = ["cell", "rule", "engine", "replay error", "end-to-end error", "first gradients", "verdict"]
    return ["## Classification, answers and adapters", _TASKS, _table(head, rows)]


def _on_cuda(results: Sequence[Result]) -> list[str]:
    """Return the section on the exact factor of CUDA; nothing where no such cell was run."""
    known = [result for result in results if result.cell.variant == "dwh"]
    return ["## The exact factor of CUDA", _ON_CUDA, _table(*_worst(known))] if known else []


def _with_options(results: Sequence[Result]) -> list[str]:
    """Return the section on options that differ from the preset's; nothing where no such cell was run."""
    if not any(result.cell.options for result in results):
        return []
    return ["## Options", _OPTIONS, _table(*_options(results))]


def _row(cells_: Sequence[str]) -> str:
    return markdown_row(cells_)


def _short(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}e}".replace("e-0", "e-").replace("e+00", "")


def _rounded(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    known = [r for r in results if r.figures.get("replay_error_bf16_orthogonalizer") is not None]
    engines = [engine for engine in ENGINES if any(r.cell.engine == engine for r in known)]
    rules = dict.fromkeys(r.cell.rule for r in known)
    found = {(r.cell.rule, r.cell.engine): _figure(r, "replay_error_bf16_orthogonalizer") for r in known}
    return ["rule", *engines], [[rule, *(found.get((rule, e), MISSING) for e in engines)] for rule in rules]


def _settings(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    kept = [r for r in results if not r.cell.variant and not r.cell.options and r.cell.world_size != 3]
    settings = sorted({(r.cell.dtype, r.cell.accumulation, r.cell.clipping) for r in kept}, reverse=True)
    head = ["engine", *(f"{d}, accumulation {a}, clipping {c}" for d, a, c in settings)]
    rows = []
    for engine in ENGINES:
        row = [engine]
        for setting in settings:
            same = [
                r
                for r in kept
                if r.cell.engine == engine and (r.cell.dtype, r.cell.accumulation, r.cell.clipping) == setting
            ]
            row.append(_largest(same))
        rows.append(row)
    return head, rows


def _traffic(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    kept = [r for r in results if r.cell.variant in ("", "split") and not r.cell.options]
    order = list(ENGINES)
    kept.sort(key=lambda r: (r.cell.world_size == 3, r.cell.variant, order.index(r.cell.engine), r.cell.rule))
    names = list(dict.fromkeys(_engine(r.cell) for r in kept))
    rows = []
    for rule in sorted({r.cell.rule for r in kept}):
        by_engine = {_engine(r.cell): r for r in kept if r.cell.rule == rule}
        row = [rule]
        for name in names:
            known = by_engine.get(name)
            row.append(
                f"{_count(known, 'bytes_per_step')} / {_count(known, 'collectives_per_step')}"
                if known
                else MISSING
            )
        rows.append(row)
    return ["rule", *names], rows


def _engine(cell: Cell) -> str:
    more = ", split work" if cell.variant else ""
    return f"{cell.engine}{more} ({cell.world_size})"


def _machine(found: Certified) -> list[list[str]]:
    rows = []
    for key, value in found.machine.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
        rows.append([key.replace("_", " "), text])
    return [*rows, ["time", f"{found.seconds:.0f} s for all of it"]]
