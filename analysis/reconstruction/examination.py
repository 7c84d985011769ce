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
from analysis.reconstruction.alternatives import Problem, build_alternatives, verify
from analysis.reconstruction.attack import Candidates, Point, Prior, Settings
from analysis.reconstruction.certificate import data_span
from analysis.reconstruction.config import Config
from analysis.reconstruction.geometry import Geometry, best_alignment
from analysis.reconstruction.network import label_margins, outputs
from analysis.reconstruction.scoring import Score, Target, score
from analysis.reconstruction.subjects import Folder, Images, Subject, TableRow

HELDOUT_DRAWS, OTHER_DRAWS = 30, 10


def who(subject: Subject) -> TableRow:
    """The columns that say whose a row is."""
    return {"optimizer": subject.optimizer, "seed": subject.seed, "step": subject.step}


def certify(config: Config, images: Images, subject: Subject) -> TableRow:
    """TableRow of the table `certificate`.

    Raises:
        InputError: the network did not separate its images.
    """
    found = certificate.certify(
        images.task,
        subject.network,
        images.x,
        images.labels,
        subject.hybrid,
        subject.initial,
        config.seed,
        subject.key,
    )
    return to_jsonable({**who(subject), **found.row()})


def problem(images: Images, subject: Subject) -> Problem:
    """The network at a least margin of 1 with its images and best multipliers."""
    margin = multipliers.least_margin(images.task, subject.network, images.x, images.labels)
    unit = (
        subject.network
        if subject.is_exact
        else subject.network.scaled(margin ** (-1 / subject.network.depth))
    )
    lambdas = subject.lambdas
    if lambdas is None:
        lambdas = multipliers.fit(images.task, unit, images.x, images.labels).lambdas
    return Problem(images.task, unit, images.x, images.labels, lambdas, data_span(images.x))


def alternatives(config: Config, images: Images, subject: Subject, folder: Folder) -> list[TableRow]:
    """Rows of the table `alternatives`; the sets themselves go to the folder."""
    posed = problem(images, subject)
    rows, arrays = [], {}
    for made in build_alternatives(
        posed, config.radius, config.seed, with_muon=subject.hybrid.norm == "hybrid"
    ):
        if made.kind != "original":
            row = verify(posed, made, subject.is_exact)
            rows.append(to_jsonable({**who(subject), **row.row()}))
        name = made.kind if made.radius is None else f"{made.kind}_{made.radius:g}"
        arrays |= {
            f"{name}/x": made.x.numpy(),
            f"{name}/labels": made.labels.numpy(),
            f"{name}/lambdas": made.lambdas.numpy(),
        }
    folder.keep_arrays(subject.key, **arrays)
    return rows


def objectives(config: Config, subject: Subject) -> dict[str, Geometry | None]:
    """Objective → its geometry (None: the published residual). In ℓ2 the two are one."""
    wanted = config.attack.geometry
    matched = subject.hybrid if wanted in ("auto", "hybrid") else Geometry(wanted)
    chosen = {"l2": None, "matched": matched}
    if config.attack.objective != "both":
        chosen = {config.attack.objective: chosen[config.attack.objective]}
    return chosen if matched.norm != "l2" else {"l2": None}


def grid(config: Config, images: int) -> list[Point]:
    """Every grid point, in a fixed order."""
    a = config.attack
    every = itertools.product(a.alpha, a.lambda_min, a.radius, a.candidates, a.lr, range(a.seeds))
    return [
        Point(alpha, low, a.lambda_init, radius, max(2, round(ratio * images)), lr, config.seed + seed)
        for alpha, low, radius, ratio, lr, seed in every
    ]


def prior(config: Config, images: Images) -> Prior:
    """What the attacker declares: never the training images; the typical norm is that of public ones."""
    a = config.attack
    d = images.x.shape[1]
    ones = torch.ones(d, dtype=torch.float64)
    # Without a public pool: a uniform pixel in [−1, 1] has variance 1/3.
    typical = float(images.heldout.norm(dim=1).mean()) if len(images.heldout) else (d / 3) ** 0.5
    return Prior(a.prior, typical, a.offset - ones, a.offset + ones, a.offset * ones)


def run_attack(
    config: Config,
    images: Images,
    subject: Subject,
    folder: Folder,
    progress: Callable[[int, int], None] | None = None,
) -> list[TableRow]:
    """Rows of the table `attack`: each grid point, then the baselines."""
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
        found = folder.candidates(key)
        if found is None:
            found = attack.run(subject.network, known, points, settings, progress=progress)
            folder.keep_candidates(key, found)
        best = _true_alignment(images, subject, geometry or Geometry("l2"))
        rows += [_attack_row(subject, name, known, against, c, truth[c.point.alpha], best) for c in found]
        if len(found) > 1:
            rows.append(_pooled_row(subject, name, known, against, found))
    return rows + _baseline_rows(config, images, subject, against, known, truth)


def target(images: Images, subject: Subject) -> Target:
    """What candidates are scored against."""
    mean = torch.from_numpy(images.samples.mean)
    return Target(images.task, subject.network, images.x, images.labels, mean, images.samples.shape)


def matches(config: Config, images: Images, subject: Subject, folder: Folder) -> list[TableRow]:
    """A row per training image: how well the attack of least initial radius and least K found it."""
    rows: list[TableRow] = []
    against = target(images, subject)
    margins = label_margins(images.task, outputs(subject.network, images.x), images.labels)
    for name in objectives(config, subject):
        best = min(folder.candidates(f"{subject.key}-{name}") or (), key=_first, default=None)
        if best is None:
            continue
        found = scoring.matches(against, best.x)
        least = float(margins.min())
        rows += [
            to_jsonable(
                {
                    **who(subject),
                    "objective": name,
                    "image": i,
                    "margin": float(margins[i]) / least,
                    "ncc": float(found.ncc[i]),
                    "ssim": float(found.ssim[i]),
                    "is_buddy": bool(found.buddies[i]),
                }
            )
            for i in range(len(images.x))
        ]
    return rows


def _first(found: Candidates) -> tuple[float, float]:
    return found.point.radius, found.residual


def _settings(config: Config, images: Images, geometry: Geometry | None) -> Settings:
    a = config.attack
    return Settings(images.task, tuple(images.samples.names), a.steps, a.method, geometry, a.level)


def _pooled_row(
    subject: Subject, objective: str, known: Prior, target: Target, found: Sequence[Candidates]
) -> TableRow:
    """All grid points' candidates together, as the published post-processing has them."""
    x, labels = torch.cat([c.x for c in found]), torch.cat([c.labels for c in found])
    whose = {"kind": "pooled", "objective": objective, "prior": known.kind, "candidates": len(x)}
    return to_jsonable({**who(subject), **whose, **score(target, x, labels)[0].row()})


def _true_alignment(images: Images, subject: Subject, geometry: Geometry) -> float:
    """The best that the training images reach in the objective's norm, with the network's own gates."""
    fit = multipliers.fit(images.task, subject.network, images.x, images.labels)
    return best_alignment(images.task, subject.network, images.x, images.labels, geometry, fit.lambdas)


def _attack_row(
    subject: Subject,
    objective: str,
    known: Prior,
    target: Target,
    found: Candidates,
    truth: float,
    true_alignment: float,
) -> TableRow:
    figures, _ = score(target, found.x, found.labels)
    level: dict[str, Any] = dict.fromkeys(_AT_LEVEL)
    if found.at_level is not None:
        at_level = score(target, found.at_level, found.labels)[0].row()
        level = {new: at_level[old] for new, old in _AT_LEVEL.items()}
    point = found.point
    return to_jsonable(
        {
            **who(subject),
            "kind": "attack",
            "objective": objective,
            "prior": known.kind,
            "radius": point.radius,
            "alpha": point.alpha,
            "lambda_min": point.lambda_min,
            "candidates": point.candidates,
            "lr": point.lr,
            "attack_seed": point.seed,
            "residual": found.residual,
            "residual_hard": found.hard_residual,
            "residual_true": truth,
            "alignment": found.alignment,
            "alignment_true": true_alignment,
            "beats_truth": found.residual < truth if objective == "l2" else found.alignment > true_alignment,
            "level_step": found.level_step,
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
    config: Config,
    images: Images,
    subject: Subject,
    target: Target,
    known: Prior,
    truth: dict[float, float],
) -> list[TableRow]:
    rows = []
    seed = config.seed
    sizes = [p.candidates for p in grid(config, len(images.x))]
    for count in sorted({*sizes, sum(sizes)}):
        labels = attack.label_row(tuple(images.samples.names), count)
        sets = {
            "gaussian": susceptibility.gaussians(target, labels, known.typical_norm, OTHER_DRAWS, seed),
            "pair_means": susceptibility.pair_means(target, count, OTHER_DRAWS, seed),
        }
        if len(images.heldout):
            sets["heldout"] = susceptibility.heldout(
                target, images.heldout, images.heldout_labels, labels, HELDOUT_DRAWS, seed
            )
        rows += [_baseline_row(subject, kind, count, found) for kind, found in sets.items() if found]
    alpha = config.attack.alpha[0]
    settings = _settings(config, images, None)
    found = susceptibility.oracle(target, known, settings, alpha, config.attack.lambda_init, seed)
    figures, _ = score(target, found.x, found.labels)
    residuals = {
        "residual": found.residual,
        "residual_hard": found.hard_residual,
        "residual_true": truth[alpha],
    }
    rows.append(
        to_jsonable(
            {
                **who(subject),
                "kind": "oracle",
                "candidates": len(images.x),
                "alpha": alpha,
                **residuals,
                **figures.row(),
            }
        )
    )
    return rows


def _baseline_row(subject: Subject, kind: str, count: int, found: Sequence[Score]) -> TableRow:
    means = {f.name: fmean(getattr(s, f.name) for s in found) for f in fields(Score)}
    return to_jsonable({**who(subject), "kind": kind, "candidates": count, **means})
