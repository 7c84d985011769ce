"""Initial weights of toy nets, from the configuration or drawn at random."""

from __future__ import annotations

from typing import Any

import numpy as np

from analysis.margin.config import RANDOM_INITS, MarginConfig
from analysis.margin.net import Nets, ToyProblem, preactivations
from analysis.margin.points import Points, sign_changes
from harness.errors import InputError

DEFAULT_W, DEFAULT_B = (2.0, -0.5), (0.0, 0.0)
THESIS_W, THESIS_B = (1.0, -10.0), (1.0, 10.0)
DECOUPLED = 1e-12


def start(config: MarginConfig, problem: ToyProblem) -> Nets:
    """Return the nets at step 0, with the runs on the last axis.

    Random ones are drawn from `numpy.random.default_rng(seed)`, all w first, then all b.

    Raises:
        InputError: shapes that do not fit; too few neurons for the points; a start from which a point can never
            be learned.
    """
    points = problem.points
    dim = points.x.shape[1]
    init = _init(config)
    w, b = (
        _random_weights(config, init, dim) if init in RANDOM_INITS else _explicit_weights(config, init, dim)
    )
    v = _output(config, w.shape[0])
    _check_width(len(w), points)
    hidden = np.concatenate([w, b[:, None]], axis=1)
    dtype = np.dtype(config.dtype)
    output = np.repeat(v[:, None], hidden.shape[-1], axis=1)
    nets = Nets(hidden.astype(dtype), output.astype(dtype))
    if init not in RANDOM_INITS:
        _refuse_dead(nets, problem, config)
    return nets


def _init(config: MarginConfig) -> str:
    if config.init is not None:
        if config.init != "explicit" and (config.w is not None or config.b is not None):
            raise InputError("init", config.init, "and w or b are two starts", fix="leave out init")
        return config.init
    is_given = config.w is not None or config.b is not None
    return "explicit" if is_given or (config.runs == 1 and config.k == 2 and config.dim == 1) else "he"


def _random_weights(config: MarginConfig, init: str, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random w (k, d, R) and b (k, R)."""
    rng = np.random.default_rng(config.seed)
    shape = (config.runs, config.k, dim)
    if init == "he":
        w = rng.normal(0.0, (2.0 / dim) ** 0.5, shape)
        b = np.zeros(shape[:2])
    else:
        w = rng.normal(0.0, 1.0, shape)
        b = rng.normal(0.0, 1.0, shape[:2])
    return np.moveaxis(w, 0, -1), np.moveaxis(b, 0, -1)


def _explicit_weights(config: MarginConfig, init: str, dim: int) -> tuple[np.ndarray, np.ndarray]:
    if config.runs > 1:
        raise InputError("runs", config.runs, f"starts from {init} weights are all the same", fix="init=he")
    if init == "thesis":
        w: Any = THESIS_W
        b: Any = THESIS_B
    else:
        w = DEFAULT_W if config.w is None else config.w
        b = config.b
    weights = _array("w", w)
    weights = weights[:, None] if weights.ndim == 1 else weights
    if weights.ndim != 2 or weights.shape[1] != dim:
        shape = (
            f"a list of k numbers, or of k lists of {dim}"
            if dim == 1
            else f"a list of k lists of {dim} numbers"
        )
        raise InputError("w", w, f"does not fit points in R^{dim}", allowed=shape)
    biases = np.zeros(len(weights)) if b is None else _array("b", b)
    if biases.shape != (len(weights),):
        raise InputError(
            "b", b, f"does not fit w, which has {len(weights)} neurons", allowed="a number per neuron"
        )
    return weights[..., None], biases[:, None]


def _array(key: str, value: Any) -> np.ndarray:
    try:
        array = np.array(value if isinstance(value, list | tuple) else [value], dtype=np.float64)
    except (TypeError, ValueError):
        array = np.array([np.nan])
    if not np.isfinite(array).all() or array.ndim > 2:
        raise InputError(
            key, value, "is not a list of numbers", fix=f"{key}=2,-0.5" if key == "w" else f"{key}=0,0"
        )
    return array


def _output(config: MarginConfig, k: int) -> np.ndarray:
    half = np.where(np.arange(k) < (k + 1) // 2, 1.0, -1.0)
    if config.v in ("fixed", "trained"):
        return half
    if isinstance(config.v, str):
        raise InputError("v", config.v, allowed="fixed, trained, or a number per neuron")
    v = _array("v", config.v)
    if v.shape != (k,):
        raise InputError(
            "v", config.v, f"does not fit {k} neurons", allowed="a number per neuron", fix="v=fixed"
        )
    if not ((v > 0.0).any() and (v < 0.0).any()):
        raise InputError(
            "v", config.v, "cannot give both signs", allowed="one positive and one negative at least"
        )
    return v


def _check_width(k: int, points: Points) -> None:
    dim = points.x.shape[1]
    if dim > 1 and k != 2:
        raise InputError(
            "k", k, f"has no exact margin in R^{dim}", allowed="k=2, or points on a line", fix="k=2"
        )
    if k < 2:
        raise InputError(
            "k", k, "is one neuron, which never changes its sign", allowed="2 or more", fix="k=2"
        )
    if dim == 1 and (changes := sign_changes(points)) > k - 1:
        reason = f"are not separable by {k} neurons: their labels change {changes} times along the line"
        raise InputError("data", points.name, reason, fix=f"k={changes + 1} or more")


def _refuse_dead(net: Nets, problem: ToyProblem, config: MarginConfig) -> None:
    """Refuse a start from which a point stays on the wrong side for ever.

    Where the gradients of the two points do not meet (x·x' + 1 = 0), that is a point at which no neuron is on that
    could raise its margin.
    """
    points = problem.points
    if problem.train_output or len(points.y) != 2:
        return
    overlap = float(points.augmented[0] @ points.augmented[1])
    if abs(overlap) > DECOUPLED:
        return
    on = preactivations(net, points)[..., 0] > 0.0
    helps = on & (net.output * points.y > 0.0)
    for i in range(2):
        if not helps[:, i].any():
            place = ", ".join(f"{coordinate:g}" for coordinate in points.x[i])
            reason = f"is dead: at the point {place} no neuron is on that could raise its margin, and none ever will be"
            raise InputError(
                "w", config.w if config.w is not None else "default", reason, fix="w=2,-0.5 b=0,0"
            )
