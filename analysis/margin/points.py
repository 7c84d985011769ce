"""The labelled points of a toy problem, and the largest margin that any classifier has on them."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harness.errors import InputError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Points:
    """Labelled points.

    Attributes:
        x: (n, d) fp64.
        y: (n,) of -1.0 and 1.0.
        name: of the points in error messages.
    """

    x: Floats
    y: Floats
    name: str

    @property
    def augmented(self) -> Floats:
        """(n, d + 1): the points with a last coordinate of 1, which a bias multiplies."""
        return np.concatenate([self.x, np.ones((len(self.x), 1))], axis=1)

    @property
    def margin_optimum(self) -> float:
        """Half of the smallest distance between points of different labels."""
        rows, columns = self.x[self.y > 0], self.x[self.y < 0]
        return 0.5 * float(np.sqrt(((rows[:, None] - columns[None]) ** 2).sum(-1)).min())

    @property
    def geometry(self) -> tuple[float, float, Floats] | None:
        """(a, c, e) where the points are -a·e with label -1 and c·e with label 1, a, c > 0, ‖e‖ = 1; else None."""
        if len(self.y) != 2 or self.y.sum() != 0.0:
            return None
        negative, positive = self.x[int(np.argmin(self.y))], self.x[int(np.argmax(self.y))]
        c = float(np.linalg.norm(positive))
        if c == 0.0:
            return None
        axis = positive / c
        a = -float(negative @ axis)
        aligned = np.allclose(negative, -a * axis, rtol=0.0, atol=1e-14 * max(a, c))
        return (a, c, axis) if a > 0.0 and aligned else None


def pair(a: float, c: float, dim: int = 1) -> Points:
    """Return -a·e₁ with label -1 and c·e₁ with label 1, in R^dim."""
    x = np.zeros((2, dim))
    x[0, 0], x[1, 0] = -a, c
    return Points(x, np.array([-1.0, 1.0]), f"({-a:g}, {c:g})")


def parse_points(value: object, dim: int) -> Points:
    """Return the points of the key `data`: two numbers, or a CSV file with a row `x1, …, xd, y` per point.

    Two positive numbers a, c stand for the points -a and c. A negative and a positive one are the points
    themselves.

    Raises:
        InputError: not of these forms, no such file, identical or inseparable points.
    """
    if isinstance(value, str):
        return check_points(_from_file(Path(value)))
    numbers = value if isinstance(value, list | tuple) else []
    if len(numbers) != 2 or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        raise InputError(
            "data", value, allowed="two numbers a,c (points -a and c), or a CSV file", fix="data=1,1"
        )
    first, second = map(float, numbers)
    a = -first if first < 0.0 < second else first
    if not np.isfinite([first, second]).all():
        raise InputError("data", value, "is not finite", fix="data=1,1")
    if -a == second:
        raise InputError("data", value, "are identical points with different labels", fix="data=1,1")
    if a <= 0.0 or second <= 0.0:
        reason = "does not place the points on both sides of the origin"
        raise InputError("data", value, reason, allowed="a > 0 and c > 0", fix="data=1,1")
    return pair(a, second, dim)


def check_points(points: Points) -> Points:
    """Return the points if a net can tell them apart.

    Raises:
        InputError: one label only, or the same point with both labels.
    """
    if len(set(points.y.tolist())) < 2:
        raise InputError("data", points.name, "has points of one label only", allowed="labels -1 and 1")
    if points.margin_optimum == 0.0:
        reason = "has the same point with both labels: nothing separates them"
        raise InputError("data", points.name, reason, fix="remove one of the two")
    return points


def sign_changes(points: Points) -> int:
    """Return how often the label changes along the line (d = 1)."""
    labels = points.y[np.argsort(points.x[:, 0], kind="stable")]
    return int((labels[1:] != labels[:-1]).sum())


def _from_file(path: Path) -> Points:
    try:
        rows = [row for row in csv.reader(path.read_text(encoding="utf-8").splitlines()) if row]
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read ({type(error).__name__})"
        raise InputError("data", path, reason, allowed="two numbers a,c, or a CSV file") from None
    if rows and any(not _is_number(word) for word in rows[0]):
        rows = rows[1:]
    try:
        table = np.array([[float(word) for word in row] for row in rows])
    except ValueError:
        table = np.zeros((0, 0))
    if table.ndim != 2 or len(table) < 2 or table.shape[1] < 2 or not np.isfinite(table).all():
        reason = "is not a table of points"
        raise InputError("data", path, reason, allowed="a row x1, …, xd, y per point; two or more rows")
    x, y = table[:, :-1], table[:, -1]
    if not np.isin(y, (-1.0, 1.0)).all():
        raise InputError("data", path, "has other labels than -1 and 1 in its last column")
    return Points(x, y, path.name)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
