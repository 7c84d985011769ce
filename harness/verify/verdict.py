"""Judge a cell: the bounds of its errors, each with its reason. Torch-free."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.record.certificates import Cell
from harness.verify.cells import MAX_NORM, orthogonalizes

REPLAY_BOUND = 5e-6
"""Of the replay error, in any dtype: what the optimizer receives is the same to the last bit on both sides, and
its weights and state are fp32 everywhere. Rounding to fp32 is off by 2.5e-8 (root mean square, relative). Weights:
that times ‖W‖/‖ΔW‖, for norms (which start at 1 and move by 0.2) 1e-6 over six steps. Moments: that times what a polar
factor makes of it, 1.5 to 25 on the moments of these runs (κ from 14 to 920): up to 6e-7 a rounding. Newton–Schulz in
fp32: 15 products, 2e-6. Measured: 187 of 188 cells below 1.8e-6, one at 3.2e-6. Wrong algebra shows at 1e-2 and more
(the controls)."""

ROUNDING_MULTIPLE, REPLAY_CEILING, MOST_REPLAYS = 3.0, 5e-3, 8
"""A replay error above `REPLAY_BOUND` is rounding, too, up to this multiple of what fp32 makes of the same gradients on
whole matrices in one process, and up to this ceiling: wrong algebra shows at 1e-2 and more. That floor is the largest
error of up to so many replays in fp32, of the gradients as they are and moved by one ulp (`replay.rounding_error`).
Rules that need it: AdaMuon divides each element of its factor by the root of that element's own second moment, so that
one element that has been small in all of its few steps is off by 1e-5 to 1e-3 of the matrix' change; SOAP does so in
the eigenbasis of the gradient (1e-5 to 2e-3); DCT-AdamW in columns whose moments start at 0 (2e-5 to 2e-4). With
``state_dtype=bfloat16``, both sides round with the same random bits, but fp32 and fp64 round elements near a boundary
to different sides, 2⁻⁸ apart (1e-4)."""

CAUTIOUS_BOUND = 3e-3
"""Of the replay error with ``weight_decay_form=cautious``. An element whose update is within rounding of zero (ε = 1e-7
to 2e-6 of the elements and steps: none to three of a run's million) decays on one side and not on the other, by
lr·weight_decay·w: 3e-4 of its matrix' change each. Measured: 1e-6, and 2.9e-4 in one cell of four. Ordinary decay, on
half of the elements too many, shows at 1e-2 and more (tests/optimizers/test_hooks.py)."""

END_TO_END_BOUND = 1e-2
"""Of the end-to-end error in fp32 cells. Gradients that are summed in another order differ by 1e-7 to 1e-6; four steps
feed that back through the model, through polar factors, and through Adam, which gives an element a full step of
whatever sign rounding gave it. Measured: 2e-6 to 1.3e-3; training something else shows at 4e-2 and more. The gradients
of bf16 cells are rounded to eight bits, so that they end percents away: shown, not judged."""

END_TO_END_CEILING, MOST_TWINS = 0.2, 4
"""An end-to-end error above `END_TO_END_BOUND` is rounding, too, up to `ROUNDING_MULTIPLE` of the noise floor and up to
this ceiling. The floor is the largest difference that up to so many twins make whose weights start one ulp apart: signs
(Lion, 2.5e-2) and choices of columns (DCT-AdamW, 5.2e-2) turn rounding into whole steps. Wrong gradients still show in
the first step of such a rule, by `DELIVERY_BOUNDS`."""

DELIVERY_BOUNDS = {"fp32": 1e-4, "bf16": 0.1}
"""Of the first step's gradients as the optimizer receives them against those of one fp32 process, in dtype: a missing
clip, a wrong mean or a micro-batch that is left out is off by a factor, 0.3 and more. fp32 sums in another order:
2e-6 at most; a forward and backward pass in bf16: 1.5e-2."""

PEER_BOUND = 0.1
"""Of a peer's errors: its Newton–Schulz in half precision is off by 3 % in one step. Training something else shows at
0.5 and more."""

NORM_BOUND = 1e-4
"""Of the received gradients' norm over the clipping bound, minus 1, in fp32."""


@dataclass(frozen=True)
class Result:
    """A cell with its measured figures and its verdict.

    Attributes:
        passed: every criterion held.
        reasons: those that did not, one sentence each.
        figures: of the JSON document; None where a figure means nothing.
        seconds: that it took.
    """

    cell: Cell
    passed: bool
    reasons: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the cell's entry in the JSON document."""
        return {
            **self.cell.as_dict(),
            "passed": self.passed,
            "reasons": list(self.reasons),
            **{key: self.figures.get(key) for key in FIGURES},
        }


FIGURES = (
    "replay_error",
    "replay_floor",
    "replay_worst",
    "replay_error_bf16_orthogonalizer",
    "replay_error_own_code",
    "end_to_end_error",
    "noise_floor",
    "delivery_error",
    "matrices",
    "orthogonalizations_per_step",
    "replicas_equal",
    "bytes_per_step",
    "collectives_per_step",
)


def judge(
    cell: Cell,
    ranks: Sequence[Mapping[str, Any]],
    seconds: float = 0.0,
    noise_floor: float | None = None,
) -> Result:
    """Judge a cell by the reports of all ranks.

    Args:
        cell: which.
        ranks: what `harness.verify.certify_rank.certify` returned on each.
        seconds: that it took.
        noise_floor: end-to-end error between twins of one process; None: not measured.
    """
    first = ranks[0]
    replicas_equal = _replicas_equal([rank["digests"] for rank in ranks])
    counts = [
        _counts([rank["orthogonalized"][step] for rank in ranks]) for step in range(len(first["grad_norms"]))
    ]
    figures = {
        **{key: finite(first.get(key)) for key in FIGURES},
        "orthogonalizations_per_step": max((sum(count.values()) for count in counts), default=0),
        "replicas_equal": replicas_equal,
        "noise_floor": noise_floor,
        "bytes_per_step": max(
            (b for rank in ranks if (b := rank["bytes_per_step"]) is not None), default=None
        ),
    }
    if cell.is_peer:
        reasons = _peer(first)
    else:
        reasons = [
            *_training(cell, first),
            *_arithmetic(cell, first, noise_floor),
            *_matrices(cell, first, counts),
        ]
    if replicas_equal is False:
        reasons.append("replicas of the weights are not equal")
    return Result(cell, not reasons, tuple(reasons), figures, seconds)


def crashed(cell: Cell, trace: str, seconds: float = 0.0) -> Result:
    """Return the red result of a cell that raised an exception, with the last line of the traceback."""
    return Result(cell, False, (trace.strip().splitlines()[-1],), {}, seconds)


def _peer(first: Mapping[str, Any]) -> list[str]:
    reasons = [] if first["state"] == "finished" else [f"the run ended as {first['state']}"]
    for key, word in (("replay_error", "replay"), ("end_to_end_error", "end-to-end")):
        error = first.get(key)
        if error is not None and not error <= PEER_BOUND:
            reasons.append(f"{word} error {error:.1e} is above {PEER_BOUND:g}")
    return reasons


def _training(cell: Cell, first: Mapping[str, Any]) -> list[str]:
    reasons = []
    if first["state"] != "finished":
        reasons.append(f"the run ended as {first['state']}")
    if cell.clipping == "on":
        raw, received = first["grad_norms"], first["received_norms"]
        if min(raw, default=0.0) <= MAX_NORM:
            reasons.append(
                f"a gradient norm of {min(raw, default=0.0):.2g} is not clipped at {MAX_NORM}: nothing is shown"
            )
        if any(not abs(norm / MAX_NORM - 1) <= NORM_BOUND for norm in received):
            reasons.append(f"the optimizer received gradients of norm {max(received):.3g}, not {MAX_NORM}")
    return reasons


def _arithmetic(cell: Cell, first: Mapping[str, Any], noise_floor: float | None) -> list[str]:
    reasons = []
    error, bound = first["replay_error"], replay_bound(cell, first.get("replay_floor"))
    if not error <= bound:
        reasons.append(f"replay error {error:.1e} of {first['replay_worst']} is above {bound:.1g}")
    error, bound = first["end_to_end_error"], end_to_end_bound(noise_floor)
    if cell.dtype == "fp32" and error is not None and not error <= bound:
        reasons.append(f"end-to-end error {error:.1e} is above {bound:.1g}")
    error, bound = first["delivery_error"], DELIVERY_BOUNDS[cell.dtype]
    if error is not None and not error <= bound:
        reasons.append(f"the first step's gradients are off by {error:.1e}, more than {bound:.0e}")
    return reasons


def replay_bound(cell: Cell, floor: float | None = None) -> float:
    """Return the bound of a cell's replay error.

    Args:
        cell: which.
        floor: what fp32 makes of its gradients on whole matrices; None: not measured.
    """
    least = CAUTIOUS_BOUND if "weight_decay_form=cautious" in cell.options.split() else REPLAY_BOUND
    return max(least, min(ROUNDING_MULTIPLE * (floor or 0.0), REPLAY_CEILING))


def end_to_end_bound(noise_floor: float | None = None) -> float:
    """Return the bound of an end-to-end error in fp32, given what one ulp does; None: not measured."""
    return max(END_TO_END_BOUND, min(ROUNDING_MULTIPLE * (noise_floor or 0.0), END_TO_END_CEILING))


def needs_twins(result: Result) -> bool:
    """Return True if more twins could show that an end-to-end error above its bound is rounding."""
    error = result.figures.get("end_to_end_error")
    if result.cell.is_peer or result.cell.dtype != "fp32" or error is None:
        return False
    return end_to_end_bound(result.figures["noise_floor"]) < error <= END_TO_END_CEILING


def _matrices(cell: Cell, first: Mapping[str, Any], counts: Sequence[Mapping[str, int]]) -> list[str]:
    """Return reasons against: a matrix that is not on the rule, or is not orthogonalized once per step."""
    expected = first["matrix_names"]
    reasons = []
    if first["matrices"] != len(expected):
        reasons.append(f"{first['matrices']} matrices take the rule, {len(expected)} should")
    if not orthogonalizes(cell):
        return reasons
    for count in counts:
        wrong = sorted(name for name in expected if count.get(name, 0) != 1)
        if wrong:
            times = count.get(wrong[0], 0)
            reasons.append(
                f"{len(wrong)} matrices are not orthogonalized once a step ({wrong[0]}: {times} times)"
            )
            break
    return reasons


def _counts(ranks: Sequence[Mapping[str, int]]) -> Counter[str]:
    """Return matrix → largest number of times that a rank orthogonalized it.

    Replicas, and ranks that hold rows of one matrix, each count it once.
    """
    total: Counter[str] = Counter()
    for counts in ranks:
        total |= Counter(counts)
    return total


def _replicas_equal(ranks: Sequence[Mapping[str, str]]) -> bool | None:
    digests: defaultdict[str, set[str]] = defaultdict(set)
    for found in ranks:
        for key, digest in found.items():
            digests[key.partition(":")[0]].add(digest)
    return all(len(same) == 1 for same in digests.values()) if digests else None


def finite(value: Any) -> Any:
    """Return None instead of an infinite or NaN value, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
