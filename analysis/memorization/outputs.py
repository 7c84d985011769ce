"""The answer of a memorization job: sentences, tables, checks, JSON, Markdown and page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis import formatting
from analysis.comparison.memorization import FILE
from analysis.comparison.sets import ComparisonSet
from analysis.formatting import listing, p_value, plural, significant, to_jsonable
from analysis.memorization import equal_loss, exposure, plots
from analysis.memorization.config import MemorizeConfig
from analysis.memorization.windows import CorpusView
from analysis.pages import job_page
from analysis.text_tables import TextTable, markdown_lines
from harness import visible
from harness.files import atomic
from harness.output import json_document

ALPHA = 0.05
QUESTION = "Does the optimizer change what the language model memorizes?"

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Memorization:
    """A finished job.

    Attributes:
        title: model, budget and data of the runs.
        key: that all runs share (`ComparisonSet.key`).
        config: the keys.
        results: one per checkpoint.
        comparison: as `equal_loss.compare`.
        dose: as `equal_loss.dose`.
        costs: final loss, speed and memory of each optimizer, as `_costs`.
        checks: "name", "passed" and "detail" each.
        notes: what a reader must know before believing a number.
    """

    title: str
    key: str
    config: MemorizeConfig
    results: Rows
    comparison: Rows
    dose: Rows
    costs: Rows
    checks: Rows
    notes: Sequence[str]

    @property
    def passed(self) -> bool:
        """True if all checks passed."""
        return all(check["passed"] for check in self.checks)


def judge(runs: ComparisonSet, config: MemorizeConfig, view: CorpusView, results: Rows) -> Memorization:
    """Compare the results of all checkpoints and check the null."""
    comparison = equal_loss.compare(results, config.val_loss)
    levels = [entry["val_loss"] for entry in comparison]
    return Memorization(
        title=runs.title,
        key=runs.key,
        config=config,
        results=results,
        comparison=comparison,
        dose=equal_loss.dose(results, min(levels)) if levels else [],
        costs=_costs(runs),
        checks=check_null(results),
        notes=_notes(config, view, results),
    )


def _costs(runs: ComparisonSet) -> list[dict[str, Any]]:
    """Return what `optbench compare` reports of each optimizer, means over its finished runs; NaN where unknown."""
    return [
        {
            "optimizer": arm.label,
            "final_val_loss": arm.final.mean,
            "tokens_per_s": arm.mean("tokens_per_s"),
            "peak_memory_bytes": arm.mean("memory_bytes", runs.peak_kind),
        }
        for arm in runs.arms
    ]


def check_null(results: Rows) -> list[dict[str, Any]]:
    """Check that canaries in no document are exposed as by chance: else the null was trained on, or is no null."""
    known = [r for r in results if r["exposure"]]
    if not known:
        return []
    expected, _ = exposure.of_random_guesses(exposure.ALTERNATIVES)
    names = [c["name"] for c in known[0]["canaries"] if not c["copies"]]
    # One model at a time; averaged over models, since checkpoints of a run and runs of a corpus resemble each other.
    table = [[c["exposure"] for c in r["canaries"] if not c["copies"]] for r in known]
    mean = float(np.mean(table))
    low, high = exposure.band_of_random_guesses(exposure.ALTERNATIVES, len(names))
    detail = (
        f"{mean:.2f} bits on average, of chance {expected:.2f}, in 999 of 1,000 cases {low:.2f} to {high:.2f} "
        f"({len(names)} canaries)"
    )
    return [
        {
            "name": "held-out canaries are exposed as by chance",
            "passed": low <= mean <= high,
            "detail": detail,
        }
    ]


def _notes(config: MemorizeConfig, view: CorpusView, results: Rows) -> list[str]:
    notes = []
    if not view.inserted:
        notes.append("No exposure: these runs were trained without canaries (data.canaries.count).")
    if view.cut_copies.any():
        parts = []
        for copies in sorted({canary.copies for canary in view.inserted}):
            of_group = np.array([canary.copies == copies for canary in view.inserted])
            parts.append(f"{view.cut_copies[of_group].sum()} of {copies * of_group.sum()} at ×{copies}")
        notes.append(
            f"Copies of canaries that no row holds whole, for all optimizers alike: {listing(parts)}."
        )
    curves = equal_loss.run_curves(results)
    reached = equal_loss.common_range(curves)
    if reached is None:
        notes.append(
            "No comparison at equal loss: no validation loss was passed by every run between two checkpoints."
        )
    elif config.val_loss is not None:
        outside = [level for level in config.val_loss if not reached[0] <= level <= reached[1]]
        if outside:
            text = listing([f"{level:g}" for level in outside])
            notes.append(
                f"val_loss={text} left out: every run passed {reached[0]:.4f} to {reached[1]:.4f} only."
            )
    if reached is not None:
        worst = equal_loss.limiting(curves)
        notes.append(
            f"The lowest loss to compare at is {reached[0]:.4f}, that of {worst.optimizer}, seed {worst.seed}: "
            "of all runs it came down least."
        )
        notes += _design(equal_loss.compare(results, config.val_loss))
    seeds = min(
        (sum(c.optimizer == name for c in curves) for name in {c.optimizer for c in curves}), default=0
    )
    if seeds < 2:
        notes.append("One seed: differences between optimizers have no interval and are no result.")
    if min(r["epochs"] for r in results) < 1:
        notes.append("Checkpoints before the end of the first epoch have seen a part of the copies only.")
    return notes


def _design(comparison: Rows) -> list[str]:
    """Return which pairs are tested."""
    planned = sum(pair["planned"] for entry in comparison for pair in entry["pairs"])
    if planned:
        return [
            f"Tested are {plural(planned, 'planned difference')}: to {equal_loss.BASELINE}, in exposure. "
            "All others are descriptive: their intervals are single ones of 95 %, some of which exclude 0 by chance."
        ]
    return [f"Nothing is tested: planned are differences to {equal_loss.BASELINE} in exposure."]


def headline(job: Memorization) -> str:
    """Return the answer in a sentence: which planned differences at equal loss are larger than chance explains."""
    pairs = [(entry, pair) for entry in job.comparison for pair in entry["pairs"] if pair["planned"]]
    if not pairs:
        return "Not tested: no planned comparison; see the notes."
    if all(pair["p"] is None for _, pair in pairs):
        if all(pair["seeds"] < 2 for _, pair in pairs):
            return "Not tested: one seed."
        return (
            "Not tested: a single canary per number of copies, or differences that do not vary between seeds."
        )
    found = [(e, p) for e, p in pairs if p["p_holm"] is not None and p["p_holm"] < ALPHA]
    level = significant(min(entry["val_loss"] for entry in job.comparison), 4)
    if not found:
        return (
            f"At validation loss {level}, none of {plural(len(pairs), 'planned difference')} between optimizers is "
            "larger than chance explains; that does not show that there is none."
        )
    parts = []
    for entry, pair in sorted(found, key=lambda item: item[1]["p_holm"])[:3]:
        more, less = (pair["a"], pair["b"]) if pair["difference"] > 0 else (pair["b"], pair["a"])
        parts.append(f"{more} above {less} in {entry['title']} by {significant(abs(pair['difference']))}")
    return (
        f"At equal validation loss ({level}), {len(found)} of {plural(len(pairs), 'planned difference')} between "
        f"optimizers {'is' if len(found) == 1 else 'are'} larger than chance explains (Holm, 5 %); "
        f"the clearest: {'; '.join(parts)}."
    )


def scope(job: Memorization) -> str:
    """Return what the answer rests on."""
    curves = equal_loss.run_curves(job.results)
    seeds = sorted({curve.seed for curve in curves})
    canaries = {c["copies"] for c in job.results[0]["canaries"] if c["copies"]}
    kinds = f"canaries with {listing([str(n) for n in sorted(canaries)])} copies, " if canaries else ""
    return (
        f"{job.title}. {plural(len(curves), 'run')} over {plural(len(seeds), 'seed')}, {len(job.results)} checkpoints; "
        f"{kinds}one corpus. Intervals are 95 %: of optimizers over seeds, of differences in exposure over seeds and "
        "canaries, of a single checkpoint over canaries or rows."
    )


def tables(job: Memorization) -> list[TextTable]:
    """Return the comparison, the pairs that differ, the dose and the last checkpoints."""
    shown = []
    levels = list(dict.fromkeys(entry["val_loss"] for entry in job.comparison))
    for level in levels:
        entries = [entry for entry in job.comparison if entry["val_loss"] == level]
        names = [arm["optimizer"] for arm in entries[0]["optimizers"]]
        rows = [[entry["title"], *(_with_interval(arm) for arm in entry["optimizers"])] for entry in entries]
        costs = {cost["optimizer"]: cost for cost in job.costs}
        rows += [
            ["final validation loss", *(formatting.loss(costs[name]["final_val_loss"]) for name in names)],
            ["tokens per second", *(significant(costs[name]["tokens_per_s"]) for name in names)],
            ["peak memory", *(formatting.size(costs[name]["peak_memory_bytes"]) for name in names)],
        ]
        title = f"Memorization at validation loss {level:.4f}"
        shown.append(TextTable(["measure", *names], rows, title, "Mean over seeds [95 % interval]."))
    baselines = {r["optimizer"] for r in job.results if r["preset"] == equal_loss.BASELINE}
    pairs = [
        (entry, pair)
        for entry in job.comparison
        for pair in entry["pairs"]
        if not baselines or {pair["a"], pair["b"]} & baselines
    ]
    if pairs:
        rows = [
            [
                entry["title"],
                f"{pair['a']} − {pair['b']}",
                _with_interval({**pair, "mean": pair["difference"]}),
                str(pair["seeds"]),
                "–" if pair["p_holm"] is None else p_value(pair["p_holm"]),
            ]
            for entry, pair in pairs
        ]
        heads = ["measure", "pair", "difference [95 % interval]", "seeds", "p (Holm)"]
        caption = (
            "Paired by seed. Of exposures over seeds and canaries, which are both samples; of others over seeds, with "
            "the same rows for all. p adjusted over the planned pairs; rows without p are descriptive. "
            f"{FILE} has all pairs of optimizers."
        )
        shown.append(TextTable(heads, rows, "Differences", caption))
    if job.dose:
        rows = [
            [d["optimizer"], str(d["ranks"]), d["measure"], _with_interval({**d, "mean": d["per_doubling"]})]
            for d in job.dose
        ]
        shown.append(
            TextTable(["optimizer", "ranks", "measure", "change per doubling"], rows, "Rank as dose")
        )
    shown.append(_last_checkpoints(job.results))
    return shown


def _last_checkpoints(results: Rows) -> TextTable:
    last: dict[tuple[str, int], Mapping[str, Any]] = {}
    for result in results:
        last[result["optimizer"], result["seed"]] = result
    copies = [group["copies"] for group in results[0]["exposure"]]
    heads = ["run", "step", "epochs", "val loss", "train loss", *(f"exposure ×{n}" for n in copies)]
    heads += [
        "AUC",
        "AUC of a bigram model (chance)",
        "TPR at 1 % FPR",
        "tokens right, train",
        "validation",
        "whole rows, train",
        "signed head margin",
        "embedding radius",
        "validation tokens right, where these were measured",
    ]
    rows = []
    for (name, seed), r in last.items():
        found, member, robust = r["extraction"], r["membership"], r["robustness"]
        rows.append(
            [
                f"{name}, seed {seed}",
                str(r["step"]),
                f"{r['epochs']:.2f}",
                f"{r['val_loss']:.4f}",
                f"{r['train_loss']:.4f}",
                *(_with_interval(group) for group in r["exposure"]),
                _with_interval({**member, "mean": member["auc"]}),
                "–"
                if not (by_chance := member["chance"])
                else _with_interval({**by_chance, "mean": by_chance["auc"]}),
                f"{member['tpr_at_1_fpr']:.3f}",
                f"{found['train']['tokens_right']:.3f}",
                f"{found['validation']['tokens_right']:.3f}",
                f"{found['train']['whole']:.3f}",
                *(
                    _with_interval({**robust[key], "mean": robust[key]["median"]})
                    for key in ("head_margin", "embedding_radius")
                ),
                f"{robust['tokens_right']:.3f}",
            ]
        )
    caption = (
        "At equal steps, not at equal loss. ×0: canaries in no document, the level of chance. The bigram model saw no "
        "row: what it separates is how easy the documents are."
    )
    return TextTable(heads, rows, "Last checkpoint of each run", caption).transposed()


def document(job: Memorization) -> dict[str, Any]:
    """Return the JSON document: `{"runs": […], "comparison": […], "dose", "costs", "checks", "notes"}`.

    `analysis.comparison.memorization` reads "comparison_key", "comparison" and "costs".
    """
    return to_jsonable(
        {
            "question": QUESTION,
            "answer": headline(job),
            "rests_on": scope(job),
            "comparison_key": job.key,
            "runs": list(job.results),
            "comparison": list(job.comparison),
            "dose": list(job.dose),
            "costs": list(job.costs),
            "checks": list(job.checks),
            "notes": list(job.notes),
        }
    )


def markdown(job: Memorization) -> str:
    """Return question, answer, scope, notes, checks and tables as Markdown."""
    lines = [f"**{QUESTION}**", "", visible.markdown(headline(job)), "", visible.markdown(scope(job)), ""]
    lines += [f"- {visible.markdown(note)}" for note in [*job.notes, *_check_lines(job)]]
    for table in tables(job):
        lines += ["", f"## {visible.markdown(table.title)}", "", *markdown_lines(table.heads, table.rows)]
        lines += ["", visible.markdown(table.caption)] if table.caption else []
    return "\n".join(lines) + "\n"


def page(job: Memorization) -> str:
    """Return the content of memorize.html."""
    return job_page.render(
        command="memorize",
        kicker="Memorization",
        title=job.title,
        question=QUESTION,
        headline=headline(job),
        scope=scope(job),
        notes=[*job.notes, *_check_lines(job)],
        tables=tables(job),
        plots=plots.all_plots(job.results, job.comparison),
        settings={key: str(value) for key, value in job.config.model_dump().items() if value is not None},
    )


def write(job: Memorization, folder: Path) -> list[Path]:
    """Write memorize.json, memorize.md and memorize.html; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"json": json_document(**document(job)), "md": markdown(job), "html": page(job)}
    paths = [folder / Path(FILE).with_suffix(f".{kind}") for kind in contents]
    for path, content in zip(paths, contents.values()):
        atomic.write_text(path, content)
    return paths


def _check_lines(job: Memorization) -> list[str]:
    return [
        f"{'Check passed' if c['passed'] else 'CHECK FAILED'}: {c['name']}: {c['detail']}."
        for c in job.checks
    ]


def _with_interval(values: Mapping[str, Any]) -> str:
    mean = values["mean"]
    if mean is None:
        return "–"
    return f"{mean:.3g} {_ends(values['low'], values['high'])}".rstrip()


def _ends(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{low:.3g}, {high:.3g}]"
