"""The whole job: every checkpoint through the stages, tables, warnings. What was done before is taken up again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from analysis.reconstruction import examination, susceptibility
from analysis.reconstruction.config import ReconstructionConfig
from analysis.reconstruction.subjects import (
    TABLES,
    ImageSet,
    JobFolder,
    Subject,
    TableRow,
    load,
    subjects,
    write_tables,
)
from harness.errors import InputError

Say = Callable[[str], None]


@dataclass
class ReconstructionResults:
    """Tables of a job, and what a reader must be told.

    Attributes:
        tables: name → rows, in the order of `TABLES`.
        examined: the checkpoints that were certified.
        matches: a row per training image and attack (also a file, `matches`).
        warnings: sentences.
    """

    config: ReconstructionConfig
    images: ImageSet
    folder: JobFolder
    tables: dict[str, list[TableRow]] = field(default_factory=lambda: {name: [] for name in TABLES})
    examined: list[Subject] = field(default_factory=list)
    matches: list[TableRow] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def latest(self) -> list[Subject]:
        """Return the last checkpoint of each optimizer, first seed."""
        latest: dict[str, Subject] = {}
        for subject in self.examined:
            other = latest.setdefault(subject.optimizer, subject)
            if subject.seed == other.seed and subject.step > other.step:
                latest[subject.optimizer] = subject
        return list(latest.values())

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
        """Return the content of the JSON document."""
        return {
            "mode": self.config.mode,
            **self.tables,
            "scope": susceptibility.SCOPE,
            "warnings": self.warnings,
        }


def run(config: ReconstructionConfig, say: Say) -> ReconstructionResults:
    """Run the stages that `config.stages` names on every subject.

    Args:
        say: takes lines for people.

    Raises:
        InputError: bad input, or no checkpoint that separates its images.
    """
    images, network = load(config)
    folder = JobFolder(config)
    results = ReconstructionResults(config, images, folder)
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
    config: ReconstructionConfig,
    results: ReconstructionResults,
    subject: Subject,
    certificate: list[TableRow],
    say: Say,
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
