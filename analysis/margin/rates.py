"""How fast a gap closes: fits of 1/gap and of ln gap against ln t, and the class that they support."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ZERO = 1e-12
GOOD = 0.999
DECADES = 2.0
LEAST_DECADES = 1.0
CURVED = 0.02
POWER = (0.8, 1.2)
DECADE = float(np.log(10.0))


@dataclass(frozen=True)
class Rate:
    """What a trajectory says about its rate.

    Attributes:
        rate_class: "log" (1/gap is affine in ln t), "power" (gap ~ 1/t), "zero", or "undetermined".
        constant: C, the inverse slope of 1/gap against ln t; None where the class is another or the window
            is shorter than a decade.
        slope: of 1/gap against ln t.
        r2: of that fit.
        window: (first, last) ln t of the fit.
        exponent: gap ~ t^(-exponent), fitted to the last decade.
        exponent_r2: of that fit.
        log_exponent: gap ~ (ln t)^(-log_exponent), fitted in the window; where ln t > 1.
        why: what kept the class from being decided, or which gap was fitted; "" if nothing is to say.
    """

    rate_class: str
    constant: float | None = None
    slope: float | None = None
    r2: float | None = None
    window: tuple[float, float] | None = None
    exponent: float | None = None
    exponent_r2: float | None = None
    log_exponent: float | None = None
    why: str = ""


def classify(log_t: Floats, gap: Floats, settled: float, stop: float = np.inf) -> Rate:
    """Classify one trajectory.

    The class is "log" if r² > 0.999 over at least two decades and the slopes of both halves agree to 2 %: a
    power of ln t other than -1 also looks straight through a narrow window, but bends. It is "power" if
    r² > 0.999 for ln gap over the last decade with an exponent in [0.8, 1.2], which no logarithm imitates.

    Args:
        log_t: (n,) ascending, ln t or ln τ: a constant shift changes no slope.
        gap: (n,) distance of the margin from its limit.
        settled: the smallest log_t at which the start is forgotten (`closed_form.Separated.settled`).
        stop: nothing after this is used (stagnation).
    """
    use = np.isfinite(log_t) & np.isfinite(gap) & (log_t < stop)
    log_t, gap = log_t[use], gap[use]
    if len(log_t) < 3:
        return Rate("undetermined", why="fewer than three states can be used")
    last = log_t >= log_t[-1] - DECADES * DECADE - 1e-9
    if (gap[last] < ZERO).all():
        return Rate("zero", window=_window(log_t[last]))
    positive = gap > 0.0
    final = positive & (log_t >= log_t[-1] - DECADE - 1e-9)
    power = _power(log_t[final], gap[final])
    inside = (log_t >= settled) & positive
    x, y = log_t[inside], 1.0 / gap[inside]
    span = (x[-1] - x[0]) / DECADE if len(x) > 2 else 0.0
    if power is not None and POWER[0] <= power[0] <= POWER[1] and power[1] > GOOD:
        return Rate("power", window=_window(log_t[final]), exponent=power[0], exponent_r2=power[1])
    exponent, exponent_r2 = power if power is not None else (None, None)
    if span < LEAST_DECADES - 1e-9:
        why = f"{span:.1f} decades after the start is forgotten; 2 are needed"
        return Rate("undetermined", exponent=exponent, exponent_r2=exponent_r2, why=why)
    slope, r2 = _fit(x, y)
    later = x > 1.0
    log_exponent = -_fit(np.log(x[later]), np.log(1.0 / y[later]))[0] if later.sum() > 2 else None
    middle = 0.5 * (x[0] + x[-1])
    halves = [_fit(x[part], y[part])[0] for part in (x <= middle, x >= middle) if part.sum() > 1]
    bend = abs(halves[-1] - halves[0]) / abs(slope) if slope else np.inf
    straight = slope > 0.0 and r2 > GOOD and bend < CURVED
    is_log = straight and span >= DECADES - 1e-9
    if is_log:
        why = ""
    elif straight:
        why = f"{span:.1f} decades after the start is forgotten; 2 are needed"
    else:
        why = f"1/gap is not straight in ln t (r² {r2:.5f}, slopes of the halves differ by {bend:.1%})"
    return Rate(
        "log" if is_log else "undetermined",
        constant=1.0 / slope if straight else None,
        slope=slope,
        r2=r2,
        window=_window(x),
        exponent=exponent,
        exponent_r2=exponent_r2,
        log_exponent=log_exponent,
        why=why,
    )


def _power(x: Floats, gap: Floats) -> tuple[float, float] | None:
    if len(x) < 3 or x[-1] - x[0] < 0.9 * DECADE:
        return None
    slope, r2 = _fit(x, np.log(gap))
    return -slope, r2


def _fit(x: Floats, y: Floats) -> tuple[float, float]:
    """(slope, r²) of least squares."""
    dx, dy = x - x.mean(), y - y.mean()
    slope = float(dx @ dy / (dx @ dx)) if len(x) > 1 else float("nan")
    total = float(dy @ dy)
    rest = dy - slope * dx
    return slope, 1.0 - float(rest @ rest) / total if total > 0.0 else 1.0


def _window(x: Floats) -> tuple[float, float]:
    return float(x[0]), float(x[-1])
