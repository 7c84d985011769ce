"""Mode `head`: margins of a language model's last layer on its own features, exact; and an embedding-space attack.

With frozen features h the prediction of a token is a linear classifier, and the distance of h to the nearest other
decision is min_c [(w_y - w_c)·h + b_y - b_c]/‖w_y - w_c‖. Perturbing input embeddings instead gives upper bounds
alone: attention is not globally Lipschitz, so nothing here certifies the body.

The table of own norms fits linear heads W to the same features by normalized steepest descent, from W = 0, and
measures each in three norms: each descent maximizes the margin of its own norm. The direction of steepest descent in a
norm is the gradient's dual: G/‖G‖_F for the Frobenius norm, sign G for the max norm, the polar factor of G for the
spectral norm (Fan, Schmidt and Thrampoulidis, arXiv 2502.04664).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from analysis.formatting import listing, significant
from analysis.margin.checkpoints import (
    LoadedCheckpoint,
    UnreadableCheckpoint,
    find_checkpoints,
    load_checkpoint,
)
from analysis.margin.config import MarginConfig
from analysis.margin.input_margins import Effort, attack, functional_margins
from analysis.margin.outputs import OBSERVED, MarginReport
from analysis.margin.plots import LOG_STEP, NORM_SYMBOLS, axes, curves, log10_t
from analysis.margin.rules import polar
from analysis.margin.trajectory import MarginRun, TrajectoryRow
from analysis.pages.figures import Plot, figure
from harness.model.loss import IGNORED
from optimizers.linalg.robust import full_precision

Floats = NDArray[np.float64]
QUANTILES = {"q05": 0.05, "q50": 0.5}
RIVALS = 4
"""Other tokens that an embedding attack aims at: the likeliest ones. A change to any of them is a change."""
ATTACKED = 4
EFFORT = Effort(deepfool_steps=6, rounds=3, pgd_steps=8, segment=14)
"""Of the embedding attack: each of its evaluations is a pass through the model."""
FIRST_PLACE = 4
"""Places before this one have next to no context."""
DESCENTS = {"l2": "frobenius", "sign": "max", "spectral": "spectral"}
"""Descent → the norm that it is steepest in."""
STEP = 0.5
SIGN_SHARE = 0.3
"""Sign steps are longer in every other norm, and settle later at equal step size."""
DESCENT_STEPS = 2000

Say = Callable[[str], None]


def run_head(config: MarginConfig, say: Say) -> list[MarginRun]:
    """Measure checkpoints: one run per optimizer label, a row per checkpoint.

    Raises:
        InputError: bad input.
    """
    runs: dict[str, MarginRun] = {}
    for step, path in (checkpoints := find_checkpoints(config, say)):
        try:
            with full_precision("cpu"):
                loaded = load_checkpoint(path, step, config, say)
                row, own = measure(loaded, config)
        except UnreadableCheckpoint as error:
            if not runs and path == checkpoints[-1][1]:
                raise
            say(f"left out: {error}")
            continue
        run = runs.setdefault(loaded.optimizer, MarginRun(loaded.optimizer, 0, "ok"))
        run.rows.append(row)
        run.facts |= {"dtype": "float64", "checkpoints": len(run.rows), "own_norms": own}
        say(f"{path.name}: accuracy {row['accuracy']:.3f}")
    for run in runs.values():
        if all(row["margin"] is None for row in run.rows):
            run.status = "dead"
    return list(runs.values())


def measure(
    loaded: LoadedCheckpoint, config: MarginConfig
) -> tuple[TrajectoryRow, dict[str, dict[str, float]]]:
    """Return the row of one checkpoint, and the own-norm table of heads fitted to its features."""
    model: Any = loaded.model
    head = model.get_output_embeddings()
    with torch.no_grad():
        features = model.base_model(input_ids=loaded.ids).last_hidden_state
        h, labels = features.reshape(-1, features.shape[-1]), loaded.labels.reshape(-1)
        used = labels != IGNORED
        h, labels = h[used], labels[used]
        scores = head(h)
        q = functional_margins(scores, labels)
        loss = float(nn.functional.cross_entropy(scores, labels))
    right = q > 0.0
    row: TrajectoryRow = {
        "t": float(loaded.step),
        "ln_tau": math.log(loaded.step) if loaded.step > 0 else None,
        "gap": None,
        "margin": None,
        "log_loss": math.log(loss) if loss > 0.0 else -math.inf,
        "accuracy": float(right.double().mean()),
        "tokens": int(used.sum()),
    }
    own: dict[str, dict[str, float]] = {}
    if right.any():
        h, labels, scores = h[right], labels[right], scores[right]
        for norm in config.norms:
            few = slice(None) if norm == "l2" else slice(config.max_samples)
            exact = head_margins(h[few], labels[few], head.weight.detach(), scores[few], norm)
            size = torch.linalg.vector_norm(h[few], ord=2.0 if norm == "l2" else torch.inf, dim=1)
            row |= {f"head_{norm}_{name}": float(torch.quantile(exact, s)) for name, s in QUANTILES.items()}
            row[f"head_{norm}_relative_q50"] = float(torch.quantile(exact / size, 0.5))
        row["margin"] = row[f"head_{config.norms[0]}_q50"]
        row |= _embedding_attack(loaded, config)
        own = _own_norms(h[: config.max_samples], labels[: config.max_samples])
    return row, own


def head_margins(h: Tensor, labels: Tensor, weight: Tensor, scores: Tensor, norm: str) -> Tensor:
    """Return the exact distance of each feature to the nearest other decision, (n,); 0 where the label is not on top.

    Args:
        h: (n, d).
        labels: (n,).
        weight: (c, d) of the head; a bias is in `scores`.
        scores: (n, c).
        norm: of the perturbation of h: "l2" divides by the l2 norm of w_y - w_c, "linf" by the l1 norm.
    """
    distances = []
    for label, score in zip(labels, scores):
        rows = weight[label] - weight
        size = torch.linalg.vector_norm(rows, ord=2.0 if norm == "l2" else 1.0, dim=1)
        difference = score[label] - score
        # A class with the label's own weights differs by the bias alone, at any distance.
        distance = torch.where(size > 0.0, difference / size.clamp_min(1e-300), torch.inf)
        distance[label] = torch.inf
        distances.append(distance.amin().clamp_min(0.0) if len(score) > 1 else distance.amin())
    return torch.stack(distances)


def _embedding_attack(loaded: LoadedCheckpoint, config: MarginConfig) -> TrajectoryRow:
    """Return upper bounds: the smallest perturbation of a row's embeddings that changes one right prediction.

    The relative ones are over the median size of an embedding.
    """
    model: Any = loaded.model
    table = model.get_input_embeddings().weight.detach()
    rows, places = _right_places(loaded)
    row: TrajectoryRow = {"embedding_attacked": len(rows)}
    if not rows:
        return row
    # What comes after a place has no part in its prediction.
    ids, labels = loaded.ids[rows, : max(places) + 1], loaded.labels[rows, places]
    inputs = table[ids]
    where = torch.arange(len(rows))

    def logits(embeddings: Tensor) -> Tensor:
        # Only the scores at one place are needed; the head on all of them would be most of the work.
        hidden = model.base_model(inputs_embeds=embeddings).last_hidden_state
        return model.get_output_embeddings()(hidden[where, places])

    with torch.no_grad():
        others = logits(inputs).scatter(1, labels[:, None], -torch.inf)
        candidates = torch.cat(
            [labels[:, None], others.topk(min(RIVALS, others.shape[1] - 1), dim=1).indices], dim=1
        )
    target = torch.zeros(len(rows), dtype=torch.int64)

    def scores(embeddings: Tensor) -> Tensor:
        return logits(embeddings).gather(1, candidates)

    for norm in config.norms:
        upper = attack(scores, inputs, target, norm, effort=EFFORT, seed=config.seed)
        size = torch.linalg.vector_norm(table, ord=2.0 if norm == "l2" else torch.inf, dim=1).median()
        row[f"embedding_upper_{norm}_q50"] = float(upper.median())
        row[f"embedding_upper_{norm}_relative_q50"] = float(upper.median() / size)
    return row


@torch.no_grad()
def _right_places(loaded: LoadedCheckpoint) -> tuple[list[int], list[int]]:
    """Return up to `ATTACKED` rows and, in each, the first place with context whose next token is predicted."""
    model: Any = loaded.model
    best = model(input_ids=loaded.ids).logits.argmax(-1)
    right = (best == loaded.labels) & (loaded.labels != IGNORED)
    right[:, :FIRST_PLACE] = False
    rows, places = [], []
    for i, marks in enumerate(right):
        if marks.any() and len(rows) < ATTACKED:
            rows.append(i)
            places.append(int(marks.nonzero()[0]))
    return rows, places


def _own_norms(h: Tensor, labels: Tensor) -> dict[str, dict[str, float]]:
    """Fit linear heads to the frozen features by normalized steepest descent, and measure each in three norms."""
    classes, short = torch.unique(labels, return_inverse=True)
    if len(classes) < 2:
        return {}
    features, targets = h.numpy(), short.numpy()
    weights = {
        descent: descend(features, targets, len(classes), descent, DESCENT_STEPS) for descent in DESCENTS
    }
    return own_norm_table(weights, features, targets)


Floats = NDArray[np.float64]


def matrix_norms(weight: Floats) -> dict[str, float]:
    """Return the three norms of a matrix."""
    return {
        "frobenius": float(np.linalg.norm(weight)),
        "max": float(np.abs(weight).max()),
        "spectral": float(np.linalg.norm(weight, 2)),
    }


def descend(features: Floats, labels: NDArray[np.int64], classes: int, descent: str, steps: int) -> Floats:
    """Return W (classes, d) after normalized steepest descent with step 0.5/√t (0.15/√t for sign).

    Args:
        features: (n, d).
        labels: (n,), 0 … classes - 1.
        descent: "l2", "sign" or "spectral".
        steps: how many.
    """
    weight = np.zeros((classes, features.shape[1]))
    targets = np.eye(classes)[labels]
    for t in range(1, steps + 1):
        scores = features @ weight.T
        # p_label - 1 is minus the sum of the others' p: 1 - p would round to 0 where the loss is small.
        others = np.where(targets > 0.0, -np.inf, scores - (scores * targets).sum(1, keepdims=True))
        log_total = np.logaddexp(0.0, np.logaddexp.reduce(others, axis=1))[:, None]
        log_pull = others - log_total
        # A common factor changes no direction, and keeps the smallest loss from underflowing.
        pull = -np.exp(log_pull - log_pull.max())
        pull += targets * -pull.sum(1, keepdims=True)
        gradient = pull.T @ features
        size = STEP / np.sqrt(t)
        if descent == "l2":
            direction = gradient / np.linalg.norm(gradient)
        elif descent == "sign":
            direction, size = np.sign(gradient), size * SIGN_SHARE
        else:
            direction = polar(gradient[None])[0]
        weight += size * direction
    return weight


def own_norm_table(
    weights: dict[str, Floats], features: Floats, labels: NDArray[np.int64]
) -> dict[str, dict[str, float]]:
    """Return name → norm → smallest functional margin over that norm of W."""
    margins = {}
    for name, weight in weights.items():
        scores = torch.from_numpy(features @ weight.T)
        smallest = float(functional_margins(scores, torch.from_numpy(labels)).min())
        margins[name] = {norm: smallest / size for norm, size in matrix_norms(weight).items()}
    return margins


def wins_in_own_norm(margins: dict[str, dict[str, float]], names: Sequence[str] = tuple(DESCENTS)) -> bool:
    """Return True if in every norm's column the descent of that norm has the strictly largest margin."""
    for name in names:
        column = {other: margins[other][DESCENTS[name]] for other in names}
        if any(column[other] >= column[name] for other in names if other != name):
            return False
    return True


def report(config: MarginConfig, runs: Sequence[MarginRun]) -> MarginReport:
    """Return the report of mode `head`."""
    last = {run.optimizer: run.rows[-1] for run in runs}
    hidden = ("gap", "ln_tau", "margin")
    table = [
        {"optimizer": name, **{key: value for key, value in row.items() if key not in hidden}}
        for name, row in last.items()
    ]
    own = [
        {"checkpoints of": run.optimizer, "descent": descent, **margins}
        for run in runs
        for descent, margins in run.facts.get("own_norms", {}).items()
    ]
    notes = [
        f"{run.optimizer}: no token is predicted: there is no margin" for run in runs if run.status == "dead"
    ]
    notes += [
        f"{run.optimizer}: the heads fitted to its features are not ordered by their own norms after "
        f"{DESCENT_STEPS} steps: the table of own norms is not the limit's"
        for run in runs
        if run.facts.get("own_norms") and not wins_in_own_norm(run.facts["own_norms"])
    ]
    norm = config.norms[0]
    key = f"head_{norm}_q50"
    parts = [
        f"{name} {significant(row[key])} (step {row['t']:g}, {row['accuracy']:.0%} of the tokens)"
        for name, row in last.items()
        if row.get(key) is not None
    ]
    symbol = NORM_SYMBOLS[norm]
    headline = (
        f"Median exact {symbol} margin of the head where it predicts the token: {listing(parts)}."
        if parts
        else "No token is predicted."
    )
    scope = (
        "Exact for the last layer on frozen features, over the tokens that are predicted. Radii in embedding space are "
        "upper bounds from a short attack on few tokens, divided by the median size of an embedding; nothing certifies "
        "the body. " + OBSERVED
    )
    plots = [
        Plot(
            "head",
            f"Exact {symbol} margin of the head",
            "Median over predicted tokens.",
            figure(curves(runs, log10_t, lambda r: r.get(key)), **axes(LOG_STEP, "margin")),
            320,
        )
    ]
    return MarginReport(runs, notes, headline, scope, table, plots, {"own_norms": own} if own else {})
