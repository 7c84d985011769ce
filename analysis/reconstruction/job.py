"""The whole job: every checkpoint through the stages, tables, warnings. Stored parts are taken up again."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from analysis.reconstruction import attack, susceptibility
from analysis.reconstruction.config import ReconstructionConfig
from analysis.reconstruction.examination import ORACLE, Examination, prior
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
    images: list[ImageSet]
    folder: JobFolder
    tables: dict[str, list[TableRow]] = field(default_factory=lambda: {name: [] for name in TABLES})
    examined: list[Examination] = field(default_factory=list)
    matches: list[TableRow] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def latest(self) -> list[Examination]:
        """Return the examination of the last checkpoint of each optimizer, first set of images and seed."""
        latest: dict[str, Examination] = {}
        for examination in self.examined:
            subject = examination.subject
            other = latest.setdefault(subject.optimizer, examination).subject
            is_same = (subject.data_set, subject.seed) == (other.data_set, other.seed)
            if is_same and subject.step > other.step:
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
    sets, network = load(config)
    prior(
        config, sets[0], config.attack.offset[0]
    )  # refuses what the public images cannot give before anything is trained
    folder = JobFolder(config)
    results = ReconstructionResults(config, sets, folder)
    refusals: list[InputError] = []
    for images in sets:
        for subject in subjects(config, images, network, folder, say):
            examination = Examination(config, images, subject, folder)
            try:
                examination.check()
                _describe(examination, results, say)
            except InputError as error:
                # The other subjects are examined without it; a job with none left fails with the first refusal.
                refusals.append(error)
                results.warnings.append(str(error))
                say(str(error))
                continue
            results.examined.append(examination)
    if not results.examined:
        raise refusals[0] if refusals else InputError("stages", config.stages, "left nothing to examine")
    if "attack" in config.stages and config.attack.steps:
        _attack(results.examined, say)
        for examination in results.examined:
            key = f"{examination.subject.key}-attack"
            results.tables["attack"] += folder.rows(key, examination.attack_rows)
    attacks = results.tables["attack"]
    results.tables["susceptibility"] = susceptibility.rows(attacks)
    results.tables["paired"] = susceptibility.paired(attacks)
    results.tables["duplicates"] = susceptibility.duplicate_rows(attacks)
    for examination in results.latest() if attacks else ():
        results.matches += examination.match_rows()
    write_tables(folder.path, {**results.tables, "matches": results.matches})
    return results


def _describe(examination: Examination, results: ReconstructionResults, say: Say) -> None:
    """Add the rows of certificate and alternatives."""
    config, folder, key = examination.config, examination.folder, examination.subject.key
    if "certificate" in config.stages:
        certificate = folder.rows(f"{key}-certificate", examination.certificate_rows)
        results.tables["certificate"] += certificate
        margin, residual = certificate[0]["margin_min"], certificate[0]["residual"]
        say(f"{key}: least margin {margin:.4g}, residual {residual:.3g}")
    if "alternatives" in config.stages:
        results.tables["alternatives"] += folder.rows(f"{key}-alternatives", examination.alternative_rows)


def _attack(examined: Sequence[Examination], say: Say) -> None:
    """Run every attack that is not stored; those on one optimizer's networks with one objective share batches."""
    groups: dict[tuple[str, str], list[Examination]] = defaultdict(list)
    for examination in examined:
        for objective in (*examination.objectives, ORACLE):
            groups[examination.subject.optimizer, objective].append(examination)
    for (optimizer, objective), group in groups.items():
        per_batch = max(1, attack.BATCH // len(group[0].problems(objective)))
        for first in range(0, len(group), per_batch):
            # A batch is run whole even if a part of it is stored: a resumed job has the same numbers.
            batch = group[first : first + per_batch]
            if all(e.candidates(objective) is not None for e in batch):
                continue
            label = f"{optimizer}, {objective} attack on {first + len(batch)} of {len(group)} networks"
            _attack_batch(
                batch, objective, lambda step, steps, label=label: say(f"{label}: {step} of {steps}")
            )


def _attack_batch(batch: Sequence[Examination], objective: str, progress: Callable[[int, int], None]) -> None:
    problems = [examination.problems(objective) for examination in batch]
    together = list(itertools.chain(*problems))
    found = iter(attack.run(together, batch[0].settings(objective), progress))
    for examination, own in zip(batch, problems, strict=True):
        examination.keep(objective, list(itertools.islice(found, len(own))))
