"""One checkpoint through the stages: certificate, alternatives, attack with its baselines. Rows of the tables."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import fields
from statistics import fmean
from typing import Any

import torch

from analysis.formatting import to_jsonable
from analysis.reconstruction import attack, certificate, multipliers, scoring, susceptibility
from analysis.reconstruction.alternatives import KktPoint, build_alternatives, verify
from analysis.reconstruction.attack import AttackPrior, AttackSettings, Candidates, GridPoint
from analysis.reconstruction.certificate import data_span
from analysis.reconstruction.config import ReconstructionConfig
from analysis.reconstruction.geometry import Geometry, best_alignment
from analysis.reconstruction.network import label_margins, outputs
from analysis.reconstruction.scoring import Score, Target, score
from analysis.reconstruction.subjects import ImageSet, JobFolder, Subject, TableRow

HELDOUT_DRAWS, OTHER_DRAWS = 30, 10


def subject_columns(subject: Subject) -> TableRow:
    """Return the columns that identify the subject of a row."""
    return {"optimizer": subject.optimizer, "seed": subject.seed, "step": subject.step}


def certify(config: ReconstructionConfig, images: ImageSet, subject: Subject) -> TableRow:
    """Return the row of the table `certificate`.

    Raises:
        InputError: the network did not separate its images.
    """
    figures = certificate.certify(
        images.task,
        subject.network,
        images.x,
        images.labels,
        subject.hybrid,
        subject.initial,
        config.seed,
        subject.key,
    )
    return to_jsonable({**subject_columns(subject), **figures.row()})


def kkt_point(images: ImageSet, subject: Subject) -> KktPoint:
    """Return the network scaled to a least margin of 1, with its images and best multipliers."""
    margin = multipliers.least_margin(images.task, subject.network, images.x, images.labels)
    unit = (
        subject.network
        if subject.is_exact
        else subject.network.scaled(margin ** (-1 / subject.network.depth))
    )
    lambdas = subject.lambdas
    if lambdas is None:
        lambdas = multipliers.fit(images.task, unit, images.x, images.labels).lambdas
    return KktPoint(images.task, unit, images.x, images.labels, lambdas, data_span(images.x))


def alternatives(
    config: ReconstructionConfig, images: ImageSet, subject: Subject, folder: JobFolder
) -> list[TableRow]:
    """Return the rows of the table `alternatives`, and write the sets themselves to the folder."""
    point = kkt_point(images, subject)
    rows, arrays = [], {}
    for alternative in build_alternatives(
        point, config.radius, config.seed, with_muon=subject.hybrid.norm == "hybrid"
    ):
        if alternative.kind != "original":
            row = verify(point, alternative, subject.is_exact)
            rows.append(to_jsonable({**subject_columns(subject), **row.row()}))
        name = (
            alternative.kind if alternative.radius is None else f"{alternative.kind}_{alternative.radius:g}"
        )
        arrays |= {
            f"{name}/x": alternative.x.numpy(),
            f"{name}/labels": alternative.labels.numpy(),
            f"{name}/lambdas": alternative.lambdas.numpy(),
        }
    folder.keep_arrays(subject.key, **arrays)
    return rows


def objectives(config: ReconstructionConfig, subject: Subject) -> dict[str, Geometry | None]:
    """Return objective → its geometry (None: the published residual); in ℓ2 the two are one."""
    geometry = config.attack.geometry
    matched = subject.hybrid if geometry in ("auto", "hybrid") else Geometry(geometry)
    by_name = {"l2": None, "matched": matched}
    if config.attack.objective != "both":
        by_name = {config.attack.objective: by_name[config.attack.objective]}
    return by_name if matched.norm != "l2" else {"l2": None}


def grid(config: ReconstructionConfig, images: int) -> list[GridPoint]:
    """Return every grid point of the attack, in a fixed order."""
    a = config.attack
    every = itertools.product(a.alpha, a.lambda_min, a.radius, a.candidates, a.lr, range(a.seeds))
    return [
        GridPoint(alpha, low, a.lambda_init, radius, max(2, round(ratio * images)), lr, config.seed + seed)
        for alpha, low, radius, ratio, lr, seed in every
    ]


def prior(config: ReconstructionConfig, images: ImageSet) -> AttackPrior:
    """Return what the attacker declares: never the training images; the typical norm is that of public ones."""
    a = config.attack
    d = images.x.shape[1]
    ones = torch.ones(d, dtype=torch.float64)
    # Without a public pool: a uniform pixel in [−1, 1] has variance 1/3.
    typical = float(images.heldout.norm(dim=1).mean()) if len(images.heldout) else (d / 3) ** 0.5
    return AttackPrior(a.prior, typical, a.offset - ones, a.offset + ones, a.offset * ones)


def run_attack(
    config: ReconstructionConfig,
    images: ImageSet,
    subject: Subject,
    folder: JobFolder,
    progress: Callable[[int, int], None] | None = None,
) -> list[TableRow]:
    """Return the rows of the table `attack`: each grid point, then the baselines."""
    known = prior(config, images)
    rows: list[TableRow] = []
    against = target(images, subject)
    truth = {
        alpha: susceptibility.true_residual(images.task, subject.network, images.x, images.labels, alpha)
        for alpha in config.attack.alpha
    }
    points = grid(config, len(images.x))
    for name, geometry in objectives(config, subject).items():
        settings = _settings(config, images, geometry)
        key = f"{subject.key}-{name}"
        candidates = folder.candidates(key)
        if candidates is None:
            candidates = attack.run(subject.network, known, points, settings, progress=progress)
            folder.keep_candidates(key, candidates)
        best = _true_alignment(images, subject, geometry or Geometry("l2"))
        rows += [
            _attack_row(subject, name, known, against, c, truth[c.point.alpha], best) for c in candidates
        ]
        if len(candidates) > 1:
            rows.append(_pooled_row(subject, name, known, against, candidates))
    return rows + _baseline_rows(config, images, subject, against, known, truth)


def target(images: ImageSet, subject: Subject) -> Target:
    """Return what candidates are scored against."""
    mean = torch.from_numpy(images.samples.mean)
    return Target(images.task, subject.network, images.x, images.labels, mean, images.samples.shape)


def matches(
    config: ReconstructionConfig, images: ImageSet, subject: Subject, folder: JobFolder
) -> list[TableRow]:
    """Return a row per training image: how well the attack of least initial radius and least K found it."""
    rows: list[TableRow] = []
    against = target(images, subject)
    margins = label_margins(images.task, outputs(subject.network, images.x), images.labels)
    for name in objectives(config, subject):
        best = min(folder.candidates(f"{subject.key}-{name}") or (), key=_first, default=None)
        if best is None:
            continue
        matched = scoring.matches(against, best.x)
        least = float(margins.min())
        rows += [
            to_jsonable(
                {
                    **subject_columns(subject),
                    "objective": name,
                    "image": i,
                    "margin": float(margins[i]) / least,
                    "ncc": float(matched.ncc[i]),
                    "ssim": float(matched.ssim[i]),
                    "is_buddy": bool(matched.buddies[i]),
                }
            )
            for i in range(len(images.x))
        ]
    return rows


def _first(candidates: Candidates) -> tuple[float, float]:
    return candidates.point.radius, candidates.residual


def _settings(config: ReconstructionConfig, images: ImageSet, geometry: Geometry | None) -> AttackSettings:
    a = config.attack
    return AttackSettings(images.task, tuple(images.samples.names), a.steps, a.method, geometry, a.level)


def _pooled_row(
    subject: Subject, objective: str, known: AttackPrior, target: Target, candidates: Sequence[Candidates]
) -> TableRow:
    """Score all grid points' candidates together, as the published post-processing has them."""
    x, labels = torch.cat([c.x for c in candidates]), torch.cat([c.labels for c in candidates])
    pool_columns = {"kind": "pooled", "objective": objective, "prior": known.kind, "candidates": len(x)}
    return to_jsonable({**subject_columns(subject), **pool_columns, **score(target, x, labels)[0].row()})


def _true_alignment(images: ImageSet, subject: Subject, geometry: Geometry) -> float:
    """Return the best alignment of the training images in the objective's norm, with the network's own gates."""
    fit = multipliers.fit(images.task, subject.network, images.x, images.labels)
    return best_alignment(images.task, subject.network, images.x, images.labels, geometry, fit.lambdas)


def _attack_row(
    subject: Subject,
    objective: str,
    known: AttackPrior,
    target: Target,
    candidates: Candidates,
    truth: float,
    true_alignment: float,
) -> TableRow:
    figures, _ = score(target, candidates.x, candidates.labels)
    level: dict[str, Any] = dict.fromkeys(_AT_LEVEL)
    if candidates.at_level is not None:
        at_level = score(target, candidates.at_level, candidates.labels)[0].row()
        level = {new: at_level[old] for new, old in _AT_LEVEL.items()}
    point = candidates.point
    return to_jsonable(
        {
            **subject_columns(subject),
            "kind": "attack",
            "objective": objective,
            "prior": known.kind,
            "radius": point.radius,
            "alpha": point.alpha,
            "lambda_min": point.lambda_min,
            "candidates": point.candidates,
            "lr": point.lr,
            "attack_seed": point.seed,
            "residual": candidates.residual,
            "residual_hard": candidates.hard_residual,
            "residual_true": truth,
            "alignment": candidates.alignment,
            "alignment_true": true_alignment,
            "beats_truth": candidates.residual < truth
            if objective == "l2"
            else candidates.alignment > true_alignment,
            "level_step": candidates.level_step,
            **figures.row(),
            **level,
        }
    )


_AT_LEVEL = {
    "nn_top5_at_level": "nn_top5",
    "nn_top5_margin_at_level": "nn_top5_margin",
    "ncc_top5_at_level": "ncc_top5",
}


def _baseline_rows(
    config: ReconstructionConfig,
    images: ImageSet,
    subject: Subject,
    target: Target,
    known: AttackPrior,
    truth: dict[float, float],
) -> list[TableRow]:
    rows = []
    seed = config.seed
    sizes = [p.candidates for p in grid(config, len(images.x))]
    for count in sorted({*sizes, sum(sizes)}):
        labels = attack.spread_labels(tuple(images.samples.names), count)
        sets = {
            "gaussian": susceptibility.gaussians(target, labels, known.typical_norm, OTHER_DRAWS, seed),
            "pair_means": susceptibility.pair_means(target, count, OTHER_DRAWS, seed),
        }
        if len(images.heldout):
            sets["heldout"] = susceptibility.heldout(
                target, images.heldout, images.heldout_labels, labels, HELDOUT_DRAWS, seed
            )
        rows += [_baseline_row(subject, kind, count, scores) for kind, scores in sets.items() if scores]
    alpha = config.attack.alpha[0]
    settings = _settings(config, images, None)
    scores = susceptibility.oracle(target, known, settings, alpha, config.attack.lambda_init, seed)
    figures, _ = score(target, scores.x, scores.labels)
    residuals = {
        "residual": scores.residual,
        "residual_hard": scores.hard_residual,
        "residual_true": truth[alpha],
    }
    rows.append(
        to_jsonable(
            {
                **subject_columns(subject),
                "kind": "oracle",
                "candidates": len(images.x),
                "alpha": alpha,
                **residuals,
                **figures.row(),
            }
        )
    )
    return rows


def _baseline_row(subject: Subject, kind: str, count: int, scores: Sequence[Score]) -> TableRow:
    means = {f.name: fmean(getattr(s, f.name) for s in scores) for f in fields(Score)}
    return to_jsonable({**subject_columns(subject), "kind": kind, "candidates": count, **means})
