"""Judge a cell: do the gradients arrive, and do the weights follow the reference as closely as rounding allows?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from harness.verify.audit.cells import MAX_NORM, EngineCell
from harness.verify.audit.classify import Class
from harness.verify.audit.document import CellReport, Verdict
from harness.verify.audit.given_model import Given
from harness.verify.audit.oracle import Reference, Whole, errors, reference
from harness.verify.audit.targets import Target
from harness.verify.replay import relative_error

SEES_NOTHING = 0.3
"""Bound from which a parameter cannot be judged: a wrong update is off by about 1."""
DELIVERY_BOUND = 1e-5
"""Of clipped gradients, whose norm and factor are rounded in another order; all others arrive to the last bit."""


@dataclass(frozen=True)
class Trajectory:
    """What a cell did.

    Attributes:
        received: of each step, name → whole gradient that the optimizer had.
        made: of each step, name → whole weight after it.
        replicas_equal: no rank holds other copies of the weights.
    """

    received: Sequence[Whole]
    made: Sequence[Whole]
    replicas_equal: bool = True


def judge(
    cell: EngineCell, target: Target, data: Given, trajectory: Trajectory, measured: Class
) -> CellReport:
    """Return the verdict on a cell that ran to its end.

    Args:
        cell: which.
        target: the optimizer.
        data: weights and gradients of the model.
        trajectory: what the cell did.
        measured: class of the optimizer, for the reason.
    """
    late = _undelivered(cell, data, trajectory)
    expected = _reference(cell, target, data, trajectory.received)
    error, parameter, floor = _worst(data.start, trajectory.made[-1], expected)
    leaving = _first_leaving(data.start, trajectory.made, expected)
    verdict: Verdict = "safe"
    reason = ""
    unjudged = _unjudged(trajectory.made, expected)
    if late:
        step, name, what = late
        leaving, reason = (step, name), what
    elif leaving:
        reason = explain(cell, measured)
    elif not trajectory.replicas_equal:
        leaving = len(trajectory.made), parameter
        reason = "the ranks' copies of the weights are not equal"
    elif len(unjudged) == len(expected.bounds[-1]):
        verdict, reason = "refused", f"not judged, because nothing is shown: {_why(unjudged)}"
    else:
        drawn = (
            "only with the same random seed on every rank" if measured.draws and cell.world_size > 1 else ""
        )
        blind = f"except what is not judged: {_why(unjudged)}" if unjudged else ""
        reason = "; ".join(filter(None, [drawn, blind]))
    return CellReport(
        cell.engine,
        cell.world_size,
        "wrong" if leaving else verdict,
        replay_error=error,
        first_step=leaving[0] if leaving else None,
        parameter=leaving[1] if leaving else None,
        reason=reason,
        variant=cell.variant,
        noise_floor=floor,
    )


def explain(cell: EngineCell, measured: Class) -> str:
    """Return why an engine changes what an optimizer of this class computes."""
    if measured.name == "nondeterministic" and not measured.draws:
        return "two equal runs in one process differ, too"
    if cell.is_flat:
        passes = "the optimizer gets 1-D slices that end inside of matrices"
        needs = {
            "rowwise": "whole rows",
            "matrix": "whole matrices",
            "global": "all parameters",
            "nondeterministic": "the same random numbers in the same shapes",
        }
    elif cell.is_sharded:
        passes = f"the optimizer gets {'columns' if cell.axis else 'rows'} of DTensors"
        needs = {
            "rowwise": "whole rows or columns",
            "matrix": "whole matrices",
            "global": "all parameters",
            "nondeterministic": "the same random numbers in the same shapes",
        }
    elif cell.splits_work:
        passes = "each rank steps a part of the parameters"
        needs = {"global": "all parameters", "nondeterministic": "the same random numbers in the same order"}
    else:
        return "whole parameters and the mean gradient are passed: the optimizer itself depends on the engine"
    if measured.name in needs:
        return f"{passes}; its update needs {needs[measured.name]}"
    return f"{passes}; its update is {measured.name}, which does not explain the difference"


def _undelivered(cell: EngineCell, data: Given, trajectory: Trajectory) -> tuple[int, str, str] | None:
    """Return step and parameter whose gradient is not the mean gradient of the batch, and what is wrong."""
    trained = list(trajectory.made[-1])
    for step, received in enumerate(trajectory.received):
        wanted = {name: data.gradients[step][name] for name in trained}
        factor = 1.0
        if cell.is_clipped:
            norm = float(torch.stack([g.double().norm() for g in wanted.values()]).norm())
            factor = min(1.0, MAX_NORM / norm)
        for name in trained:
            if name not in received:
                return step + 1, name, "the optimizer gets no gradient of it"
            error = relative_error(received[name].double(), wanted[name].double() * factor)
            if error > (DELIVERY_BOUND if cell.is_clipped else 0.0):
                kind = "clipped mean" if cell.is_clipped else "mean"
                return step + 1, name, f"the optimizer does not get the {kind} gradient (off by {error:.1e})"
    return None


def _reference(cell: EngineCell, target: Target, data: Given, received: Sequence[Whole]) -> Reference:
    """Return the reference for the gradients that arrived; it is kept, because most cells get the same ones."""
    dtype = torch.bfloat16 if cell.dtype == "bf16_pure" else torch.float32
    key = target, dtype, cell.sizes
    gradients = [{name: g for name, g in row.items() if name in data.start} for row in received]
    for known, kept in _REFERENCES.get(repr(key), []):
        if len(known) == len(gradients) and all(_same(a, b) for a, b in zip(known, gradients)):
            return kept
    made = reference(target, data.start, gradients, dtype)
    _REFERENCES.setdefault(repr(key), []).append((gradients, made))
    return made


_REFERENCES: dict[str, list[tuple[Sequence[Whole], Reference]]] = {}


def forget() -> None:
    """Drop the references of earlier targets."""
    _REFERENCES.clear()


def _same(first: Whole, second: Whole) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _worst(start: Whole, weights: Whole, expected: Reference) -> tuple[float, str, float]:
    """Return the largest error after the last step, its parameter, and the noise floor of that."""
    found = errors(start, weights, expected.steps[-1])
    error, name = max((error, name) for name, error in found.items())
    return error, name, expected.floors[-1][name]


def _first_leaving(start: Whole, made: Sequence[Whole], expected: Reference) -> tuple[int, str] | None:
    """Return the first step with a parameter above its bound, and the one that is above it most."""
    for step, weights in enumerate(made):
        found = errors(start, weights, expected.steps[step])
        bounds = expected.bounds[step]
        above = {name: _ratio(error, bounds[name]) for name, error in found.items() if error > bounds[name]}
        if above:
            return step + 1, max(above, key=lambda name: above[name])
    return None


def _ratio(error: float, bound: float) -> float:
    return error / bound if bound else math.inf


def _unjudged(made: Sequence[Whole], expected: Reference) -> dict[str, float]:
    """Return name → smallest bound, 0 for one that never moves, of each parameter whose error would not show."""
    smallest = {}
    for name in expected.bounds[-1]:
        if _is_reproduced(name, made, expected):
            continue
        moving = [bounds[name] for bounds in expected.bounds if bounds[name]]
        smallest[name] = min(moving, default=0.0)
    return {name: bound for name, bound in smallest.items() if not 0 < bound < SEES_NOTHING}


def _is_reproduced(name: str, made: Sequence[Whole], expected: Reference) -> bool:
    """Return True if a parameter moves to the bits of the reference in every step, and a twin has others.

    However wide the bound is (an update below half an ulp of bf16 weights moves few of them), a change as small as one
    ulp of the gradients would have shown.
    """
    moves = any(
        bool((steps[name].double() != expected.start[name].double()).any()) for steps in expected.steps
    )
    shows_an_ulp = any(floors[name] for floors in expected.floors)
    return (
        moves
        and shows_an_ulp
        and all(
            torch.equal(weights[name].double(), steps[name].double())
            for weights, steps in zip(made, expected.steps)
        )
    )


def _why(unjudged: Mapping[str, float]) -> str:
    """Return why parameters are not judged, with their names."""
    still = [name for name, bound in unjudged.items() if not bound]
    noisy = [name for name, bound in unjudged.items() if bound]
    least = min((unjudged[name] for name in noisy), default=0.0)
    return "; ".join(
        filter(
            None,
            [
                f"rounding alone may move {', '.join(noisy)} by {least:.1g} of an update or more"
                if noisy
                else "",
                f"the optimizer does not move {', '.join(still)}" if still else "",
            ],
        )
    )
