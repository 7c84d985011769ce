"""Small builders that the tests of the toy share."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from analysis.margin.flow import flow
from analysis.margin.net import Nets, ToyProblem, exact_margin
from analysis.margin.optimizer_specs import OptimizerSpec, resolve_spec
from analysis.margin.points import pair
from analysis.margin.steps import train

A = ToyProblem(pair(1.0, 1.0))
"""Setting A of the dossier: points -1 and 1, mean exponential loss, v = (1, -1) fixed."""
I1 = ([2.0, -0.5], [0.0, 0.0])
I2 = ([1.0, -3.0], [0.5, 0.0])


def nets(w: object, b: object, v: object, dtype: type = np.float64) -> Nets:
    """Return one net from w (k,) or (k, d), b (k,) and v (k,)."""
    weights = np.asarray(w, dtype=dtype)
    weights = weights[:, None] if weights.ndim == 1 else weights
    hidden = np.concatenate([weights, np.asarray(b, dtype=dtype)[:, None]], axis=1)
    return Nets(hidden[..., None], np.asarray(v, dtype=dtype)[:, None])


def net(w: object, b: object | None = None, v: object | None = None) -> Nets:
    """A single net; b = 0 and v = (1, …, -1, …) unless given."""
    k = len(np.asarray(w))
    half = np.where(np.arange(k) < (k + 1) // 2, 1.0, -1.0)
    return nets(w, np.zeros(k) if b is None else b, half if v is None else v)


def gap(state: Nets, problem: ToyProblem = A) -> float:
    """Optimum less exact margin."""
    return problem.points.margin_optimum - exact_margin(state, problem.points).value


def optimizer(name: str, lr: float = 0.01, grad: str = "auto", **options: object) -> OptimizerSpec:
    """An optimizer with its defaults here."""
    return resolve_spec(name, lr, options, grad)


def states(
    start: Nets, at: list[int], name: str = "gd", lr: float = 0.01, problem: ToyProblem = A
) -> list[Nets]:
    """The net at each of the steps `at`."""
    stepped = train(start, problem, optimizer(name, lr), at, gives_up=False)
    return [snapshot.nets for snapshot in stepped.snapshots]


def flowed(start: Nets, powers: list[float], problem: ToyProblem = A) -> list[Nets]:
    """The net at flow times 10^power."""
    found = flow(start, problem, [power * math.log(10.0) for power in powers])
    return found.states


def ln10(power: float) -> float:
    """ln 10^power."""
    return power * math.log(10.0)


def random_net(seed: int, k: int, dim: int = 1, scale: float = 1.0) -> Nets:
    """All weights and biases normal."""
    rng = np.random.default_rng(seed)
    w: NDArray[np.float64] = rng.normal(0.0, scale, (k, dim))
    return nets(
        w if dim > 1 else w[:, 0], rng.normal(0.0, scale, k), np.where(np.arange(k) < (k + 1) // 2, 1.0, -1.0)
    )
