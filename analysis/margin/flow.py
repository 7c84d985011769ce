"""Gradient flow: in closed form once the points are separated, and integrated in log-time before that.

Integration. The flow of ln L runs through the same points as that of L. With p = softmax of ln |ℓ'| over the points,

    dθ/ds = Σ_i p_i y_i ∇f(x_i)        dτ/ds = exp(-ln mean|ℓ'|)

and ds = h/‖dθ/ds‖ every step moves θ by the arc length h, at τ = 1 as at τ = 1e300. ln τ is accumulated by
logaddexp with Simpson's weights over the stages of a classical Runge–Kutta step of order 4.

Closed form. Points -a (label -1) and c (label 1) on a line through the origin, v fixed, exponential loss. Neurons with
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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.margin.net import Nets, ToyProblem, preactivations

Floats = NDArray[np.float64]
STEP = 0.02
"""Arc length of a step near kinks."""
STRETCH = 5.0
"""How much longer a step is where no neuron was switched for a while."""
CALM = 50
"""Steps without a switch before steps become long (again). Sooner, a neuron may be sliding along a kink."""
AT_SWITCH = 1e-9
"""Arc length within which a switch is located."""
NEAR_KINK = 10.0
"""A preactivation within this many steps of 0 is reported: there the order of the method is lost."""
LANDED = 1e-12
"""Relative error of ln τ within which a recorded time is met."""
_SIMPSON = np.log([1.0 / 6.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 6.0])


@dataclass(frozen=True)
class FlowResult:
    """A trajectory of flow.

    Attributes:
        log_tau: of each state, ascending.
        states: single nets (R = 1).
        steps: Runge–Kutta steps.
        switches: of those, how many switched a neuron on or off at a point.
        steps_near_kinks: of those, how many began with a preactivation within 10·h of 0.
        stuck: the gradient vanished (all neurons off) before the last time was reached.
    """

    log_tau: list[float]
    states: list[Nets]
    steps: int
    switches: int
    steps_near_kinks: int
    stuck: bool


def flow(
    net: Nets, problem: ToyProblem, at: Sequence[float], log_tau: float = -math.inf, step: float = STEP
) -> FlowResult:
    """Follow the flow of one net and record its states at the times `at`.

    Where v is fixed and no neuron was switched for a while, a step is `STRETCH` times as long.

    Args:
        net: the state at `log_tau` (R = 1).
        problem: reduction is ignored: τ is the flow time of the mean loss.
        at: ascending values of ln τ, above `log_tau`, to record the state at.
        log_tau: when `net` is; -inf: τ = 0.
        step: arc length h near kinks.
    """
    field = _Field(net, problem)
    theta, now = field.pack(net), log_tau
    times: list[float] = []
    states: list[Nets] = []
    steps = near = switches = 0
    calm = CALM
    due = list(at)
    here = field(theta)
    while due and here.speed > 0.0:
        length = STRETCH * step if calm >= CALM and not problem.train_output else step
        after, passed = field.runge_kutta(theta, here, length)
        there = field(after)
        if length > step and (there.on != here.on).any():
            length = step
            after, passed = field.runge_kutta(theta, here, length)
            there = field(after)
        if calm >= CALM and (there.on != here.on).any():
            # A step across a kink would be of order 1: end just beyond it.
            length = field.to_switch(theta, here, length)
            after, passed = field.runge_kutta(theta, here, length)
            there = field(after)
        then = float(np.logaddexp(now, passed))
        while due and due[0] <= then:
            times.append(due[0])
            states.append(field.unpack(field.land(theta, here, length, now, then, due.pop(0))))
        switched = bool((there.on != here.on).any())
        calm = 0 if switched else calm + 1
        switches += switched
        near += here.nearest < NEAR_KINK * step
        theta, now, here = after, then, there
        steps += 1
    return FlowResult(times, states, steps, switches, near, bool(due))


class _Slope(NamedTuple):
    """dθ/ds, its norm, ln dτ/ds, which preactivations are positive, and the smallest in absolute value."""

    velocity: Floats
    speed: float
    log_time: float
    on: NDArray[np.bool_]
    nearest: float


class _Field:
    """dθ/ds and ln dτ/ds at a flat θ, with as few operations as numpy allows: they are the cost of a step."""

    def __init__(self, net: Nets, problem: ToyProblem) -> None:
        self.k, self.width = net.hidden.shape[:2]
        self.x = problem.points.augmented
        self.y = problem.points.y
        self.is_exp = problem.loss == "exp"
        self.trains = problem.train_output
        self.v = net.output[:, 0].astype(np.float64)
        self.log_n = math.log(len(self.y))
        self.size = self.k * self.width

    def pack(self, net: Nets) -> Floats:
        """Return the trained parameters as one vector."""
        hidden = net.hidden[..., 0].astype(np.float64).ravel()
        return np.concatenate([hidden, self.v]) if self.trains else hidden

    def unpack(self, theta: Floats) -> Nets:
        """Return the net of flat parameters."""
        hidden = theta[: self.size].reshape(self.k, self.width, 1).copy()
        output = theta[self.size :] if self.trains else self.v
        return Nets(hidden, output[:, None].copy())

    def __call__(self, theta: Floats) -> _Slope:
        """Return the field at θ."""
        hidden = theta[: self.size].reshape(self.k, self.width)
        v = theta[self.size :] if self.trains else self.v
        pre = hidden @ self.x.T
        active = pre > 0.0
        value = pre * active
        z = self.y * (v @ value)
        slopes = -z if self.is_exp else -np.logaddexp(0.0, z)
        top = slopes.max()
        weights = np.exp(slopes - top)
        total = weights.sum()
        pull = weights * (self.y / total)
        gradient = ((v[:, None] * active * pull) @ self.x).ravel()
        if self.trains:
            gradient = np.concatenate([gradient, value @ pull])
        log_time = self.log_n - float(top) - math.log(total)
        return _Slope(gradient, math.sqrt(gradient @ gradient), log_time, active, float(np.abs(pre).min()))

    def runge_kutta(self, theta: Floats, first: _Slope, length: float) -> tuple[Floats, float]:
        """Return (θ after one step of arc length `length`, ln of the time that it took)."""
        ds = length / first.speed
        second = self(theta + 0.5 * ds * first.velocity)
        third = self(theta + 0.5 * ds * second.velocity)
        fourth = self(theta + ds * third.velocity)
        middle = second.velocity + third.velocity
        after = theta + (ds / 6.0) * (first.velocity + 2.0 * middle + fourth.velocity)
        exponents = _SIMPSON + np.array([stage.log_time for stage in (first, second, third, fourth)])
        top = float(exponents.max())
        return after, math.log(ds) + top + math.log(np.exp(exponents - top).sum())

    def to_switch(self, theta: Floats, first: _Slope, length: float) -> float:
        """Return the shortest step, to `AT_SWITCH`, after which another set of neurons is on."""
        low, high = 0.0, length
        while high - low > AT_SWITCH:
            middle = 0.5 * (low + high)
            place, _ = self.runge_kutta(theta, first, middle)
            if (self(place).on != first.on).any():
                high = middle
            else:
                low = middle
        return high

    def land(
        self, theta: Floats, first: _Slope, length: float, now: float, then: float, target: float
    ) -> Floats:
        """Return θ at ln τ = `target`, between `now` and `then`.

        The length of the step that ends there is found by regula falsi (Illinois form): ln τ is nearly affine in it.
        """
        low, high, at_high = 0.0, length, then - target
        at_low = now - target if math.isfinite(now) else -20.0
        place = theta
        for _ in range(60):
            part = high - at_high * (high - low) / (at_high - at_low)
            place, passed = self.runge_kutta(theta, first, part)
            at = float(np.logaddexp(now, passed)) - target
            # An error of ln τ shifts a gap by its own share of ln τ.
            if abs(at) <= LANDED * max(1.0, abs(target)) or high - low <= 1e-16:
                break
            if at > 0.0:
                high, at_high, at_low = part, at, 0.5 * at_low
            else:
                low, at_low, at_high = part, at, 0.5 * at_high
        return place


@dataclass(frozen=True)
class SeparatedState:
    """A separated state, and the flow from it on in closed form.

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
        """Return (u₊, u₋) at a later time."""
        if log_tau <= self.log_tau:
            return self.value
        passed = log_tau + math.log1p(-math.exp(self.log_tau - log_tau))
        first, second = (
            float(np.logaddexp(passed + rate, start)) for rate, start in zip(self.log_rate, self.value)
        )
        return first, second

    def boundary(self, log_tau: float) -> float:
        """Return x*, the zero of f, as a coordinate along e."""
        plus, minus = self.outputs(log_tau)
        return self._zero(plus, minus)

    def margin(self, log_tau: float) -> float:
        """Return the margin, min(x* + a, c - x*)."""
        zero = self.boundary(log_tau)
        return min(zero + self.a, self.c - zero)

    @property
    def limit(self) -> float:
        """Limit of x* as τ → ∞, if the neurons stay off at the other's point (ac ≥ 1)."""
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
        """Return W₊ - W₋ where the outputs are these."""
        kept_plus, kept_minus = self.kept
        first = (self.c * plus + kept_plus) / (self.c**2 + 1.0)
        return first + (self.a * minus + kept_minus) / (self.a**2 + 1.0)

    def _intercepts(self, minus: float, plus: float) -> float:
        """Return B₋ - B₊ where the outputs are these."""
        kept_plus, kept_minus = self.kept
        first = (minus - self.a * kept_minus) / (self.a**2 + 1.0)
        return first - (plus - self.c * kept_plus) / (self.c**2 + 1.0)


def separated_state(net: Nets, problem: ToyProblem, log_tau: float) -> SeparatedState | None:
    """Return the state of one net (R = 1) if it is separated, else None.

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
    return SeparatedState(a, c, rates, values, kept, log_tau)
