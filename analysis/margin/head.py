"""Mode `head`: margins of a language model's last layer on its own features, exact; and an embedding-space attack.

With frozen features h the prediction of a token is a linear classifier, and the distance of h to the nearest other
decision is min_c [(w_y - w_c)·h + b_y - b_c]/‖w_y - w_c‖. Perturbing input embeddings instead gives upper bounds
alone: attention is not globally Lipschitz, so nothing here certifies the body.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from analysis.margin import own_norms
from analysis.margin.attacks import Effort, attack, functional_margins
from analysis.margin.checkpoints import Loaded, UnreadableCheckpoint, find, load
from analysis.margin.settings import Settings
from analysis.margin.trajectory import Row, Run
from harness.model.loss import IGNORED
from optimizers.linalg.precision import full_precision

QUANTILES = {"q05": 0.05, "q50": 0.5}
RIVALS = 4
"""Other tokens that an embedding attack aims at: the likeliest ones. A change to any of them is a change."""
ATTACKED = 4
EFFORT = Effort(deepfool_steps=6, rounds=3, pgd_steps=8, segment=14)
"""Of the embedding attack: each of its evaluations is a pass through the model."""
FIRST_PLACE = 4
"""Places before this one have next to no context."""
DESCENT_STEPS = 2000

Say = Callable[[str], None]


def run_head(settings: Settings, say: Say) -> list[Run]:
    """One run per optimizer label, a row per checkpoint.

    Raises:
        InputError: bad input.
    """
    runs: dict[str, Run] = {}
    for step, path in (found := find(settings, say)):
        try:
            with full_precision("cpu"):
                loaded = load(path, step, settings, say)
                row, own = measured(loaded, settings)
        except UnreadableCheckpoint as error:
            if not runs and path == found[-1][1]:
                raise
            say(f"left out: {error}")
            continue
        run = runs.setdefault(loaded.optimizer, Run(loaded.optimizer, 0, "ok"))
        run.rows.append(row)
        run.facts |= {"dtype": "float64", "checkpoints": len(run.rows), "own_norms": own}
        say(f"{path.name}: accuracy {row['accuracy']:.3f}")
    for run in runs.values():
        if all(row["margin"] is None for row in run.rows):
            run.status = "dead"
    return list(runs.values())


def measured(loaded: Loaded, settings: Settings) -> tuple[Row, dict[str, dict[str, float]]]:
    """Figures of one checkpoint, and the own-norm table of heads fitted to its features."""
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
    row: Row = {
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
        for norm in settings.norms:
            few = slice(None) if norm == "l2" else slice(settings.max_samples)
            exact = head_margins(h[few], labels[few], head.weight.detach(), scores[few], norm)
            size = torch.linalg.vector_norm(h[few], ord=2.0 if norm == "l2" else torch.inf, dim=1)
            row |= {f"head_{norm}_{name}": float(torch.quantile(exact, s)) for name, s in QUANTILES.items()}
            row[f"head_{norm}_relative_q50"] = float(torch.quantile(exact / size, 0.5))
        row["margin"] = row[f"head_{settings.norms[0]}_q50"]
        row |= _embedding_attack(loaded, settings)
        own = _own_norms(h[: settings.max_samples], labels[: settings.max_samples])
    return row, own


def head_margins(h: Tensor, labels: Tensor, weight: Tensor, scores: Tensor, norm: str) -> Tensor:
    """(n,): exact distance of each feature to the nearest other decision; 0 where the label is not on top.

    Args:
        h: (n, d).
        labels: (n,).
        weight: (c, d) of the head; a bias is in `scores`.
        scores: (n, c).
        norm: of the perturbation of h: "l2" divides by the l2 norm of w_y - w_c, "linf" by the l1 norm.
    """
    found = []
    for label, score in zip(labels, scores):
        rows = weight[label] - weight
        size = torch.linalg.vector_norm(rows, ord=2.0 if norm == "l2" else 1.0, dim=1)
        difference = score[label] - score
        # A class with the label's very weights is told apart by the bias alone, at any distance.
        distance = torch.where(size > 0.0, difference / size.clamp_min(1e-300), torch.inf)
        distance[label] = torch.inf
        found.append(distance.amin().clamp_min(0.0) if len(score) > 1 else distance.amin())
    return torch.stack(found)


def _embedding_attack(loaded: Loaded, settings: Settings) -> Row:
    """Upper bounds: the smallest perturbation of the embeddings of a row that changes one right prediction, over the
    median size of an embedding."""
    model: Any = loaded.model
    table = model.get_input_embeddings().weight.detach()
    rows, places = _right_places(loaded)
    row: Row = {"embedding_attacked": len(rows)}
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
        chosen = torch.cat(
            [labels[:, None], others.topk(min(RIVALS, others.shape[1] - 1), dim=1).indices], dim=1
        )
    target = torch.zeros(len(rows), dtype=torch.int64)

    def scores(embeddings: Tensor) -> Tensor:
        return logits(embeddings).gather(1, chosen)

    for norm in settings.norms:
        upper = attack(scores, inputs, target, norm, effort=EFFORT, seed=settings.seed)
        size = torch.linalg.vector_norm(table, ord=2.0 if norm == "l2" else torch.inf, dim=1).median()
        row[f"embedding_upper_{norm}_q50"] = float(upper.median())
        row[f"embedding_upper_{norm}_relative_q50"] = float(upper.median() / size)
    return row


@torch.no_grad()
def _right_places(loaded: Loaded) -> tuple[list[int], list[int]]:
    """Up to `ATTACKED` rows and, in each, the first place with some context whose next token is predicted."""
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
    """Linear heads on the frozen features under normalized steepest descent, each measured in three norms."""
    classes, short = torch.unique(labels, return_inverse=True)
    if len(classes) < 2:
        return {}
    features, targets = h.numpy(), short.numpy()
    weights = {
        descent: own_norms.descend(features, targets, len(classes), descent, DESCENT_STEPS)
        for descent in own_norms.DESCENTS
    }
    return own_norms.table(weights, features, targets)
