"""Write docs/audit.md from the catalogue's entries. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.audit_catalogue.entries import EARLIER, UNAVAILABLE, Entry
from benchmarks.audit_catalogue.special import NOTES, RANKED, REMARKS, UNDERSTATED
from harness.verify.audit.pages import legend, table_text
from harness.verify.audit.tables import MISSING, Table
from optimizers import presets

PAGE = Path(__file__).parents[2] / "docs" / "audit.md"
HEAD = Path(__file__).with_name("head.md")
"""The hand-written part of the page."""
NOT_SHOWN = "not shown"
"""In the place of "safe" where the audit's gradients hide what an update depends on."""
_ORDER = ("wrong", "crashes", "refused", NOT_SHOWN, "safe")
_UNDIVIDED = ("single", "ddp")
"""Engines that give an optimizer all parameters, whole."""
_STAR = "*"
"""Marks a class with a remark."""
_HOME = "optbench"


def text(entries: Sequence[Entry]) -> str:
    """Return the page.

    Args:
        entries: measured, in the order of the page; a package that cannot be imported is one with an error.
    """
    audited = [
        _corrected(entry)
        for entry in entries
        if not entry.error and (entry.cells or entry.passed is not None)
    ]
    parts = [
        HEAD.read_text(encoding="utf-8").rstrip(),
        "## The catalogue",
        _headline(audited),
        _origin(entries),
        _classes(audited),
    ]
    for package in dict.fromkeys(map(package_of, audited)):
        own = [entry for entry in audited if package_of(entry) == package]
        title = next((entry.version for entry in own if entry.version), package)
        notes = [NOTES[package]] if package in NOTES else []
        parts += [f"### {title}", *notes, table_text(_engines(own))]
    remarks = _remarks(audited)
    if remarks.rows:
        parts += ["## Remarks", _REMARKS, table_text(remarks)]
    failed = _failed(audited)
    parts += [
        "## Checks in one process",
        _CHECKS,
        *([table_text(failed)] if failed.rows else ["None failed."]),
    ]
    facts = Table(
        "", ["optimizer", "state", "weight decay", "host syncs"], [_facts(entry) for entry in audited]
    )
    parts += ["## State, weight decay, host syncs", _FACTS, table_text(facts)]
    refused = [[entry.target, entry.error] for entry in entries if entry.error]
    refused += [[name, f"cannot be installed: {reason}"] for name, reason in UNAVAILABLE.items()]
    parts += ["## Not audited", table_text(Table("", ["optimizer or package", "reason"], refused))]
    return "\n\n".join([*parts, "## Terms", legend()]) + "\n"


_REMARKS = f"""\
What a star stands for. *{NOT_SHOWN.capitalize()}*: the runs agree, but with gradients that hide what the update depends
on, so that they say nothing about an engine that deals out the parameters."""

_CHECKS = """\
What failed, and for whom. A check fails where training would be wrong or would stop; `optbench audit` prints the
figures of each. *no gradients* fails where a step in which no parameter has a gradient still counts, so that bias
corrections and warm-ups of later steps differ. *resume at another world size* saves with torch's distributed
checkpoint; the presets of this project have [a way of their own](layouts.md#state-by-name), which its engines use.
Minimal reproductions of defects are in [Defects that the audit found](audit_findings.md)."""

_FACTS = """\
Nothing here is a defect. *State*: bytes per parameter element on six small parameters in fp32. *Host syncs*: what makes
the host wait for a GPU in one step over these parameters, counted on fake CUDA tensors."""


def _corrected(entry: Entry) -> Entry:
    """Return an entry with the class of the formula and without verdicts that its runs cannot give."""
    known = UNDERSTATED.get(entry.target)
    if known is None:
        return entry
    cells = {
        label: NOT_SHOWN if verdict == "safe" and label.split()[0] not in _UNDIVIDED else verdict
        for label, verdict in entry.cells.items()
    }
    return replace(entry, update_class=known.update_class, cells=cells)


def _remarks(entries: Sequence[Entry]) -> Table:
    """Return the table of remarks on the optimizers that have one."""
    rows = [[entry.target, _remark(entry.target)] for entry in entries if _remark(entry.target)]
    return Table("", ["optimizer", "remark"], rows)


def _remark(target: str) -> str:
    """Return what a reader should know of a row; empty: nothing."""
    if target in UNDERSTATED:
        return UNDERSTATED[target].reason
    if target in RANKED:
        options = ", ".join(f"{key}={value!r}" for key, value in RANKED[target].items())
        ranked = f"audited with {options} in the group of its matrices: without a rank it projects nothing"
        return "; ".join(filter(None, (ranked, REMARKS.get(target, ""))))
    return REMARKS.get(target, "")


def package_of(entry: Entry) -> str:
    """Return the package of a target; our presets have none in their names."""
    if entry.target in presets.names():
        return _HOME
    return entry.target.rpartition(".")[0]


def name_of(entry: Entry) -> str:
    """Return a target without its package."""
    return entry.target.rpartition(".")[2]


def _headline(entries: Sequence[Entry]) -> str:
    entries = [entry for entry in entries if entry.cells]
    everywhere = sum(all(verdict == "safe" for verdict in entry.cells.values()) for entry in entries)
    labels = sorted({label for entry in entries for label in entry.cells})
    flat = sum(any(verdict == "wrong" for verdict in entry.cells.values()) for entry in entries)
    checked = [entry for entry in entries if entry.passed is not None]
    clean = sum(not entry.failed for entry in checked)
    train = "trains" if flat == 1 else "train"
    return (
        f"{len(entries)} optimizers on {', '.join(labels)}: **{everywhere} are safe on all of them; {flat} {train} "
        f"something else on at least one, without an error.** {clean} of {len(checked)} fail no check in one process."
    )


def _origin(entries: Sequence[Entry]) -> str:
    """Return which version of the audit measured the rows, and what was not measured."""
    cores: dict[str, list[str]] = {}
    for entry in entries:
        if entry.is_measured:
            cores.setdefault(entry.core, []).append(entry.target)
    by_size = sorted(cores.items(), key=lambda item: -len(item[1]))
    sentences = []
    if len(cores) == 1:
        sentences.append(f"{_version(by_size[0][0]).capitalize()} measured every row.")
    elif cores:
        (main, _), *others = by_size
        sentences.append(f"{_version(main).capitalize()} measured every row, except:")
        sentences += [f"{_version(core)} measured {', '.join(names)}." for core, names in others]
    sentences += [
        f"{_version(core).capitalize()} {EARLIER[core].difference}." for core in cores if core in EARLIER
    ]
    waiting = Counter(package_of(entry) for entry in entries if not entry.is_measured)
    if waiting:
        counts = ", ".join(f"{count} of {package}" for package, count in waiting.items())
        sentences.append(
            f"**{waiting.total()} optimizers are not measured yet** and are in no table: {counts}."
        )
    return " ".join(sentences)


def _version(core: str) -> str:
    return f"the audit whose sources have the digest `{core}`" if core else "an older version of the audit"


def _classes(entries: Sequence[Entry]) -> str:
    counted = Counter(entry.update_class for entry in entries if entry.update_class)
    rows = []
    for name, count in counted.most_common():
        own = [entry for entry in entries if entry.update_class == name]
        row = [str(name), str(count)]
        for engine in ("ddp", "fsdp2", "zero1", "zero3"):
            having = [entry for entry in own if any(_is_of(label, engine) for label in entry.cells)]
            safe = sum(verdict(entry, engine) == "safe" for entry in having)
            row.append(f"{safe} of {len(having)}")
        rows.append(row)
    head = ["class", "optimizers", "safe on ddp", "safe on fsdp2", "safe on zero1", "safe on zero3"]
    return table_text(Table("", head, rows))


def _is_of(label: str, engine: str) -> bool:
    return label == engine or label.startswith(f"{engine} ")


def verdict(entry: Entry, engine: str) -> str:
    """Return the worst verdict on an engine, with the variants that have it unless all do."""
    cells = {label: found for label, found in entry.cells.items() if _is_of(label, engine)}
    if not cells:
        return MISSING
    worst = min(cells.values(), key=_ORDER.index)
    having = [label.partition(" ")[2] or "plain" for label, found in cells.items() if found == worst]
    return worst if len(having) == len(cells) else f"{worst} ({', '.join(having)})"


def _engines(entries: Sequence[Entry]) -> Table:
    engines = list(dict.fromkeys(label.partition(" ")[0] for entry in entries for label in entry.cells))
    rows = [
        [
            name_of(entry),
            (entry.update_class or MISSING) + (_STAR if _remark(entry.target) else ""),
            *(verdict(entry, engine) for engine in engines),
            ", ".join(entry.failed) or (MISSING if entry.passed is not None else "not measured"),
        ]
        for entry in entries
    ]
    return Table("", ["optimizer", "class", *engines, "failed checks"], rows)


def _failed(entries: Sequence[Entry]) -> Table:
    by_check: dict[str, list[str]] = {}
    for entry in entries:
        for check in entry.failed:
            by_check.setdefault(check, []).append(entry.target)
    rows = [[check, str(len(names)), ", ".join(names)] for check, names in sorted(by_check.items())]
    return Table("", ["check", "optimizers", "which"], rows)


def _facts(entry: Entry) -> list[str]:
    """Return the row of one optimizer: what its checks measured, in short."""
    state = entry.facts.get("state bytes", MISSING).replace(" bytes per parameter element", "")
    decay = entry.facts.get("weight decay", MISSING)
    decay = "none" if "have no weight_decay" in decay else decay.partition(":")[0]
    syncs = entry.facts.get("host syncs", "none" if entry.passed is not None else MISSING)
    if "per step" in syncs:
        syncs = syncs.partition(" per step")[0]
    elif syncs not in ("none", MISSING):
        syncs = "not counted"
    return [entry.target, state, decay, syncs]
