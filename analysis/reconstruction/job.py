"""The whole job: every checkpoint through the stages, tables, warnings. Stored parts are taken up again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from analysis.reconstruction import susceptibility
from analysis.reconstruction.config import ReconstructionConfig
from analysis.reconstruction.examination import Examination
from analysis.reconstruction.subjects import (
    TABLES,
    ImageSet,
    JobFolder,
    TableRow,
    load,
    subjects,
    write_tables,
)
from harness.errors import InputError

Say = Callable[[str], None]


@dataclass
class ReconstructionResults:
    """Tables and warnings of a job.

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
    examined: list[Examination] = field(default_factory=list)
    matches: list[TableRow] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def latest(self) -> list[Examination]:
        """Return the examination of the last checkpoint of each optimizer, first seed."""
        latest: dict[str, Examination] = {}
        for examination in self.examined:
            subject = examination.subject
            other = latest.setdefault(subject.optimizer, examination).subject
            if subject.seed == other.seed and subject.step > other.step:
                latest[subject.optimizer] = examination
        return list(latest.values())

    @property
    def controls_failed(self) -> bool:
        """True if every control was refused, as it must be."""
        return not any(row["passed"] for row in self.tables["alternatives"] if row["is_control"])

    @property
    def exact_passed(self) -> bool:
        """True if every alternative of an exact KKT network passed, or there is none."""
        exact = {e.subject.optimizer for e in self.examined if e.subject.is_exact}
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
        say: takes lines of progress.

    Raises:
        InputError: bad input, or no checkpoint that separates its images.
    """
    images, network = load(config)
    folder = JobFolder(config)
    results = ReconstructionResults(config, images, folder)
    refusals: list[InputError] = []
    for subject in subjects(config, images, network, folder, say):
        examination = Examination(config, images, subject, folder)
        try:
            certificate = folder.rows(f"{subject.key}-certificate", examination.certificate_rows)
        except InputError as error:
            # The other subjects are examined without it; a job with none left fails with the first refusal.
            refusals.append(error)
            results.warnings.append(str(error))
            say(str(error))
            continue
        results.examined.append(examination)
        _run_stages(examination, certificate, results, say)
    if not results.examined:
        raise refusals[0] if refusals else InputError("stages", config.stages, "left nothing to examine")
    results.tables["susceptibility"] = susceptibility.rows(results.tables["attack"])
    for examination in results.latest() if results.tables["attack"] else ():
        results.matches += examination.match_rows()
    write_tables(folder.path, {**results.tables, "matches": results.matches})
    return results


def _run_stages(
    examination: Examination, certificate: list[TableRow], results: ReconstructionResults, say: Say
) -> None:
    config, folder, key = examination.config, examination.folder, examination.subject.key
    if "certificate" in config.stages:
        results.tables["certificate"] += certificate
        margin, residual = certificate[0]["margin_min"], certificate[0]["residual"]
        say(f"{key}: least margin {margin:.4g}, residual {residual:.3g}")
    if examination.makes_alternatives:
        results.tables["alternatives"] += folder.rows(f"{key}-alternatives", examination.alternative_rows)
    if "attack" in config.stages and config.attack.steps:

        def progress(step: int, steps: int) -> None:
            say(f"{key}: attack, step {step} of {steps}")

        results.tables["attack"] += folder.rows(f"{key}-attack", lambda: examination.attack_rows(progress))
