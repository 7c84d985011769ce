"""Lemma 3.2 of SUMO (arXiv 2505.24749): a bound on the error of Newton-Schulz iterations, and where it holds.

For A of full rank with condition number κ the lemma states, after i steps, ‖E_i‖₂ ≤ (1 - 1/κ²)^(2^i) and
‖E_i‖_F ≤ √r (1 - 1/κ²)^(2^i), with r the number of singular values above the smallest. (The displayed formula is
reconstructed from the proof, which calls κ² = κ(AAᵀ) the condition number.)

An odd polynomial iteration keeps singular vectors: the singular values of the error are |1 - p_i(s)| at the scaled
singular values s of A, where p_i is the composed polynomial. All numbers are fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# The same coefficients as the rules use.
JORDAN = (3.4445, -4.7750, 2.0315)
CUBIC = (1.5, -0.5, 0.0)
TAYLOR = (1.875, -1.25, 0.375)
STEPS = 5
SIDE = 16
KAPPAS = (1.01, 2.0, 3.0, 10.0, 100.0, 1e3, 1e4)
ROUNDING = 1e-12
"""By how much a bound may be exceeded before it counts as violated."""

Floats = NDArray[np.float64]


class Iteration(NamedTuple):
    """An iteration and its start.

    Attributes:
        key: name in documents.
        label: for people.
        coefficients: (a, b, c) of X ← aX + bXXᵀX + c(XXᵀ)²X; None: X ← 2X - X², which is no odd polynomial.
        of_gram: the iteration starts from AAᵀ, not A.
        norm: by which the start is divided, spectral or frobenius.
        claimed: the proof of the lemma, or its use by the paper, is about this one.
    """

    key: str
    label: str
    coefficients: tuple[float, float, float] | None
    of_gram: bool
    norm: str
    claimed: str

    def polynomial(self, s: Floats, steps: int) -> Floats:
        """Return p_steps(s), elementwise."""
        for _ in range(steps):
            if self.coefficients is None:
                s = 2.0 * s - s * s
            else:
                a, b, c = self.coefficients
                square = s * s
                s = s * (a + square * (b + c * square))
        return s

    def scaled(self, values: Floats) -> Floats:
        """Return the singular values of the start from those of A, (…, k)."""
        start = values**2 if self.of_gram else values
        return start / (
            start.max(-1, keepdims=True)
            if self.norm == "spectral"
            else np.linalg.norm(start, axis=-1, keepdims=True)
        )

    def direction_errors(self, values: Floats, steps: int) -> Floats:
        """Return |1 - p_steps(s)| of each direction of a matrix with these singular values, (…, k)."""
        return np.abs(1.0 - self.polynomial(self.scaled(values), steps))

    def apply(self, matrix: Floats, steps: int) -> Floats:
        """Iterate the matrix (m, n), m ≤ n, itself: products alone, no singular values but for the spectral norm."""
        x = matrix @ matrix.T if self.of_gram else matrix
        x = x / np.linalg.norm(x, 2 if self.norm == "spectral" else "fro")
        for _ in range(steps):
            if self.coefficients is None:
                x = 2.0 * x - x @ x
            else:
                a, b, c = self.coefficients
                gram = x @ x.T
                x = a * x + (b * gram + c * gram @ gram) @ x
        return x


ITERATIONS = (
    Iteration("inverse", "X ← 2X − X² on AAᵀ/‖AAᵀ‖₂", None, True, "spectral", "the proof's recursion"),
    Iteration("cubic", "cubic on A/‖A‖₂", CUBIC, False, "spectral", ""),
    Iteration("cubic_gram", "cubic on AAᵀ/‖AAᵀ‖₂", CUBIC, True, "spectral", "the proof's start"),
    Iteration("cubic_frobenius", "cubic on A/‖A‖_F", CUBIC, False, "frobenius", "what code does"),
    Iteration("taylor", "quintic (15, −10, 3)/8 on A/‖A‖₂", TAYLOR, False, "spectral", ""),
    Iteration("muon", "Muon's quintic on A/‖A‖_F", JORDAN, False, "frobenius", "what SUMO-NS5 does"),
)
MUON = ITERATIONS[-1]


def bound(kappa: float | Floats, steps: int) -> Floats:
    """Return (1 - 1/κ²)^(2^steps), the lemma's bound on ‖E‖₂; κ is that of A."""
    return (1.0 - np.asarray(kappa, float) ** -2.0) ** (2.0**steps)


def geometric(kappa: float, side: int = SIDE) -> Floats:
    """Return singular values from 1 down to 1/κ at equal ratios, (side,)."""
    return np.geomspace(1.0, 1.0 / kappa, side)


def one_small(kappa: float, side: int = SIDE) -> Floats:
    """Return singular values of 1, and one of 1/κ."""
    return np.array([1.0] * (side - 1) + [1.0 / kappa])


def one_large(kappa: float, side: int = SIDE) -> Floats:
    """Return one singular value of 1, and all others of 1/κ."""
    return np.array([1.0] + [1.0 / kappa] * (side - 1))


SPECTRA: dict[str, Callable[..., Floats]] = {
    "geometric": geometric,
    "one small": one_small,
    "one large": one_large,
}


class BoundScan(NamedTuple):
    """Where an iteration obeys the bound on ‖E‖₂, over three kinds of spectra, condition numbers and steps.

    Attributes:
        tested: combinations.
        violated: of them.
        excess: largest ‖E‖₂ - bound.
        lowest, highest: condition numbers with a violation after 5 steps; NaN without one.
        settles: largest |1 - p(s)| after 60 steps for s in [0.1, 1]: 0 if the iteration converges to the polar factor.
    """

    tested: int
    violated: int
    excess: float
    lowest: float
    highest: float
    settles: float

    @property
    def holds(self) -> bool:
        """True if no combination violates the bound."""
        return self.violated == 0


def scan(iteration: Iteration, points: int = 161, most: int = 10) -> BoundScan:
    """Return where the bound holds on condition numbers of 1.001 to 1e8 and 0 to `most` steps."""
    kappas = np.geomspace(1.001, 1e8, points)
    violated, excess, at_five = 0, -math.inf, []
    for spectrum in SPECTRA.values():
        values = np.array([spectrum(float(kappa)) for kappa in kappas])
        for steps in range(most + 1):
            over = iteration.direction_errors(values, steps).max(-1) - bound(kappas, steps)
            violated += int((over > ROUNDING).sum())
            excess = max(excess, float(over.max()))
            if steps == STEPS:
                at_five += kappas[over > ROUNDING].tolist()
    low, high = (min(at_five), max(at_five)) if at_five else (math.nan, math.nan)
    settles = float(np.abs(1.0 - iteration.polynomial(np.linspace(0.1, 1.0, 1001), 60)).max())
    return BoundScan(len(SPECTRA) * points * (most + 1), violated, excess, low, high, settles)


class BoundRow(NamedTuple):
    """Errors at one condition number after 5 steps, geometric spectrum.

    Attributes:
        kappa: of A.
        bound: of the lemma on ‖E‖₂.
        largest: iteration → ‖E‖₂.
        mean: iteration → ‖E‖_F/√k.
        deviation: largest difference of the iterated matrices' ‖E‖_F/√k from that of their singular values.
    """

    kappa: float
    bound: float
    largest: dict[str, float]
    mean: dict[str, float]
    deviation: float


def matrix(values: Floats, columns: int, seed: int = 0) -> tuple[Floats, Floats]:
    """Return A (k, columns) with these singular values and random singular vectors, and its polar factor."""
    generator = np.random.default_rng(seed)
    left = np.linalg.qr(generator.normal(size=(len(values), len(values))))[0]
    right = np.linalg.qr(generator.normal(size=(columns, len(values))))[0]
    return (left * values) @ right.T, left @ right.T


def bound_rows(kappas: Sequence[float] = KAPPAS, columns: int = 48) -> list[BoundRow]:
    """Return the table of errors, by the singular values and by iterating matrices."""
    found = []
    for kappa in kappas:
        values = geometric(kappa)
        a, factor = matrix(values, columns)
        largest, mean, deviation = {}, {}, 0.0
        for iteration in ITERATIONS:
            errors = iteration.direction_errors(values, STEPS)
            largest[iteration.key] = float(errors.max())
            mean[iteration.key] = float(np.sqrt(np.mean(errors**2)))
            # X on AAᵀ tends to the identity, on A to the polar factor.
            target = np.eye(len(values)) if iteration.of_gram else factor
            measured = np.linalg.norm(iteration.apply(a, STEPS) - target) / math.sqrt(len(values))
            deviation = max(deviation, abs(float(measured) - mean[iteration.key]))
        found.append(BoundRow(kappa, float(bound(kappa, STEPS)), largest, mean, deviation))
    return found


class RankFactor(NamedTuple):
    """The counterexample to the factor √r: AAᵀ has eigenvalues 1 and, 63 times, 0.1.

    Attributes:
        r: index of the last eigenvalue above the smallest, as the lemma defines it.
        error: ‖E_0‖_F of AAᵀ/‖AAᵀ‖₂.
        claimed: √r times the bound.
        with_side: √k times the bound, k = 64.
    """

    r: int
    error: float
    claimed: float
    with_side: float


def rank_factor() -> RankFactor:
    """Return the Frobenius error of the proof's start on a spectrum with many equal small values."""
    values = np.sqrt(np.array([1.0] + [0.1] * 63))
    level = float(bound(math.sqrt(10.0), 0))
    error = float(np.linalg.norm(ITERATIONS[0].direction_errors(values, 0)))
    return RankFactor(1, error, level, math.sqrt(64) * level)


class Band(NamedTuple):
    """Where the five composed quintics of Muon are neither small nor one.

    Attributes:
        start: smallest s = σ/‖M‖_F from which p₅(s) is never below `floor` again.
        floor, top: least and largest p₅ on [start, 1].
    """

    start: float
    floor: float
    top: float

    def largest_kappa(self, side: int) -> float:
        """Return the κ up to which *every* matrix with this short side lies in the band, 1/(start·√side).

        The smallest s is σ_k/‖M‖_F ≥ 1/(κ√k). Up to there the error of a direction depends on where its s is in the
        band, and is at most max(1 - floor, top - 1), whatever κ is.
        """
        return 1.0 / (self.start * math.sqrt(side))

    @property
    def largest_error(self) -> float:
        """Largest |1 - p₅(s)| in the band."""
        return max(1.0 - self.floor, self.top - 1.0)


@lru_cache(1)
def band() -> Band:
    """Return the band of Muon's five steps, from p₅ on a grid of 200,001 points from 1e-5 to 1."""
    grid = np.geomspace(1e-5, 1.0, 200_001)
    values = MUON.polynomial(grid, STEPS)
    # p₅ rises with slope a⁵ = 485 to its first maximum, and then stays between its later extrema.
    first_maximum = int(np.argmax(np.diff(values) < 0))
    floor = float(values[first_maximum:].min())
    start = int(np.argmax(values >= floor))
    return Band(float(grid[start]), floor, float(values[start:].max()))
