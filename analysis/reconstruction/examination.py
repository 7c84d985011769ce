"""One checkpoint through the stages: certificate, alternatives, attack with its baselines. Rows of the tables."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import torch

from analysis.formatting import to_jsonable
from analysis.reconstruction import alternatives, attack, certificate, multipliers, scoring, susceptibility
from analysis.reconstruction.alternatives import KktPoint
from analysis.reconstruction.attack import AttackPrior, AttackProblem, AttackSettings, Candidates, GridPoint
from analysis.reconstruction.config import ReconstructionConfig
from analysis.reconstruction.geometry import Geometry, best_alignment
from analysis.reconstruction.network import Network, label_margins, outputs
from analysis.reconstruction.scoring import Score, Target, score
from analysis.reconstruction.subjects import ImageSet, JobFolder, Subject, TableRow, derived_seed
from harness.errors import InputError

HELDOUT_DRAWS, OTHER_DRAWS = 30, 10
ORACLE = "oracle"
"""Name of the attack that starts at the training images, among objectives."""
AT_LEVEL = {
    "nn_top5_at_level": "nn_top5",
    "nn_top5_margin_at_level": "nn_top5_margin",
    "ncc_top5_at_level": "ncc_top5",
}
"""Column of the table `attack` → figure of the candidates when K first fell to the common level."""


def grid(config: ReconstructionConfig, images: int, data_set: int) -> list[GridPoint]:
    """Return every grid point of the attack on a number of images, in a fixed order; each set has its own seeds."""
    a = config.attack
    scales = [
        (weights, alpha)
        for weights in a.weights
        for alpha in (a.alpha if weights == "margin" else a.alpha_raw)
    ]
    every = itertools.product(scales, a.lambda_min, a.offset, a.radius, a.candidates, a.lr, range(a.seeds))
    return [
        GridPoint(
            alpha,
            low,
            a.lambda_init,
            radius,
            max(2, round(ratio * images)),
            lr,
            derived_seed(config.seed + seed, data_set, "attack"),
            weights,
            offset,
        )
        for (weights, alpha), low, offset, radius, ratio, lr, seed in every
    ]


def prior(config: ReconstructionConfig, images: ImageSet, offset: float) -> AttackPrior:
    """Return what an attacker who believes in an offset declares: norm and components of public images moved by it.

    Neither the training images enter, nor their mean, nor the secret offset.

    Raises:
        InputError: no public images, or more principal components than they have.
    """
    a = config.attack
    d = images.x.shape[1]
    ones = torch.ones(d, dtype=torch.float64)
    # Without a public pool: a uniform pixel in [−1, 1] has variance 1/3.
    centred = torch.from_numpy(images.samples.public)
    public = centred + offset
    # What starts around the offset has the same distance from it whatever the offset.
    norms = (centred if a.prior == "offset" else public).norm(dim=1)
    typical = float(norms.mean()) if len(public) else (d / 3) ** 0.5
    center, basis = offset * ones, None
    if a.prior == "pca":
        if not len(public):
            raise InputError(
                "attack.prior", "pca", "needs public images", fix="`heldout` in the .npz of batch="
            )
        most = min(public.shape) - 1
        if a.components > most:
            key, reason = "attack.components", "are more than the public images have"
            raise InputError(key, a.components, reason, allowed=f"1 to {most}", fix=f"{key}={most}")
        center = public.mean(0)
        basis = torch.linalg.svd(public - center, full_matrices=False)[2][: a.components]
    return AttackPrior(a.prior, typical, offset - ones, offset + ones, center, basis)


@dataclass(frozen=True)
class Examination:
    """A subject on its way through the stages, each of which returns rows of a table.

    Attributes:
        config: of the job.
        images: training images of the subject, and the public pool.
        subject: the checkpoint.
        folder: of the job; candidates and alternatives are stored there.
    """

    config: ReconstructionConfig
    images: ImageSet
    subject: Subject
    folder: JobFolder

    def check(self) -> None:
        """Refuse a network that does not separate its images, for which no theorem says anything.

        Raises:
            InputError: the least margin is not above 0.
        """
        images, subject = self.images, self.subject
        certificate.separated(images.task, subject.network, images.x, images.labels, subject.key)

    def certificate_rows(self) -> list[TableRow]:
        """Return the one row of the table `certificate`."""
        images, subject = self.images, self.subject
        figures = certificate.certify(
            images.task,
            subject.network,
            images.x,
            images.labels,
            subject.hybrid,
            subject.initial,
            self.config.seed,
            subject.key,
        )
        return [self._row(**asdict(figures))]

    @cached_property
    def kkt_point(self) -> KktPoint:
        """The network scaled to a least margin of 1, with its images and best multipliers."""
        images, network, lambdas = self.images, self.subject.network, self.subject.lambdas
        if not self.subject.is_exact:
            margin = multipliers.least_margin(images.task, network, images.x, images.labels)
            network = network.scaled(margin ** (-1 / network.depth))
        if lambdas is None:
            lambdas = multipliers.fit(images.task, network, images.x, images.labels).lambdas
        span = certificate.data_span(images.x)
        return KktPoint(images.task, network, images.x, images.labels, lambdas, span)

    def alternative_rows(self) -> list[TableRow]:
        """Return the rows of the table `alternatives`, and write the sets themselves to the folder."""
        config, subject = self.config, self.subject
        rows, arrays = [], {}
        for other in alternatives.build_alternatives(self.kkt_point, config.radius, config.seed):
            if other.kind != "original":
                rows.append(self._row(**asdict(alternatives.verify(self.kkt_point, other, subject.is_exact))))
            name = other.kind if other.radius is None else f"{other.kind}_{other.radius:g}"
            # Two classes have one multiplier per image, (m,); more have one per image and other class, (m, k − 1).
            lambdas = other.lambdas.squeeze(1)
            for part, values in (("x", other.x), ("labels", other.labels), ("lambdas", lambdas)):
                arrays[f"{name}/{part}"] = values.numpy()
        self.folder.keep_arrays(subject.key, **arrays)
        return rows

    @property
    def objectives(self) -> dict[str, Geometry | None]:
        """Objective of the attack → its geometry (None: the published residual); in ℓ2 the two are one."""
        name = self.config.attack.geometry
        matched = self.subject.hybrid if name in ("auto", "hybrid") else Geometry(name)
        if matched.norm == "l2":
            return {"l2": None}
        every = {"l2": None, "matched": matched}
        only = self.config.attack.objective
        return every if only == "both" else {only: every[only]}

    @cached_property
    def target(self) -> Target:
        """Training images, network and pixel mean that candidates are scored against."""
        images = self.images
        samples = images.samples
        mean = torch.from_numpy(samples.mean)
        return Target(
            images.task, self.subject.network, images.x, images.labels, mean, samples.shape, samples.offset
        )

    def candidates(self, objective: str) -> list[Candidates] | None:
        """Return the stored candidates of an attack, or None before it."""
        return self.folder.candidates(f"{self.subject.key}-{objective}")

    def attacked(self, weights: str) -> Network:
        """Return the network as the attack gets it: raw, or scaled to a least margin of 1.

        The gates σ(αh) of raw weights are the sharper the larger the margin, so that one α is another attack on each
        network. Scaling uses one number of the training set, its least margin, in place of a search over α.
        """
        images, network = self.images, self.subject.network
        if weights == "raw":
            return network
        margin = multipliers.least_margin(images.task, network, images.x, images.labels)
        return network.scaled(margin ** (-1 / network.depth))

    def problems(self, objective: str) -> list[AttackProblem]:
        """Return an attack per grid point; for `ORACLE` the one that starts at the training images."""
        points = grid(self.config, len(self.images.x), self.images.data_set)
        if objective == ORACLE:
            first, a = points[0], self.config.attack
            point, start = susceptibility.oracle(self.target, first.alpha, a.lambda_init, first.seed)
            point = replace(point, weights=first.weights, offset=first.offset)
            known = prior(self.config, self.images, first.offset)
            return [AttackProblem(self.attacked(first.weights), known, point, start)]
        networks = {weights: self.attacked(weights) for weights in self.config.attack.weights}
        priors = {offset: prior(self.config, self.images, offset) for offset in self.config.attack.offset}
        return [AttackProblem(networks[point.weights], priors[point.offset], point) for point in points]

    def settings(self, objective: str) -> AttackSettings:
        """Return what all attacks with this objective share, on any set of images and step of one optimizer."""
        a, labels = self.config.attack, tuple(self.images.samples.names)
        geometry = None if objective == ORACLE else self.objectives[objective]
        return AttackSettings(self.images.task, labels, a.steps, a.balance, geometry, a.level)

    def keep(self, objective: str, candidates: Sequence[Candidates]) -> None:
        """Store what the attacks of `problems` found."""
        self.folder.keep_candidates(f"{self.subject.key}-{objective}", candidates)

    def attack_rows(self) -> list[TableRow]:
        """Return the rows of the table `attack` from stored candidates: each grid point, then the baselines."""
        points = grid(self.config, len(self.images.x), self.images.data_set)
        truth = {(p.weights, p.alpha): self._true_residual(p) for p in points}
        rows: list[TableRow] = []
        for objective, geometry in self.objectives.items():
            candidates = self.candidates(objective) or []
            best = self._true_alignment(geometry or Geometry("l2"))
            rows += [
                self._attack_row(objective, c, truth[c.point.weights, c.point.alpha], best)
                for c in candidates
            ]
            if len(candidates) > 1:
                rows.append(self._pooled_row(objective, candidates))
        return rows + self._baseline_rows(points, truth[points[0].weights, points[0].alpha])

    def _true_residual(self, point: GridPoint) -> float:
        images, network = self.images, self.attacked(point.weights)
        return susceptibility.true_residual(images.task, network, images.x, images.labels, point.alpha)

    def match_rows(self) -> list[TableRow]:
        """Return a row per training image: how well the attack of least initial radius and least K found it."""
        margins = label_margins(
            self.images.task, outputs(self.subject.network, self.images.x), self.images.labels
        )
        rows: list[TableRow] = []
        for objective in self.objectives:
            candidates = self.candidates(objective)
            if not candidates:
                continue
            best = min(candidates, key=lambda c: (c.point.radius, c.residual))
            matches = scoring.matches(self.target, best.x)
            rows += [
                self._row(
                    objective=objective,
                    image=i,
                    margin=float(margins[i]) / float(margins.min()),
                    ncc=float(matches.ncc[i]),
                    ssim=float(matches.ssim[i]) if self.target.has_pixels else None,
                    is_buddy=bool(matches.buddies[i]),
                )
                for i in range(len(margins))
            ]
        return rows

    def _row(self, **columns: Any) -> TableRow:
        subject = self.subject
        return to_jsonable(
            {
                "optimizer": subject.optimizer,
                "data_set": subject.data_set,
                "seed": subject.seed,
                "step": subject.step,
                **columns,
            }
        )

    def _true_alignment(self, geometry: Geometry) -> float:
        """Return the best alignment of the training images in a norm, with the network's own gates."""
        images, network = self.images, self.subject.network
        lambdas = multipliers.fit(images.task, network, images.x, images.labels).lambdas
        return best_alignment(images.task, network, images.x, images.labels, geometry, lambdas)

    def _attack_row(
        self, objective: str, candidates: Candidates, truth: float, true_alignment: float
    ) -> TableRow:
        figures, _ = score(self.target, candidates.x, candidates.labels)
        level: dict[str, Any] = dict.fromkeys(AT_LEVEL)
        if candidates.at_level is not None:
            at_level = asdict(score(self.target, candidates.at_level, candidates.labels)[0])
            level = {column: at_level[figure] for column, figure in AT_LEVEL.items()}
        point = candidates.point
        is_closer = candidates.residual < truth
        is_better_aligned = candidates.alignment > true_alignment
        return self._row(
            kind="attack",
            margin_min=multipliers.least_margin(
                self.images.task, self.subject.network, self.images.x, self.images.labels
            ),
            objective=objective,
            prior=self.config.attack.prior,
            radius=point.radius,
            offset=point.offset,
            weights=point.weights,
            alpha=point.alpha,
            lambda_min=point.lambda_min,
            candidates=point.candidates,
            lr=point.lr,
            attack_seed=point.seed,
            residual=candidates.residual,
            residual_hard=candidates.hard_residual,
            residual_true=truth,
            alignment=candidates.alignment,
            alignment_true=true_alignment,
            beats_truth=is_closer if objective == "l2" else is_better_aligned,
            level_step=candidates.level_step,
            **asdict(figures),
            **level,
        )

    def _pooled_row(self, objective: str, candidates: Sequence[Candidates]) -> TableRow:
        """Score all grid points' candidates together, as the published post-processing has them."""
        x, labels = torch.cat([c.x for c in candidates]), torch.cat([c.labels for c in candidates])
        figures, _ = score(self.target, x, labels)
        return self._row(
            kind="pooled",
            objective=objective,
            prior=self.config.attack.prior,
            candidates=len(x),
            **asdict(figures),
        )

    def _baseline_rows(self, points: Sequence[GridPoint], truth: float) -> list[TableRow]:
        images, target = self.images, self.target
        seed = derived_seed(self.config.seed, images.data_set, "baseline")
        typical = prior(self.config, images, points[0].offset).typical_norm
        sizes = [point.candidates for point in points]
        rows = []
        # More candidates are nearer by chance alone: baselines for every number, and for the pool of all.
        for count in sorted({*sizes, sum(sizes)}):
            labels = attack.spread_labels(tuple(images.samples.names), count)
            scores = {
                "gaussian": susceptibility.gaussians(target, labels, typical, OTHER_DRAWS, seed),
                "pair_means": susceptibility.pair_means(target, count, OTHER_DRAWS, seed),
            }
            if len(images.heldout):
                pool, pool_labels = images.heldout, images.heldout_labels
                scores["heldout"] = susceptibility.heldout(
                    target, pool, pool_labels, labels, HELDOUT_DRAWS, seed
                )
            rows += [
                self._row(kind=kind, candidates=count, **_means(draws)) for kind, draws in scores.items()
            ]
        for oracle in self.candidates(ORACLE) or []:
            figures, _ = score(target, oracle.x, oracle.labels)
            rows.append(
                self._row(
                    kind=ORACLE,
                    candidates=len(images.x),
                    weights=oracle.point.weights,
                    alpha=oracle.point.alpha,
                    residual=oracle.residual,
                    residual_hard=oracle.hard_residual,
                    residual_true=truth,
                    **asdict(figures),
                )
            )
        return rows


def _means(scores: Sequence[Score]) -> dict[str, float | None]:
    """Return the mean of each figure; None for one that these images do not have."""
    values = {f.name: [getattr(score, f.name) for score in scores] for f in fields(Score)}
    return {name: None if None in found else fmean(found) for name, found in values.items()}
