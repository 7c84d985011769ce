"""The answer of `watch`: findings, a table with a line for each kind of parameter, and a verdict in one sentence."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.verify.watch.claims import SCALES
from harness.verify.watch.findings import DEFECTS, NO_RULE, Finding, Parameter, Whole, scale_names

SCHEMA_VERSION = 1
COLUMNS = ("parameters", "n", "expected", "found", "scale", "decay", "left over", "verdict")


@dataclass
class Report:
    """What `watch` found; filled after the last recorded update, on rank 0.

    Attributes:
        steps: updates that were recorded.
        findings: defects and remarks, see `DEFECTS`.
        parameters: every parameter that was recorded, with its explanation.
        left_out: parameters that were not recorded, to stay within the memory bound.
        optimizers: facts of each optimizer: class, gradient norms, clipping.
        is_reporter: False on the other ranks, whose reports stay empty.
        is_finished: True once the updates are compared.
        error: of the comparison, if it failed; a warning has its traceback.
    """

    steps: int = 0
    findings: list[Finding] = field(default_factory=list)
    parameters: list[Parameter] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    optimizers: list[Whole] = field(default_factory=list)
    is_reporter: bool = True
    is_finished: bool = False
    error: str | None = None

    @property
    def defects(self) -> list[Finding]:
        """Return the findings that make the optimizer wrong."""
        return [finding for finding in self.findings if finding.is_defect]

    @property
    def is_right(self) -> bool | None:
        """Return True or False; None where nothing could be decided."""
        if self.error:
            return None
        if self.defects:
            return False
        return True if self._decided and not self._unknown else None

    @property
    def _decided(self) -> list[Parameter]:
        return [p for p in self.parameters if p.explanation.moved]

    @property
    def _unknown(self) -> list[Parameter]:
        """Return the parameters of optimizers whose rule is not known."""
        return [p for p in self.parameters if NO_RULE in p.found]

    @property
    def answer(self) -> str:
        """Return the verdict in one sentence."""
        what = " and ".join(dict.fromkeys(whole.who for whole in self.optimizers)) or "the optimizer"
        if not self.is_reporter:
            return "rank 0 has the report"
        if self.is_right is None:
            reason = "no parameter moved as far as rounding shows" if self.steps else "no update was recorded"
            if self._unknown:
                who = dict.fromkeys(p.claim.who for p in self._unknown)
                reason = f"no rule is known for {' and '.join(who)}; name one with rule="
            reason = self.error or reason
            return f"{what}: undecided, because {reason}"
        if self.is_right:
            count, every = len(self._decided), len(self.parameters)
            which = f"all {every}" if count == every else f"{count} of {every}"
            rest = "" if count == every else "; the others show nothing"
            return f"{what} is right: yes, {which} parameters moved as claimed in {self.steps} updates{rest}"
        reasons = "; ".join(f"{f.name} ({f.message})" for f in self.defects)
        return f"{what} is right: no, because of {reasons}"

    def rows(self) -> list[dict[str, str]]:
        """Return a row for each kind of parameter: those of one name up to layer numbers, claim, result and verdict."""
        kinds: dict[tuple[str, ...], list[Parameter]] = {}
        for p in self.parameters:
            key = (_pattern(p.name), _expected(p), _found(p), _scale(p), _decay(p), _verdict(p))
            kinds.setdefault(key, []).append(p)
        rows = []
        for (pattern, *rest, verdict), members in kinds.items():
            left = max((p.explanation.residual for p in members), default=float("nan"))
            cells = (pattern, str(len(members)), *rest, f"{left:.1%}" if left == left else "", verdict)
            rows.append(dict(zip(COLUMNS, cells, strict=True)))
        return rows

    def table(self) -> str:
        """Return the table, the gradient norms and the answer as text."""
        rows = [dict(zip(COLUMNS, COLUMNS)), *self.rows()]
        width = {c: max(len(row[c]) for row in rows) for c in COLUMNS}
        lines = ["  ".join(row[c].ljust(width[c]) for c in COLUMNS).rstrip() for row in rows]
        lines += [_norms(whole) for whole in self.optimizers]
        if self.left_out:
            lines.append(f"not recorded, to stay within max_bytes: {len(self.left_out)} parameters")
        lines += [f"{'defect' if f.is_defect else 'note'}: {f.name}: {f.message}" for f in self.findings]
        return "\n".join([*lines, self.answer])

    __str__ = table

    def as_dict(self) -> dict[str, Any]:
        """Return everything but tensors, for JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "right": self.is_right,
            "answer": self.answer,
            "steps": self.steps,
            "findings": [
                {
                    "name": f.name,
                    "meaning": f.meaning,
                    "message": f.message,
                    "parameters": list(f.parameters),
                    "defect": f.is_defect,
                }
                for f in self.findings
            ],
            "parameters": [_parameter(p) for p in self.parameters],
            "not_recorded": self.left_out,
            "optimizers": [
                {
                    "class": whole.who,
                    "max_norm": _number(whole.max_norm),
                    "received_norms": [_number(f.received_norm) for f in whole.facts],
                    "raw_norms": [_number(f.raw_norm) for f in whole.facts],
                    "micro_batches": [f.micro_batches for f in whole.facts],
                }
                for whole in self.optimizers
            ],
        }

    def json(self) -> str:
        """Return `as_dict` as JSON."""
        return json.dumps(self.as_dict(), indent=1, allow_nan=False)

    def html(self, path: str | Path) -> Path:
        """Write one page without scripts, and return its path."""
        cells = "".join(f"<th>{c}</th>" for c in COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(row[c])}</td>" for c in COLUMNS) + "</tr>"
            for row in self.rows()
        )
        found = "".join(
            f"<li><b>{html.escape(f.name)}</b>: {html.escape(f.message)}</li>" for f in self.findings
        )
        page = (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>Is my optimizer right?</title>'
            "<style>body{font:15px system-ui;margin:2rem}td,th{padding:.3rem .8rem;text-align:left;"
            "border-bottom:1px solid #ccc}</style>"
            f"<h1>{html.escape(self.answer)}</h1><ul>{found}</ul>"
            f"<table><tr>{cells}</tr>{body}</table></html>"
        )
        path = Path(path)
        path.write_text(page, encoding="utf-8")
        return path


def _pattern(name: str) -> str:
    """Return a parameter's name with its layer numbers replaced."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)


def _expected(p: Parameter) -> str:
    claim = p.claim
    if claim.kind == "matrix":
        scale = f", {claim.scale}" if claim.scale else ""
        return f"{claim.preset or 'Muon'}{scale}"
    return claim.preset or {"adamw": "AdamW", "sgd": "SGD", "lion": "Lion"}.get(claim.kind, "not stated")


def _found(p: Parameter) -> str:
    return p.explanation.detail


def _scale(p: Parameter) -> str:
    """Return the documented factor that was found, else the measured one."""
    e = p.explanation
    if e.rule != "orthogonalized":
        return f"{round(e.fits[0].scale, 2):g}" if e.fits else ""
    texts = []
    for shape, fit in zip(e.shapes, e.fits):
        known = scale_names(fit.scale / p.claim.alpha, shape) if fit.scales else []
        name = p.claim.scale if p.claim.scale in known else known[0] if known else None
        if name is None:
            texts.append(f"{fit.scale:.3g}" if fit.scales else "")
        else:
            texts.append(f"{p.claim.alpha * SCALES[name][1](*shape):.3g} ({name})")
    return ", ".join(dict.fromkeys(texts))


def _decay(p: Parameter) -> str:
    """Return the weight decay: the claimed one if the measured one is that within its error."""
    e = p.explanation
    if not e.fits or e.rule in ("preset", "unexplained", "undecided"):
        return ""
    if e.coupled:
        return f"{e.coupled:g} in the gradient"
    differs = {"another weight decay", "weight decay in the gradient"}.intersection(p.found)
    return f"{e.decay[0]:.3g}" if differs else f"{p.claim.decay:g}"


def _verdict(p: Parameter) -> str:
    if p.found:
        wrong = [name for name in p.found if name in DEFECTS]
        return "; ".join(wrong) or ("" if NO_RULE in p.found else "right; ") + "; ".join(p.found)
    return p.explanation.rule if p.explanation.rule in ("undecided", "still", "no gradient") else "right"


def _norms(whole: Whole) -> str:
    """Return the gradient norms of an optimizer as a line."""
    received = " ".join(f"{f.received_norm:.3g}" for f in whole.facts)
    raw = [f.raw_norm for f in whole.facts if f.raw_norm is not None]
    text = f"{whole.who}: gradient norm received {received}"
    if raw:
        text += ", before clipping " + " ".join(f"{value:.3g}" for value in raw)
    return text + (f", bound {whole.max_norm:g}" if whole.max_norm else ", no clipping seen")


def _parameter(p: Parameter) -> dict[str, Any]:
    e = p.explanation
    known = [
        scale_names(fit.scale / p.claim.alpha, shape) if fit.scales else []
        for shape, fit in zip(e.shapes, e.fits)
    ]
    return {
        "name": p.name,
        "shape": list(p.record.shape),
        "claimed": p.claim.kind,
        "by": p.claim.who,
        "rule": e.rule,
        "detail": e.detail,
        "orthogonalizer": e.factor,
        "cut": e.partition.label if e.partition else None,
        "momentum": e.momentum.mu if e.momentum else None,
        "nesterov": e.momentum.nesterov if e.momentum else None,
        "gradients": e.gradients,
        "scales": [_number(fit.scale) for fit in e.fits],
        "documented_scales": [[SCALES[name][0] for name in names] for names in known],
        "decay": _number(e.decay[0]) if e.fits else None,
        "residual": _number(e.residual),
        "tolerance": _number(e.tolerance),
        "runner_up": {"detail": e.runner_up[0], "residual": _number(e.runner_up[1])},
        "defects": list(p.found),
    }


def _number(value: float | None) -> float | None:
    """Return a finite number, or None: JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None


def merged(findings: Iterable[Sequence[Finding]]) -> list[Finding]:
    """Return the findings of all optimizers, defects first."""
    return sorted((f for each in findings for f in each), key=lambda f: not f.is_defect)
