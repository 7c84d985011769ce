"""Gradient flow in log-time: as far as ln τ reaches in fp64, which is without end.

The flow of ln L runs through the same points as that of L. With p = softmax of ln |ℓ'| over the points,

    dθ/ds = Σ_i p_i y_i ∇f(x_i)        dτ/ds = exp(-ln mean|ℓ'|)

and ds = h/‖dθ/ds‖ every step moves θ by the arc length h, at τ = 1 as at τ = 1e300. ln τ is accumulated by
logaddexp with Simpson's weights over the stages of a classical Runge–Kutta step of order 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.margin.net import Nets, Problem

Floats = NDArray[np.float64]
STEP = 0.02
STRETCH = 5.0
CALM = 50
"""Steps without a switch before steps become long (again). Sooner, a neuron may be sliding along a kink."""
AT_SWITCH = 1e-9
"""Arc length within which a switch is located."""
NEAR_KINK = 10.0
"""A preactivation within this many steps of 0 is reported: there the order of the method is lost."""
LANDED = 1e-12
_SIMPSON = np.log([1.0 / 6.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 6.0])


@dataclass(frozen=True)
class Flowed:
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
    net: Nets, problem: Problem, at: Sequence[float], log_tau: float = -math.inf, step: float = STEP
) -> Flowed:
    """Carry one net on in flow time.

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
    wanted = list(at)
    here = field(theta)
    while wanted and here.speed > 0.0:
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
        while wanted and wanted[0] <= then:
            times.append(wanted[0])
            states.append(field.unpack(field.land(theta, here, length, now, then, wanted.pop(0))))
        switched = bool((there.on != here.on).any())
        calm = 0 if switched else calm + 1
        switches += switched
        near += here.nearest < NEAR_KINK * step
        theta, now, here = after, then, there
        steps += 1
    return Flowed(times, states, steps, switches, near, bool(wanted))


class _Slope(NamedTuple):
    """dθ/ds, its norm, ln dτ/ds, which preactivations are positive, and the smallest in absolute value."""

    velocity: Floats
    speed: float
    log_time: float
    on: NDArray[np.bool_]
    nearest: float


class _Field:
    """dθ/ds and ln dτ/ds at a flat θ, with as few operations as numpy allows: they are the cost of a step."""

    def __init__(self, net: Nets, problem: Problem) -> None:
        self.k, self.width = net.hidden.shape[:2]
        self.x = problem.points.augmented
        self.y = problem.points.y
        self.is_exp = problem.loss == "exp"
        self.trains = problem.train_output
        self.v = net.output[:, 0].astype(np.float64)
        self.log_n = math.log(len(self.y))
        self.size = self.k * self.width

    def pack(self, net: Nets) -> Floats:
        """Flat trained parameters."""
        hidden = net.hidden[..., 0].astype(np.float64).ravel()
        return np.concatenate([hidden, self.v]) if self.trains else hidden

    def unpack(self, theta: Floats) -> Nets:
        """The net of flat parameters."""
        hidden = theta[: self.size].reshape(self.k, self.width, 1).copy()
        output = theta[self.size :] if self.trains else self.v
        return Nets(hidden, output[:, None].copy())

    def __call__(self, theta: Floats) -> _Slope:
        """The field at θ."""
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
        """(θ after one step of arc length `length`, ln of the time that it took)."""
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
        """The shortest step, to `AT_SWITCH`, after which another set of neurons is on."""
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
        """θ at ln τ = `target`, between `now` and `then`: a step of the length that ends there, found by regula
        falsi (Illinois form) on a function that is nearly affine."""
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
