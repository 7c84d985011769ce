"""Mode `mlp`: ReLU networks on digits, trained far past 100 % accuracy by each optimizer; margins on the way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analysis.margin import references
from analysis.margin.attacks import attack, functional_margins
from analysis.margin.bounds import certified_radius, layers_of, lipschitz_radius
from analysis.margin.chosen import Chosen
from analysis.margin.digits import Digits, load
from analysis.margin.settings import Settings
from analysis.margin.steps import record_times
from analysis.margin.toy import optimizers_of
from analysis.margin.trajectory import Row, Run
from harness.config.errors import InputError
from optimizers.linalg.precision import full_precision

STEPS, PER_DECADE = 2000, 2
CLASSES = 10
LRS = {
    "gd": 0.3, "ngd": 0.05, "sign": 1e-3, "spectral": 0.02, "adam": 1e-3, "adamw": 1e-3, "muon": 0.02,
    "muon_svd": 0.02, "muon_moonlight": 2e-3, "sumo": 2e-3, "sumo_paper": 2e-3, "galore": 0.01,
}  # fmt: skip
"""Where none is given: sizes at which each reaches 100 % within some hundred steps."""
LR = 1e-3
QUANTILES = {"q01": 0.01, "q05": 0.05, "q50": 0.5}
ALPHAS = (0.5, 1.0)

Say = Callable[[str], None]


def run_mlp(settings: Settings, say: Say) -> list[Run]:
    """Train and measure.

    Raises:
        InputError: bad input.
    """
    if settings.dtype != "float64":
        raise InputError("dtype", settings.dtype, "rounds certified radii", allowed="float64 with mode=mlp")
    digits = load()
    runs = []
    for chosen in _chosen(settings):
        for run in range(settings.runs):
            runs.append(_trained(settings, chosen, digits, run))
            last = runs[-1].rows[-1] if runs[-1].rows else {}
            say(
                f"{chosen.name}: {runs[-1].status}, train accuracy {last.get('train_accuracy', math.nan):.4f}"
            )
    return runs


def _chosen(settings: Settings) -> list[Chosen]:
    found = []
    for name in settings.optimizer:
        one = optimizers_of(_alone(settings, name), LRS.get(name, LR))[0]
        found.append(one)
    return found


def _alone(settings: Settings, name: str) -> Settings:
    """Settings with one optimizer; its learning rate has a default of its own."""
    strangers = [owner for owner in settings.options if owner and owner not in settings.optimizer]
    if strangers:
        return settings
    options = {owner: values for owner, values in settings.options.items() if owner in ("", name)}
    return replace(settings, optimizer=(name,), options=options)


def network(settings: Settings, seed: int) -> nn.Sequential:
    """64 - hidden… - 10, ReLU in between, fp64, torch's initialization."""
    torch.manual_seed(seed)
    widths = (64, *settings.hidden, CLASSES)
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        parts += [nn.Linear(before, after, bias=settings.bias, dtype=torch.float64), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def _trained(settings: Settings, chosen: Chosen, digits: Digits, run: int) -> Run:
    model = network(settings, settings.seed + run)
    stepper = references.build(model, chosen)
    steps = settings.steps or STEPS
    at = set(record_times(steps, settings.record or PER_DECADE)) - {0}
    out = Run(chosen.name, run, "ok")
    out.facts = {
        "lr": chosen.lr,
        "grad": "log" if chosen.scale_free else "raw",
        "dtype": "float64",
        "steps": steps,
        "seed": settings.seed + run,
        "bias": settings.bias,
    }
    with full_precision("cpu"):
        for t in range(1, steps + 1):
            stepper.zero_grad(set_to_none=True)
            loss = log_cross_entropy(model(digits.train_x), digits.train_y)
            (loss if chosen.scale_free else loss.exp()).backward()
            stepper.step()
            if not math.isfinite(loss.item()):
                out.status = "diverged"
                break
            if t in at:
                out.rows.append(measured(model, digits, settings, t, chosen.lr))
    if out.status == "ok" and out.rows[-1]["train_accuracy"] < 1.0:
        out.status = "not_separated"
        out.facts["note"] = (
            "the training set is not separated: margins are those of the points that are right"
        )
    out.facts["fits"] = _fits(out.rows)
    return out


def log_cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """ln of the mean cross-entropy, whose gradients stay exact where e^(-margin) is far below 1.

    With d = ln Σ_{c≠y} e^(z_c - z_y) a point's loss is ln(1 + e^d): no 1 - p is formed, which would round to 0.
    """
    others = scores.scatter(1, labels[:, None], -torch.inf)
    d = torch.logsumexp(others, 1) - scores.gather(1, labels[:, None])[:, 0]
    # ln ln(1 + e^d) is d to rounding below -36; inside `where` the branch not taken must stay finite, too.
    safe = d.clamp_min(-36.0)
    each = torch.where(d < -36.0, d, nn.functional.softplus(safe).log())
    return torch.logsumexp(each, 0) - math.log(len(labels))


@torch.no_grad()
def _scores(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def measured(model: nn.Sequential, digits: Digits, settings: Settings, t: int, lr: float) -> Row:
    """All quantities of one checkpoint.

    `q_*`: functional margins of the training points that are right. `norm_margin_*`: their smallest over the product
    of layer norms (Frobenius, max, spectral), and `smoothed_*` with -ln Σ e^(-q) in its place; heuristic with biases,
    which break homogeneity. `upper_*`, `lower_*`: attack and certified radius of test points that are right.
    """
    scores = _scores(model, digits.train_x)
    q = functional_margins(scores, digits.train_y)
    right = q > 0.0
    row: Row = {
        "t": float(t),
        "ln_tau": math.log(t * lr),
        "log_loss": float(log_cross_entropy(scores, digits.train_y)),
        "train_accuracy": float(right.double().mean()),
        "test_accuracy": float((_scores(model, digits.test_x).argmax(1) == digits.test_y).double().mean()),
        "q_min": float(q.min()),
    }
    if right.any():
        row |= {name: float(torch.quantile(q[right], share)) for name, share in QUANTILES.items()}
    smoothed = -float(torch.logsumexp(-q, 0))
    for name, size in layer_norms(model).items():
        row |= {f"norm_margin_{name}": float(q.min()) / size, f"smoothed_{name}": smoothed / size}
    row |= bracket(model, digits, settings)
    row["margin"] = row.get(f"upper_{settings.norms[0]}_q50")
    row["gap"] = None
    return row


def layer_norms(model: nn.Module) -> dict[str, float]:
    """Product over the layers of ‖W‖ in three geometries."""
    weights = [weight for weight, _ in layers_of(model)]
    return {
        "l2": math.prod(float(torch.linalg.matrix_norm(w)) for w in weights),
        "linf": math.prod(float(w.abs().max()) for w in weights),
        "spec": math.prod(float(torch.linalg.matrix_norm(w, ord=2)) for w in weights),
    }


def bracket(model: nn.Sequential, digits: Digits, settings: Settings) -> Row:
    """Quantiles of attack and certified radii over the first test points that are right; `bracket_holds` says
    whether lower ≤ upper for each of them."""
    x, y = digits.test_x[: settings.max_samples], digits.test_y[: settings.max_samples]
    margins = functional_margins(_scores(model, x), y)
    right = margins > 0.0
    row: Row = {"attacked": int(right.sum())}
    if not right.any():
        return row
    x, y, margins = x[right], y[right], margins[right]
    holds = True
    for norm in settings.norms:
        upper = attack(model, x, y, norm, seed=settings.seed)
        lower = torch.zeros_like(upper)
        if settings.certify != "none":
            lower = certified_radius(model, x, y, norm, settings.certify, upper)
        if norm == "l2":
            lower = torch.maximum(lower, lipschitz_radius(model, margins))
        holds = holds and bool((lower <= upper * (1.0 + 1e-9)).all())
        for side, radii in (("upper", upper), ("lower", lower)):
            row |= {f"{side}_{norm}_{name}": float(torch.quantile(radii, q)) for name, q in QUANTILES.items()}
    row["bracket_holds"] = holds
    return row


def _fits(rows: Sequence[Row]) -> list[Mapping[str, Any]]:
    """m = m∞ - C/(ln t)^α for the margin over t, where the training set is separated; a description, no law."""
    pairs = [
        (r["t"], r["margin"]) for r in rows if r["train_accuracy"] == 1.0 and r["margin"] and r["t"] > math.e
    ]
    if len(pairs) < 4:
        return []
    t, m = (np.array(column) for column in zip(*pairs))
    found = []
    for alpha in ALPHAS:
        x = np.log(t) ** -alpha
        design = np.stack([np.ones_like(x), -x], axis=1)
        (limit, constant), *_ = np.linalg.lstsq(design, m, rcond=None)
        rest = m - design @ np.array([limit, constant])
        total = float(((m - m.mean()) ** 2).sum())
        r2 = 1.0 - float((rest**2).sum()) / total if total > 0.0 else 1.0
        found.append({"alpha": alpha, "limit": float(limit), "C": float(constant), "r2": r2})
    return found
