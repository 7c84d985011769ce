"""Terminal, JSON, Markdown and page of `optbench paper sumo_theory`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from analysis.comparison.statistics import Interval
from analysis.formatting import significant, to_jsonable
from analysis.paper.theory import findings, polar_bound
from analysis.paper.theory.findings import Theory, within
from analysis.paper.theory.polar_bound import ITERATIONS
from analysis.text_tables import TextTable, markdown_lines, print_table
from harness import visible
from harness.files import atomic
from harness.output import json_document


def document(theory: Theory) -> dict[str, Any]:
    """Return the document of ``--json``; missing numbers are null."""
    return to_jsonable(
        {
            "table": findings.NAME,
            "title": findings.TITLE,
            "arxiv": findings.ARXIV,
            "question": findings.QUESTION,
            "sentence": findings.headline(theory),
            "scope": findings.scope(theory),
            "sentences": findings.sentences(theory),
            "checks": [check._asdict() for check in theory.checks],
            "passed": theory.passed,
            "lemma_3_1": [asdict(row) for row in theory.ranks],
            "lemma_3_2": {
                "rows": [row._asdict() for row in theory.bounds],
                "scans": {key: {**scan._asdict(), "holds": scan.holds} for key, scan in theory.scans.items()},
                "rank_factor": theory.rank_factor._asdict(),
                "band": theory.band._asdict(),
            },
            "figure_1": {
                "condition_numbers": [_entry(row) for row in theory.conditions],
                "spectra": theory.spectra,
            },
            "figure_2": [_entry(row) for row in theory.paired],
            "errors": [_entry(row) for row in theory.error_summaries],
            "one_step": [_entry(row) for row in theory.steps],
            "runs": [folder.as_posix() for folder in theory.runs],
            "runs_read": theory.runs_read,
            "commands": list(findings.COMMANDS),
            "notes": theory.notes,
        }
    )


def _entry(row: Any) -> dict[str, Any]:
    """Return a row with its arm's fields at the top, and intervals as objects."""
    fields = row._asdict()
    arm = fields.pop("arm")
    return {
        **arm._asdict(),
        **{key: asdict(value) if isinstance(value, Interval) else value for key, value in fields.items()},
    }


def show(theory: Theory, stream: TextIO) -> None:
    """Print the sentences, the tables, and the checks."""
    for line in (findings.QUESTION, findings.headline(theory), findings.scope(theory)):
        print(visible.visible(line), file=stream)
    print(file=stream)
    for sentence in findings.sentences(theory):
        print(f"- {visible.visible(sentence)}", file=stream)
    for table in tables(theory):
        print(f"\n{table.title}", file=stream)
        print_table(table, stream)
    for note in _notes(theory):
        print(visible.visible(note), file=stream)


def write(theory: Theory, folder: Path) -> list[Path]:
    """Write sumo_theory.json, .md and .html atomically, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"json": json_document(**document(theory)) + "\n", "md": markdown(theory), "html": page(theory)}
    paths = [folder / f"{findings.NAME}.{ending}" for ending in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        atomic.write_text(path, text)
    return paths


def markdown(theory: Theory) -> str:
    """Return sentences and tables as Markdown."""
    lines = [f"# {findings.TITLE}", "", visible.markdown(findings.QUESTION)]
    lines += [
        "",
        visible.markdown(findings.headline(theory)),
        "",
        visible.markdown(findings.scope(theory)),
        "",
    ]
    lines += [f"- {visible.markdown(sentence)}" for sentence in findings.sentences(theory)]
    for table in tables(theory):
        lines += ["", f"## {visible.markdown(table.title)}", "", *markdown_lines(table.heads, table.rows)]
        if table.caption:
            lines += ["", visible.markdown(table.caption)]
    lines += ["", *(f"- {visible.markdown(note)}" for note in _notes(theory)), ""]
    return "\n".join(lines)


def page(theory: Theory) -> str:
    """Return the page."""
    # plotly takes a second, which the terminal's output does not need.
    from analysis.pages import job_page
    from analysis.paper.theory.plots import all_plots

    return job_page.render(
        command="paper",
        kicker=f"arXiv {findings.ARXIV}",
        title=findings.NAME,
        question=findings.QUESTION,
        headline=findings.headline(theory),
        scope=findings.scope(theory),
        findings=[*findings.sentences(theory), *_how_to_run(theory)],
        notes=_warnings(theory),
        tables=[*tables(theory), _check_table(theory)],
        plots=all_plots(theory),
        settings={"runs": ", ".join(folder.as_posix() for folder in theory.runs)},
    )


def _notes(theory: Theory) -> list[str]:
    passed = [f"passed: {check.name} ({check.detail})" for check in theory.checks if check.passed]
    return [*passed, *_warnings(theory), *_how_to_run(theory)]


def _warnings(theory: Theory) -> list[str]:
    """Return what makes numbers of the page doubtful or leaves some out."""
    failed = [f"FAILED: {check.name} ({check.detail})" for check in theory.checks if not check.passed]
    return [*failed, *theory.notes]


def _how_to_run(theory: Theory) -> list[str]:
    if theory.runs_read:
        return []
    return [
        "no finished runs were read: the figures' runs are made by",
        *findings.COMMANDS,
        f"and shown by optbench paper {findings.NAME} runs=runs/sumo_theory",
    ]


def _check_table(theory: Theory) -> TextTable:
    rows = [[check.name, "passed" if check.passed else "FAILED", check.detail] for check in theory.checks]
    return TextTable(["check", "result", "figure"], rows, "What this page checks of itself")


def tables(theory: Theory) -> list[TextTable]:
    """Return all tables that have rows."""
    found = [_rank_table(theory), _bound_table(theory), _scan_table(theory)]
    found += [_condition_table(theory), _error_table(theory), _replaced_table(theory)]
    found += [_step_table(theory), _paired_table(theory)]
    return [table for table in found if table.rows]


def _rank_table(theory: Theory) -> TextTable:
    steps = sorted(theory.ranks[0].shares)
    heads = ["layer", "ηλ₁", "β", "1 − ηλ₁ > β", *(f"step {step}" for step in steps), "limit"]
    rows = [
        [
            row.layer,
            significant(row.smallest, 2),
            f"{row.beta:g}",
            "yes" if row.holds else "no",
            *(significant(row.shares[step]) for step in steps),
            significant(row.limit) if row.limit > 1e-12 else "0",
            f"{row.bounded_decay:.4f}" if row.holds else "–",
            "–" if row.fitted_decay is None else f"{row.fitted_decay:.4f}",
        ]
        for row in theory.ranks
    ]
    caption = (
        "Share of ‖M‖²_F that the best rank-one approximation leaves out, simulated, and its limit in closed form; its "
        "factor per step in the end, by the lemma's bound and from the closed form."
    )
    return TextTable(
        [*heads, "bound per step", "per step"], rows, "Lemma 3.1: the moment tends to rank one", caption
    )


def _bound_table(theory: Theory) -> TextTable:
    heads = ["κ(A)", "bound", *(iteration.key for iteration in ITERATIONS)]
    rows = [
        [
            significant(row.kappa),
            f"{row.bound:.4f}",
            *(f"{row.largest[i.key]:.3f} / {row.mean[i.key]:.3f}" for i in ITERATIONS),
        ]
        for row in theory.bounds
    ]
    caption = f"Five steps, {polar_bound.SIDE} singular values in equal ratios: ‖E‖₂ / ‖E‖_F/√k."
    return TextTable(heads, rows, "Lemma 3.2: bound and error", caption)


def _scan_table(theory: Theory) -> TextTable:
    rows = []
    for iteration in ITERATIONS:
        scan = theory.scans[iteration.key]
        is_limited = scan.lowest == scan.lowest
        rows.append(
            [
                iteration.key,
                iteration.label,
                iteration.claimed,
                "holds" if scan.holds else "violated",
                f"{scan.violated:,} of {scan.tested:,}",
                f"{max(0.0, scan.excess):.3f}" if not scan.holds else "0",
                f"{scan.lowest:.3g} to {scan.highest:.3g}" if is_limited else "–",
                "yes" if scan.settles < 1e-9 else f"no, {scan.settles:.2f}",
            ]
        )
    heads = [
        "key",
        "iteration",
        "what it is",
        "bound",
        "violations",
        "excess",
        "κ after 5 steps",
        "converges",
    ]
    caption = (
        "κ(A) from 1.001 to 1e8, 0 to 10 steps, three kinds of spectra (equal ratios, one small, one large value). "
        "Last column: largest |1 − p(s)| after 60 steps on [0.1, 1]."
    )
    return TextTable(heads, rows, "Lemma 3.2: for which iteration it holds", caption)


def _condition_table(theory: Theory) -> TextTable:
    rows = [
        [
            row.arm.label,
            str(row.step),
            str(row.matrices),
            significant(row.condition["median"]),
            significant(row.condition["max"]),
            f"{100 * row.above:.0f} %",
            f"{row.residual_share:.3f}",
            significant(row.polar_error),
        ]
        for row in _thinned(theory)
    ]
    heads = [
        "runs",
        "step",
        "moments",
        "κ median",
        "κ max",
        "κ > 10",
        "beyond rank one",
        "polar error",
    ]
    caption = "From moments.parquet, over all hidden matrices and seeds; medians but for the counts and the maximum."
    return TextTable(heads, rows, "Figure 1: condition number of the first moments", caption)


def _thinned(theory: Theory) -> Sequence[findings.ConditionRow]:
    """Return about five steps of each arm; the plot and the JSON document have all."""
    kept = []
    for arm in dict.fromkeys(row.arm for row in theory.conditions):
        rows = [row for row in theory.conditions if row.arm == arm]
        stride = max(1, len(rows) // 5)
        kept += [row for i, row in enumerate(rows) if i % stride == 0 or i == len(rows) - 1]
    return kept


def _error_table(theory: Theory) -> TextTable:
    heads = ["", "moments", "κ 5 %–95 %", "in the band", "error 5 %–95 %", "median", "below", "of error²"]
    heads += ["lifted", "length", "correlation with κ"]
    rows = [
        [
            row.arm.label,
            f"{row.moments} ({row.runs} seeds)",
            f"{significant(row.condition['5 %'])}–{significant(row.condition['95 %'])}",
            f"{100 * row.inside:.0f} %",
            f"{row.measured_low:.3f}–{row.measured_high:.3f}",
            f"{row.measured:.3f}",
            f"{100 * row.small:.1f} %",
            f"{100 * row.small_energy:.1f} %",
            f"{row.lifted:.3f}",
            f"{100 * row.length:.1f} %",
            within(row.rank_correlation),
        ]
        for row in theory.error_summaries
    ]
    caption = (
        "‖O_NS − UVᵀ‖_F/√k of the moments of all checkpoints. In the band: moments without a direction below it. "
        "Below: share of the directions below it, and of the squared error in them. Lifted: median error with these "
        "directions raised to the band. Length: share of the squared error that is a change of length. Correlation: "
        "Spearman, by seed."
    )
    return TextTable(heads, rows, "Where the error of five steps comes from, on real moments", caption)


def _replaced_table(theory: Theory) -> TextTable:
    summaries = theory.error_summaries
    kappas = list(summaries[0].replaced) if summaries else []
    rows = [
        [
            row.arm.label,
            f"{row.measured:.3f}",
            *(f"{row.replaced[k]:.3f}" for k in kappas),
        ]
        for row in summaries
    ]
    caption = "Median error with the real singular vectors, and the real spectrum or one in equal ratios."
    heads = ["", "as it is", *(f"κ = {kappa:g}" for kappa in kappas)]
    return TextTable(heads, rows, "The same moments with another condition number", caption)


def _step_table(theory: Theory) -> TextTable:
    heads = [
        "",
        "loss on",
        "states",
        "exact gains",
        "NS5 − exact",
        "shortened − exact",
        "NS5 − shortened",
        "length",
    ]
    rows = [
        [
            row.arm.label,
            row.split,
            f"{row.states} ({row.difference.n} seeds)",
            f"{row.gain:.4f}",
            within(row.difference),
            within(row.shortened),
            within(row.beyond_length),
            f"{row.length:.3f}",
        ]
        for row in theory.steps
    ]
    caption = (
        "One step from equal states with equal gradients, nats per token; positive: worse. Shortened: the exact step "
        "with the length that the approximate one has along it."
    )
    return TextTable(heads, rows, "What the error costs in one step", caption)


def _paired_table(theory: Theory) -> TextTable:
    rows = [
        [
            row.arm.label,
            f"{row.exact_lr:g}",
            f"{row.newton_schulz_lr:g}",
            str(row.difference.n),
            str(row.step),
            f"{row.exact:.4f}",
            f"{row.newton_schulz:.4f}",
            within(row.difference),
        ]
        for row in theory.paired
    ]
    heads = ["runs", "lr exact", "lr NS5", "seeds", "step", "exact", "NS5", "NS5 − exact"]
    caption = (
        "Validation loss, nats per token; equal but for the factor and the rates shown; 95 % t-interval."
    )
    return TextTable(heads, rows, "Figure 2: what the error costs in a short run", caption)
