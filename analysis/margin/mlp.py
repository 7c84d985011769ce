"""Mode `mlp`: ReLU networks on digits, trained far past 100 % accuracy by each optimizer; margins on the way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor, nn

from analysis.formatting import listing, significant
from analysis.margin import real
from analysis.margin.config import MarginConfig
from analysis.margin.input_margins import (
    attack,
    certified_radius,
    functional_margins,
    layers_of,
    lipschitz_radius,
)
from analysis.margin.optimizer_specs import OptimizerSpec
from analysis.margin.outputs import OBSERVED, MarginReport
from analysis.margin.plots import NORM_SYMBOLS, curves, shown_runs, step, step_axes
from analysis.margin.steps import record_times
from analysis.margin.toy import optimizers_of
from analysis.margin.trajectory import MarginRun, TrajectoryRow, value_at_loss
from analysis.pages.figures import Plot, colour, figure
from harness.errors import InputError
from optimizers.linalg.robust import full_precision

STEPS, PER_DECADE = 2000, 2
TRAIN = 1000
SPLIT_SEED = 0
CLASSES = 10
LRS = {
    "gd": 0.3, "ngd": 0.05, "sign": 1e-3, "spectral": 0.02, "adam": 1e-3, "adamw": 1e-3, "muon": 0.02,
    "muon_svd": 0.02, "muon_moonlight": 2e-3, "sumo": 2e-3, "sumo_paper": 2e-3, "galore": 0.01,
}  # fmt: skip
"""Default learning rates, at which each optimizer reaches 100 % within some hundred steps."""
LR = 1e-3
QUANTILES = {"q01": 0.01, "q05": 0.05, "q50": 0.5}
ALPHAS = (0.5, 1.0)

GEOMETRIES = {"norm_margin_l2": "Frobenius", "norm_margin_linf": "max", "norm_margin_spec": "spectral"}
LOSSES = (-2.0, -5.0, -10.0, -20.0)
"""ln of the training loss at which attack radii are compared."""
SCOPE = (
    f"ReLU networks on 8 × 8 digits, {TRAIN} for training; margins of test points that are right. Optimizers are "
    "compared at their default rates here, from one start each unless runs= says more; "
    "the table has them at equal loss, too."
)
Say = Callable[[str], None]


class Digits(NamedTuple):
    """scikit-learn's 8×8 digits: fp64 images (n, 64) in [0, 1] and labels (n,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_digits() -> Digits:
    """Return 1000 training images and the other 797 for the margins, in an order that depends on nothing."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    x = torch.tensor(images, dtype=torch.float64)[order] / 16.0
    y = torch.tensor(labels, dtype=torch.int64)[order]
    return Digits(x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:])


def run_mlp(config: MarginConfig, say: Say) -> list[MarginRun]:
    """Train networks with each optimizer and measure them on the way.

    Raises:
        InputError: bad input.
    """
    if config.dtype != "float64":
        raise InputError("dtype", config.dtype, "rounds certified radii", allowed="float64 with mode=mlp")
    digits = load_digits()
    runs = []
    for spec in _specs(config):
        for run in range(config.runs):
            runs.append(_train(config, spec, digits, run))
            last = runs[-1].rows[-1] if runs[-1].rows else {}
            say(f"{spec.name}: {runs[-1].status}, train accuracy {last.get('train_accuracy', math.nan):.4f}")
    return runs


def _specs(config: MarginConfig) -> list[OptimizerSpec]:
    return [optimizers_of(_alone(config, name), LRS.get(name, LR))[0] for name in config.optimizer]


def _alone(config: MarginConfig, name: str) -> MarginConfig:
    """Return the configuration with one optimizer, whose learning rate has a default of its own."""
    strangers = [owner for owner in config.options if owner and owner not in config.optimizer]
    if strangers:
        return config
    options = {owner: values for owner, values in config.options.items() if owner in ("", name)}
    return config.model_copy(update={"optimizer": [name], "options": options})


def network(config: MarginConfig, seed: int) -> nn.Sequential:
    """Return a network 64 - hidden… - 10 with ReLU in between, in fp64, with torch's initialization."""
    torch.manual_seed(seed)
    widths = (64, *config.hidden, CLASSES)
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        parts += [nn.Linear(before, after, bias=config.bias, dtype=torch.float64), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def _train(config: MarginConfig, spec: OptimizerSpec, digits: Digits, run: int) -> MarginRun:
    model = network(config, config.seed + run)
    optimizer = real.build(model, spec)
    steps = config.steps or STEPS
    at = set(record_times(steps, config.record or PER_DECADE)) - {0}
    out = MarginRun(spec.name, run, "ok")
    out.facts = {
        "lr": spec.lr,
        "grad": "log" if spec.scale_free else "raw",
        "dtype": "float64",
        "steps": steps,
        "seed": config.seed + run,
        "bias": config.bias,
    }
    with full_precision("cpu"):
        for t in range(1, steps + 1):
            optimizer.zero_grad(set_to_none=True)
            loss = log_cross_entropy(model(digits.train_x), digits.train_y)
            (loss if spec.scale_free else loss.exp()).backward()
            optimizer.step()
            if not math.isfinite(loss.item()):
                out.status = "diverged"
                break
            if t in at:
                out.rows.append(measure(model, digits, config, t, spec.lr))
    if out.status == "ok" and out.rows[-1]["train_accuracy"] < 1.0:
        out.status = "not_separated"
        out.facts["note"] = (
            "the training set is not separated: margins are those of the points that are right"
        )
    out.facts["fits"] = _fits(out.rows)
    return out


def log_cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Return ln of the mean cross-entropy, with gradients that stay exact where e^(-margin) is far below 1.

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


def measure(model: nn.Sequential, digits: Digits, config: MarginConfig, t: int, lr: float) -> TrajectoryRow:
    """Return the row of one checkpoint.

    `q_*`: functional margins of the training points that are right. `norm_margin_*`: their smallest over the product
    of layer norms (Frobenius, max, spectral), and `smoothed_*` with -ln Σ e^(-q) in its place; heuristic with biases,
    which break homogeneity. `upper_*`, `lower_*`: attack and certified radius of test points that are right.
    """
    scores = _scores(model, digits.train_x)
    q = functional_margins(scores, digits.train_y)
    right = q > 0.0
    row: TrajectoryRow = {
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
    row |= bracket(model, digits, config)
    row["margin"] = row.get(f"upper_{config.norms[0]}_q50")
    row["gap"] = None
    return row


def layer_norms(model: nn.Module) -> dict[str, float]:
    """Return the product over the layers of ‖W‖ in three geometries."""
    weights = [weight for weight, _ in layers_of(model)]
    return {
        "l2": math.prod(float(torch.linalg.matrix_norm(w)) for w in weights),
        "linf": math.prod(float(w.abs().max()) for w in weights),
        "spec": math.prod(float(torch.linalg.matrix_norm(w, ord=2)) for w in weights),
    }


def bracket(model: nn.Sequential, digits: Digits, config: MarginConfig) -> TrajectoryRow:
    """Return quantiles of attack and certified radii over the first test points that are right.

    `bracket_holds` says if lower ≤ upper for each of them.
    """
    x, y = digits.test_x[: config.max_samples], digits.test_y[: config.max_samples]
    margins = functional_margins(_scores(model, x), y)
    right = margins > 0.0
    row: TrajectoryRow = {"attacked": int(right.sum())}
    if not right.any():
        return row
    x, y, margins = x[right], y[right], margins[right]
    holds = True
    for norm in config.norms:
        upper = attack(model, x, y, norm, seed=config.seed)
        lower = torch.zeros_like(upper)
        if config.certify != "none":
            lower = certified_radius(model, x, y, norm, config.certify, upper)
        if norm == "l2":
            lower = torch.maximum(lower, lipschitz_radius(model, margins))
        holds = holds and bool((lower <= upper * (1.0 + 1e-9)).all())
        for side, radii in (("upper", upper), ("lower", lower)):
            row |= {f"{side}_{norm}_{name}": float(torch.quantile(radii, q)) for name, q in QUANTILES.items()}
    row["bracket_holds"] = holds
    return row


def _fits(rows: Sequence[TrajectoryRow]) -> list[Mapping[str, Any]]:
    """Fit m = m∞ - C/(ln t)^α to the margin over t where the training set is separated: a description, no law."""
    pairs = [
        (r["t"], r["margin"]) for r in rows if r["train_accuracy"] == 1.0 and r["margin"] and r["t"] > math.e
    ]
    if len(pairs) < 4:
        return []
    t, m = (np.array(column) for column in zip(*pairs))
    fits = []
    for alpha in ALPHAS:
        x = np.log(t) ** -alpha
        design = np.stack([np.ones_like(x), -x], axis=1)
        (limit, constant), *_ = np.linalg.lstsq(design, m, rcond=None)
        rest = m - design @ np.array([limit, constant])
        total = float(((m - m.mean()) ** 2).sum())
        r2 = 1.0 - float((rest**2).sum()) / total if total > 0.0 else 1.0
        fits.append({"alpha": alpha, "limit": float(limit), "C": float(constant), "r2": r2})
    return fits


def report(config: MarginConfig, runs: Sequence[MarginRun]) -> MarginReport:
    """Return the report of mode `mlp`."""
    table = [_mlp_row(config, runs, name) for name in dict.fromkeys(run.optimizer for run in runs)]
    own = [
        {
            "optimizer": run.optimizer,
            **{norm_name: run.rows[-1].get(key) for key, norm_name in GEOMETRIES.items()},
        }
        for run in shown_runs(runs)
        if run.rows
    ]
    fits = [
        {"optimizer": run.optimizer, **fit} for run in shown_runs(runs) for fit in run.facts.get("fits", [])
    ]
    more = {"normalized_margins": own, **({"fits": fits} if fits else {})}
    return MarginReport(
        runs,
        _notes(runs),
        _headline(config, runs),
        f"{SCOPE} {OBSERVED}",
        table,
        _plots(config, runs),
        more,
        question="Which optimizer's network on digits is harder to fool, and what is proved of it?",
    )


def _mlp_row(config: MarginConfig, runs: Sequence[MarginRun], name: str) -> dict[str, Any]:
    own_runs = [run for run in runs if run.optimizer == name]
    last = own_runs[0].rows[-1] if own_runs[0].rows else {}
    row: dict[str, Any] = {
        "optimizer": name,
        "runs": len(own_runs),
        "separated": sum(run.status == "ok" for run in own_runs),
        "train accuracy": last.get("train_accuracy"),
        "test accuracy": last.get("test_accuracy"),
        "ln loss": last.get("log_loss"),
        "q_min": last.get("q_min"),
    }
    for norm in config.norms:
        row |= {
            f"{norm} lower": last.get(f"lower_{norm}_q50"),
            f"{norm} upper": last.get(f"upper_{norm}_q50"),
        }
    norm = config.norms[0]
    for level in LOSSES:
        row[f"{norm} upper at ln L = {level:g}"] = value_at_loss(own_runs[0].rows, level, f"upper_{norm}_q50")
    return row


def _notes(runs: Sequence[MarginRun]) -> list[str]:
    notes = [f"{run.optimizer}: {run.facts['note']}" for run in runs if run.facts.get("note")]
    broken = [run.optimizer for run in runs for row in run.rows if row.get("bracket_holds") is False]
    notes += [f"{name}: a certified radius exceeds an attack's: one of the two is wrong" for name in broken]
    return list(dict.fromkeys(notes))


def _headline(config: MarginConfig, runs: Sequence[MarginRun]) -> str:
    norm = config.norms[0]
    # Margins of an optimizer that does not separate its data are those of easier points.
    shown = [
        run
        for run in shown_runs(runs)
        if run.status == "ok" and run.rows[-1].get(f"upper_{norm}_q50") is not None
    ]
    if not shown:
        return "No run separates the training set."
    parts = [
        f"{run.optimizer} {significant(run.rows[-1][f'lower_{norm}_q50'])}–"
        f"{significant(run.rows[-1][f'upper_{norm}_q50'])}"
        for run in shown
    ]
    symbol = NORM_SYMBOLS[norm]
    return f"Median {symbol} margin between certificate and attack: {listing(parts)}."


def _plots(config: MarginConfig, runs: Sequence[MarginRun]) -> list[Plot]:
    shown = [run for run in shown_runs(runs) if run.rows]
    plots = [_bands(shown, norm) for norm in config.norms]
    for key, norm_name in GEOMETRIES.items():
        traces = curves(shown, step, lambda r, key=key: r.get(key))
        built = figure(traces, **step_axes(traces, f"q_min / {norm_name} norms"))
        plots.append(
            Plot(key, f"Normalized margin, {norm_name} norm of each layer", "Training set.", built, 300)
        )
    norm = config.norms[0]
    by_loss = curves(shown, lambda r: -r["log_loss"], lambda r: r.get(f"upper_{norm}_q50"))
    caption = "Optimizers lower the loss at different speeds; at equal loss that is taken out."
    axes = {
        "xaxis": {"title": {"text": "−ln training loss"}},
        "yaxis": {"title": {"text": "median attack radius"}},
    }
    built = figure(by_loss, **axes)
    plots.append(Plot("by-loss", "Attack radius at equal loss", caption, built, 320))
    return plots


def _bands(runs: Sequence[MarginRun], norm: str) -> Plot:
    traces: list[Any] = []
    for arm, run in enumerate(runs):
        rows = [row for row in run.rows if row.get(f"upper_{norm}_q50") is not None and row["t"]]
        if not rows:
            continue
        x = [row["t"] for row in rows]
        low, high = ([row[f"{side}_{norm}_q50"] for row in rows] for side in ("lower", "upper"))
        outline = [*x, *x[::-1]]
        meta = {"arm": arm, "band": True}
        traces.append(
            go.Scatter(
                x=outline, y=[*high, *low[::-1]], fill="toself", mode="none", opacity=0.2, fillcolor=colour(arm),
                hoverinfo="skip", showlegend=False, meta=meta,
            )
        )  # fmt: skip
    traces += curves(runs, step, lambda r: r.get(f"upper_{norm}_q50"))
    symbol = NORM_SYMBOLS[norm]
    caption = (
        "Lines: attack, an upper bound. Bands reach down to the certified radius. Medians over test points."
    )
    built = figure(traces, **step_axes(traces, f"{symbol} radius"))
    return Plot(f"band-{norm}", f"Input margin, {symbol}", caption, built, 360)
