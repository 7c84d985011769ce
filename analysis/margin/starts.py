"""Initial weights of toy nets: given, or drawn."""

from __future__ import annotations

from typing import Any

import numpy as np

from analysis.margin.keys import RANDOM
from analysis.margin.net import Nets, Problem, preactivations
from analysis.margin.points import Points, sign_changes
from analysis.margin.settings import Settings
from harness.config.errors import InputError

DEFAULT_W, DEFAULT_B = (2.0, -0.5), (0.0, 0.0)
THESIS_W, THESIS_B = (1.0, -10.0), (1.0, 10.0)
DECOUPLED = 1e-12


def start(settings: Settings, problem: Problem) -> Nets:
    """The nets at step 0, (…, runs).

    Random ones are drawn from `numpy.random.default_rng(seed)`, all w first, then all b.

    Raises:
        InputError: shapes that don't fit; too few neurons for the points; a start from which a point can never
            be learned.
    """
    points = problem.points
    dim = points.x.shape[1]
    init = _init(settings)
    w, b = _drawn(settings, init, dim) if init in RANDOM else _given(settings, init, dim)
    v = _output(settings, w.shape[0])
    _check_width(len(w), points)
    hidden = np.concatenate([w, b[:, None]], axis=1)
    dtype = np.dtype(settings.dtype)
    output = np.repeat(v[:, None], hidden.shape[-1], axis=1)
    found = Nets(hidden.astype(dtype), output.astype(dtype))
    if init not in RANDOM:
        _refuse_dead(found, problem, settings)
    return found


def _init(settings: Settings) -> str:
    if settings.init is not None:
        if settings.init != "explicit" and (settings.w is not None or settings.b is not None):
            raise InputError("init", settings.init, "and w or b are two starts", fix="leave out init")
        return settings.init
    is_given = settings.w is not None or settings.b is not None
    return "explicit" if is_given or (settings.runs == 1 and settings.k == 2 and settings.dim == 1) else "he"


def _drawn(settings: Settings, init: str, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """(k, d, R) and (k, R)."""
    rng = np.random.default_rng(settings.seed)
    shape = (settings.runs, settings.k, dim)
    if init == "he":
        w = rng.normal(0.0, (2.0 / dim) ** 0.5, shape)
        b = np.zeros(shape[:2])
    else:
        w = rng.normal(0.0, 1.0, shape)
        b = rng.normal(0.0, 1.0, shape[:2])
    return np.moveaxis(w, 0, -1), np.moveaxis(b, 0, -1)


def _given(settings: Settings, init: str, dim: int) -> tuple[np.ndarray, np.ndarray]:
    if settings.runs > 1:
        raise InputError("runs", settings.runs, f"starts from {init} weights are all the same", fix="init=he")
    if init == "thesis":
        w: Any = THESIS_W
        b: Any = THESIS_B
    else:
        w = DEFAULT_W if settings.w is None else settings.w
        b = settings.b
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
        found = np.array(value if isinstance(value, list | tuple) else [value], dtype=np.float64)
    except (TypeError, ValueError):
        found = np.array([np.nan])
    if not np.isfinite(found).all() or found.ndim > 2:
        raise InputError(
            key, value, "is no list of numbers", fix=f"{key}=2,-0.5" if key == "w" else f"{key}=0,0"
        )
    return found


def _output(settings: Settings, k: int) -> np.ndarray:
    half = np.where(np.arange(k) < (k + 1) // 2, 1.0, -1.0)
    if settings.v in ("fixed", "trained"):
        return half
    if isinstance(settings.v, str):
        raise InputError("v", settings.v, allowed="fixed, trained, or a number per neuron")
    v = _array("v", settings.v)
    if v.shape != (k,):
        raise InputError(
            "v", settings.v, f"does not fit {k} neurons", allowed="a number per neuron", fix="v=fixed"
        )
    if not ((v > 0.0).any() and (v < 0.0).any()):
        raise InputError(
            "v", settings.v, "cannot give both signs", allowed="one positive and one negative at least"
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


def _refuse_dead(net: Nets, problem: Problem, settings: Settings) -> None:
    """A point at which no neuron that could raise its margin is on stays on the wrong side for ever, where the
    gradients of the points don't meet: x·x' + 1 = 0."""
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
                "w", settings.w if settings.w is not None else "default", reason, fix="w=2,-0.5 b=0,0"
            )
