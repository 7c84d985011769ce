"""The whole job: every checkpoint through the stages, tables, warnings. What was done before is taken up again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from analysis.reconstruction import examination, susceptibility
from analysis.reconstruction.config import Config
from analysis.reconstruction.subjects import (
    TABLES,
    Folder,
    Images,
    Subject,
    TableRow,
    load,
    subjects,
    write_tables,
)
from harness.errors import InputError

Say = Callable[[str], None]


@dataclass
class Results:
    """Tables of a job, and what a reader must be told.

    Attributes:
        tables: name → rows, in the order of `TABLES`.
        examined: the checkpoints that were certified.
        matches: a row per training image and attack (also a file, `matches`).
        warnings: sentences.
    """

    config: Config
    images: Images
    folder: Folder
    tables: dict[str, list[TableRow]] = field(default_factory=lambda: {name: [] for name in TABLES})
    examined: list[Subject] = field(default_factory=list)
    matches: list[TableRow] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def latest(self) -> list[Subject]:
        """The last checkpoint of each optimizer, first seed."""
        found: dict[str, Subject] = {}
        for subject in self.examined:
            held = found.setdefault(subject.optimizer, subject)
            if subject.seed == held.seed and subject.step > held.step:
                found[subject.optimizer] = subject
        return list(found.values())

    @property
    def controls_failed(self) -> bool:
        """Whether every control was seen to be wrong, as it must."""
        return not any(row["passed"] for row in self.tables["alternatives"] if row["is_control"])

    @property
    def exact_passed(self) -> bool:
        """Whether every alternative of an exact KKT network passed (True where there is none)."""
        exact = {s.optimizer for s in self.examined if s.is_exact}
        rows = self.tables["alternatives"]
        return all(r["passed"] for r in rows if r["optimizer"] in exact and not r["is_control"])

    def document(self) -> dict[str, Any]:
        """Content of the JSON document."""
        return {
            "mode": self.config.mode,
            **self.tables,
            "scope": susceptibility.SCOPE,
            "warnings": self.warnings,
        }


def run(config: Config, say: Say) -> Results:
    """Do what `config.stages` names.

    Args:
        say: takes lines for people.

    Raises:
        InputError: bad input, or no checkpoint that separates its images.
    """
    images, network = load(config)
    folder = Folder(config)
    results = Results(config, images, folder)
    refusals: list[InputError] = []
    for subject in subjects(config, images, network, folder, say):
        try:
            row = folder.rows(
                f"{subject.key}-certificate", lambda s=subject: [examination.certify(config, images, s)]
            )
        except InputError as error:
            refusals.append(error)
            results.warnings.append(str(error))
            say(str(error))
            continue
        results.examined.append(subject)
        _examine(config, results, subject, row, say)
    if not results.examined:
        raise refusals[0] if refusals else InputError("stages", config.stages, "left nothing to examine")
    results.tables["susceptibility"] = susceptibility.rows(results.tables["attack"])
    for subject in results.latest() if results.tables["attack"] else ():
        results.matches += examination.matches(config, images, subject, folder)
    write_tables(folder.path, {**results.tables, "matches": results.matches})
    return results


def _examine(
    config: Config, results: Results, subject: Subject, certificate: list[TableRow], say: Say
) -> None:
    images, folder = results.images, results.folder
    if "certificate" in config.stages:
        results.tables["certificate"] += certificate
        say(
            f"{subject.key}: least margin {certificate[0]['margin_min']:.4g}, residual {certificate[0]['residual']:.3g}"
        )
    if "alternatives" in config.stages:
        results.tables["alternatives"] += folder.rows(
            f"{subject.key}-alternatives", lambda: examination.alternatives(config, images, subject, folder)
        )
    if "attack" in config.stages and config.attack.steps:

        def progress(step: int, steps: int) -> None:
            say(f"{subject.key}: attack, step {step} of {steps}")

        results.tables["attack"] += folder.rows(
            f"{subject.key}-attack", lambda: examination.run_attack(config, images, subject, folder, progress)
        )
