"""The trajectory of gradient flow in closed form, once each neuron is on at its own point only.

Points -a (label -1) and c (label 1) on a line through the origin, v fixed, exponential loss. Neurons with
v > 0 that are on at c form one group, those with v < 0 on at -a the other; all others are off at both points
and stay so. With W = Σ|v|·w·e, B = Σ|v|·b over a group, V = Σv² and τ the flow time of the mean loss:

    u₊ = cW₊ + B₊ = f(c)          du₊/dτ = ½(c² + 1)V₊ e^(-u₊)    ⇒  u₊ = ln(½(c² + 1)V₊τ + e^(u₊(0)))
    D₊ = W₊ - cB₊ is conserved        (for the other group: a, -W₋ in place of c, W₊)

The zero of f between the points is x* = (B₋ - B₊)/(W₊ - W₋), hence x* → (c - a)/(1 + ac) with a correction
C/ln τ. Derived here, not taken from arXiv 2603.02095, and checked against steps and the integrator in tests.
The loss constant (mean or sum) and the learning rate only shift ln τ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analysis.margin.net import Nets, Problem, preactivations


@dataclass(frozen=True)
class Separated:
    """A separated state and what flow makes of it.

    Attributes:
        a, c: the points -a and c.
        log_rate: (ln ½(c² + 1)V₊, ln ½(a² + 1)V₋).
        value: (u₊, u₋), outputs at the two points times their labels.
        kept: (D₊, D₋).
        log_tau: ln of the flow time at which the net is in this state (-inf: at the start).
    """

    a: float
    c: float
    log_rate: tuple[float, float]
    value: tuple[float, float]
    kept: tuple[float, float]
    log_tau: float

    def outputs(self, log_tau: float) -> tuple[float, float]:
        """(u₊, u₋) at a later time."""
        if log_tau <= self.log_tau:
            return self.value
        passed = log_tau + math.log1p(-math.exp(self.log_tau - log_tau))
        first, second = (
            float(np.logaddexp(passed + rate, start)) for rate, start in zip(self.log_rate, self.value)
        )
        return first, second

    def boundary(self, log_tau: float) -> float:
        """x*, the zero of f, as a coordinate along e."""
        plus, minus = self.outputs(log_tau)
        return self._zero(plus, minus)

    def margin(self, log_tau: float) -> float:
        """min(x* + a, c - x*)."""
        zero = self.boundary(log_tau)
        return min(zero + self.a, self.c - zero)

    @property
    def limit(self) -> float:
        """Where x* tends to as τ → ∞, if the neurons stay off at the other's point (ac ≥ 1)."""
        return (self.c - self.a) / (1.0 + self.a * self.c)

    @property
    def margin_limit(self) -> float:
        """Margin as τ → ∞; the optimum is (a + c)/2, which differs unless a = c or ac = 1."""
        return min(self.limit + self.a, self.c - self.limit)

    @property
    def constant(self) -> float:
        """C = lim |x* - limit|·ln τ; |w₁ + w₂ + b₂ - b₁|/2 for two neurons and a = c = 1."""
        # x* = (αL + n)/(βL + m) for u = L + ln(rate), so that x* - α/β ≈ (n - m·α/β)/(βL).
        plus, minus = self.log_rate
        numerator = self._intercepts(minus, plus)
        denominator = self._slopes(plus, minus)
        beta = self.c / (self.c**2 + 1.0) + self.a / (self.a**2 + 1.0)
        return abs(numerator - self.limit * denominator) / beta

    @property
    def settled(self) -> float:
        """ln τ from which the start is forgotten to 1 %: e^(u(0)) is a hundredth of what flow has added."""
        added = max(value - rate for value, rate in zip(self.value, self.log_rate))
        return max(math.log(100.0) + added, self.log_tau)

    def _zero(self, plus: float, minus: float) -> float:
        return self._intercepts(minus, plus) / self._slopes(plus, minus)

    def _slopes(self, plus: float, minus: float) -> float:
        """W₊ - W₋ where the outputs are these."""
        kept_plus, kept_minus = self.kept
        first = (self.c * plus + kept_plus) / (self.c**2 + 1.0)
        return first + (self.a * minus + kept_minus) / (self.a**2 + 1.0)

    def _intercepts(self, minus: float, plus: float) -> float:
        """B₋ - B₊."""
        kept_plus, kept_minus = self.kept
        first = (minus - self.a * kept_minus) / (self.a**2 + 1.0)
        return first - (plus - self.c * kept_plus) / (self.c**2 + 1.0)


def separated(net: Nets, problem: Problem, log_tau: float) -> Separated | None:
    """The state of one net (R = 1) if it is separated, else None.

    None also where v is trained, where the points are not -a·e and c·e, and where ac < 1: there neurons come
    back to the other's point.
    """
    geometry = problem.points.geometry
    if geometry is None or problem.train_output:
        return None
    a, c, axis = geometry
    if a * c < 1.0 - 1e-12:
        return None
    on = preactivations(net, problem.points)[..., 0] > 0.0
    order = np.argsort(problem.points.y)
    on_minus, on_plus = on[:, order[0]], on[:, order[1]]
    v = net.output[:, 0].astype(np.float64)
    moves = v != 0.0
    own = np.where(v > 0.0, on_plus, on_minus) & moves
    astray = np.where(v > 0.0, on_minus, on_plus) & moves
    plus, minus = own & (v > 0.0), own & (v < 0.0)
    if astray.any() or not plus.any() or not minus.any():
        return None
    hidden = net.hidden[..., 0].astype(np.float64)
    along, bias, size = hidden[:, :-1] @ axis, hidden[:, -1], np.abs(v)

    def total(group: np.ndarray, values: np.ndarray) -> float:
        return float((size * values)[group].sum())

    w_plus, b_plus = total(plus, along), total(plus, bias)
    w_minus, b_minus = total(minus, along), total(minus, bias)
    rates = (
        math.log(0.5 * (c * c + 1.0) * float((v * v)[plus].sum())),
        math.log(0.5 * (a * a + 1.0) * float((v * v)[minus].sum())),
    )
    values = (c * w_plus + b_plus, b_minus - a * w_minus)
    kept = (w_plus - c * b_plus, -w_minus - a * b_minus)
    return Separated(a, c, rates, values, kept, log_tau)
