"""The private training set, the public pool and labels. Torch-free: they are checked before torch loads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis.reconstruction.image_files import read
from harness.errors import InputError

if TYPE_CHECKING:
    from analysis.reconstruction.config import ReconstructionConfig

HELDOUT_PER_CLASS = 200


@dataclass(frozen=True)
class SampleSet:
    """Rows are images in the network's coordinates, with the training set's mean subtracted, except `public`.

    Attributes:
        images: (n, d) float64, class by class. labels: (n,): ±1, or class numbers, or ±1 as targets.
        heldout: (k, d): images of the same classes that were not trained on, for scores. heldout_labels: (k,).
        public: (k, d): the same images as an attacker has them, who knows neither `mean` nor `offset`: centred on
            their own mean.
        mean: (d,) that was subtracted; the attacker does not know it.
        offset: what was added on top of it.
        shape: of an image.
        names: label → name of its class.
    """

    images: np.ndarray
    labels: np.ndarray
    heldout: np.ndarray
    heldout_labels: np.ndarray
    public: np.ndarray
    mean: np.ndarray
    offset: float
    shape: tuple[int, ...]
    names: dict[float, str]

    @property
    def outputs(self) -> int:
        """k, the network's outputs: 1 for ±1 labels, else one per class."""
        return 1 if set(self.names) == {1.0, -1.0} else len(self.names)


def of_config(config: ReconstructionConfig, data_set: int = 0) -> SampleSet:
    """Return one training set of a configuration; the fixture's is the first rows of each class.

    Raises:
        InputError: see `load`.
    """
    seed = None if config.mode == "fixture" else config.data_seed
    return load(
        config.data,
        config.data_path,
        config.classes,
        config.per_class,
        seed,
        config.offset,
        config.dimension,
        data_set,
        config.data_sets,
    )


def load(
    data: str,
    path: str | None,
    classes: str | list[int],
    per_class: int,
    seed: int | None,
    offset: float = 0.0,
    dimension: int = 784,
    data_set: int = 0,
    data_sets: int = 1,
) -> SampleSet:
    """Choose a training set.

    Args:
        data: "digits" (scikit-learn's 8×8 digits, in its wheel), "mnist", "cifar10", "sphere" (see `_sphere`).
        path: of the file or folder; None for digits.
        classes: "odd_even", "vehicles_animals" (CIFAR-10), or class numbers: two of them are +1 and −1 in this
            order, more are a multiclass problem.
        per_class: images of each class.
        seed: of the permutation that decides which; None: the first ones, in the data's order.
        offset: added to every pixel of training and public images after the mean was subtracted.
        dimension: of the space of a sphere.
        data_set, data_sets: which of how many sets to cut from the permutation. Sets have no image in common, and
            share the public pool, which follows them.

    Raises:
        InputError: unknown class, or more images asked for than there are.
    """
    if data == "sphere":
        images, digits, shape = _sphere(
            dimension, 2 * (data_sets * per_class + HELDOUT_PER_CLASS) * 2, seed or 0
        )
    else:
        images, digits, shape = _raw(data, path)
    groups = _groups(data, classes, sorted({int(v) for v in digits}))
    order = np.arange(len(images)) if seed is None else np.random.default_rng(seed).permutation(len(images))
    train_rows, labels, spare, spare_labels = [], [], [], []
    for label, (name, members) in groups.items():
        rows = order[np.isin(digits[order], members)]
        used = data_sets * per_class
        if len(rows) <= used:
            most = min(int(np.isin(digits, m).sum()) for _, m in groups.values()) - 1
            times = f" for each of {data_sets} sets" if data_sets > 1 else ""
            reason = (
                f"images of class {name}{times} are not there with at least one held out "
                f"({len(rows)} in {data})"
            )
            if most < data_sets:
                raise InputError("data_sets", data_sets, reason, allowed=f"1 to {most}", fix="data_sets=1")
            most //= data_sets
            raise InputError("per_class", per_class, reason, allowed=f"1 to {most}", fix=f"per_class={most}")
        train_rows.append(rows[data_set * per_class : (data_set + 1) * per_class])
        labels.append(np.full(per_class, label))
        spare.append(rows[used : used + HELDOUT_PER_CLASS])
        spare_labels.append(np.full(len(spare[-1]), label))
    train = images[np.concatenate(train_rows)]
    # Points of a sphere stay on it.
    public = images[np.concatenate(spare)]
    mean, public_mean = (
        np.zeros(train.shape[1]) if data == "sphere" else pool.mean(0) for pool in (train, public)
    )
    return SampleSet(
        images=train - mean + offset,
        labels=np.concatenate(labels),
        heldout=public - mean + offset,
        heldout_labels=np.concatenate(spare_labels),
        public=public - public_mean,
        mean=mean,
        offset=offset,
        shape=shape,
        names={label: name for label, (name, _) in groups.items()},
    )


def _sphere(dimension: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Return uniform points of S^(d−1), classes 1 and 0 by the sign of the first coordinate, and a shape to draw."""
    points = np.random.default_rng([seed, dimension]).standard_normal((count, dimension))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    side = math.isqrt(dimension)
    shape = (side, side) if side**2 == dimension else (1, dimension)
    return points, (points[:, 0] > 0).astype(int), shape


def _raw(data: str, path: str | None) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    if data == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        return np.asarray(images) / 16.0, np.asarray(labels), (8, 8)
    if path is None:
        raise InputError("data_path", "null", f"names no file of {data}", fix=f"data={data} data_path=FILE")
    return read(data, Path(path))


def _groups(data: str, classes: str | list[int], known: list[int]) -> dict[float, tuple[str, list[int]]]:
    """Return label → (name, the data's class numbers)."""
    if classes == "hemispheres" and data == "sphere":
        return {1.0: ("first coordinate +", [1]), -1.0: ("first coordinate −", [0])}
    if classes == "odd_even" and data in ("digits", "mnist"):
        odd, even = [k for k in known if k % 2], [k for k in known if k % 2 == 0]
        return {1.0: ("odd", odd), -1.0: ("even", even)}
    if classes == "vehicles_animals" and data == "cifar10":
        vehicles = [0, 1, 8, 9]
        return {1.0: ("vehicles", vehicles), -1.0: ("animals", [k for k in known if k not in vehicles])}
    default = {"cifar10": "vehicles_animals", "sphere": "hemispheres"}.get(data, "odd_even")
    allowed = f"{default}, or two or more of {', '.join(map(str, known))}, as in classes=[0,4]"
    if isinstance(classes, str) or len(classes) < 2 or len(set(classes)) != len(classes):
        raise InputError("classes", classes, allowed=allowed, fix=f"classes={default}")
    if wrong := [c for c in classes if c not in known]:
        raise InputError(
            "classes", wrong[0], f"is not a class of {data}", allowed=allowed, fix=f"classes={default}"
        )
    labels = [1.0, -1.0] if len(classes) == 2 else [float(i) for i in range(len(classes))]
    return {label: (str(c), [c]) for label, c in zip(labels, classes)}
