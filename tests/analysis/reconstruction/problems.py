"""The two trained configurations that the tests measure, and the closed form, each built once per process."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from analysis.reconstruction import certificate, closed_form, samples, victim
from analysis.reconstruction.alternatives import KktPoint
from analysis.reconstruction.closed_form import ClosedForm
from analysis.reconstruction.geometry import Geometry
from analysis.reconstruction.network import Network
from analysis.reconstruction.samples import SampleSet
from analysis.reconstruction.victim import Architecture, VictimCheckpoint


class Data(NamedTuple):
    """Images as tensors: x (n, d), labels (n,), public pool (k, d) and its labels."""

    samples: SampleSet
    x: Tensor
    labels: Tensor
    heldout: Tensor
    heldout_labels: Tensor


@cache
def digits(per_class: int) -> Data:
    """Odd and even digits, centred, permutation 0."""
    return _data(samples.load("digits", None, "odd_even", per_class, 0))


@cache
def pair() -> Data:
    """Digits 0 (+) and 4 (−), the first 15 of each, centred."""
    return _data(samples.load("digits", None, [0, 4], 15, None))


@cache
def fixture() -> ClosedForm:
    """The closed-form KKT network of `pair`."""
    return closed_form.build(pair().samples.images, pair().samples.labels, 8)


def exact_problem() -> KktPoint:
    """The closed form with its images and multipliers."""
    data, found = pair(), fixture()
    return KktPoint(
        "binary", found.network, data.x, data.labels, found.lambdas, certificate.data_span(data.x)
    )


@cache
def start(width: int) -> Network:
    """Initial weights, seed 0."""
    return victim.initial(Architecture(64, (width,), 1, False, 1e-3), 0)


@cache
def trained(optimizer: str, per_class: int, width: int, steps: tuple[int, ...]) -> list[VictimCheckpoint]:
    """Checkpoints of a victim; `per_class` 20 and width 100 is T, 5 and 400 is S."""
    data = digits(per_class)
    settings = victim.resolve_options(optimizer, {})
    return list(victim.train(optimizer, settings, start(width), data.x, data.labels, "binary", steps))


def norm_of(optimizer: str, width: int) -> Geometry:
    """The norm of an optimizer on these victims."""
    return victim.step_geometry(optimizer, victim.resolve_options(optimizer, {}), start(width))


def _data(found: SampleSet) -> Data:
    arrays = (found.images, found.labels, found.heldout, found.heldout_labels)
    x, labels, heldout, heldout_labels = (torch.from_numpy(a) for a in arrays)
    return Data(found, x, labels, heldout, heldout_labels)
