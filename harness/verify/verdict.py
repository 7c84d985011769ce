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

REPLAY_BOUNDS = {"adamuon": 5e-5, "soap": 5e-4, "dct_subspace": 2e-4}
"""Of rules that amplify rounding. AdaMuon divides each element of its factor by the root of that element's own second
moment: Newton–Schulz in fp32 is off by 2e-6 of the elements' size, and an element that has been small in all of its few
steps by ten times more of its own. Measured: 6.6e-6 on every engine. SOAP does so in the eigenbasis of the gradient,
where elements are smaller by its condition number, 10 to 900: 1.0e-5 to 2.7e-5, and up to 1.8e-4 without clipping, in
one process as in many. DCT-AdamW chooses columns anew in every step, whose moments start at 0: where they are as small
as ε, M/√V shows the rounding of the projection: 1.5e-5 to 6.0e-5."""

STATE_BOUND = 1e-3
"""Of the replay error with ``state_dtype=bfloat16``. Both sides round with the same random bits, but a share ε/2⁻⁸ of
the elements is so near to a boundary that fp32 (ε = 1e-7 to 1e-6) and fp64 round it to different sides, 2⁻⁸ apart: 6e-5
a step, times what a polar factor makes of it, 1.5 to 25. Measured: 4e-6 to 1.8e-4. Other bits, or a moment that is kept
in fp32, show at 2e-3 and more."""

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


def judge(cell: Cell, ranks: Sequence[Mapping[str, Any]], seconds: float = 0.0) -> Result:
    """Judge a cell by the reports of all ranks.

    Args:
        cell: which.
        ranks: what `harness.verify.certify_rank.certify` returned on each.
        seconds: that it took.
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
        "bytes_per_step": max(
            (b for rank in ranks if (b := rank["bytes_per_step"]) is not None), default=None
        ),
    }
    if cell.is_peer:
        reasons = _peer(first)
    else:
        reasons = [*_training(cell, first), *_arithmetic(cell, first), *_matrices(cell, first, counts)]
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


def _arithmetic(cell: Cell, first: Mapping[str, Any]) -> list[str]:
    reasons = []
    replay_bound = replay_bound_of(cell)
    if not first["replay_error"] <= replay_bound:
        where = first["replay_worst"]
        reasons.append(f"replay error {first['replay_error']:.1e} of {where} is above {replay_bound:.0e}")
    end_to_end, delivery = first["end_to_end_error"], first["delivery_error"]
    if cell.dtype == "fp32" and end_to_end is not None and not end_to_end <= END_TO_END_BOUND:
        reasons.append(f"end-to-end error {end_to_end:.1e} is above {END_TO_END_BOUND:.0e}")
    bound = DELIVERY_BOUNDS[cell.dtype]
    if delivery is not None and not delivery <= bound:
        reasons.append(f"the first step's gradients are off by {delivery:.1e}, more than {bound:.0e}")
    return reasons


def replay_bound_of(cell: Cell) -> float:
    """Return the bound of a cell's replay error."""
    if "state_dtype=bfloat16" in cell.options.split():
        return STATE_BOUND
    bound = REPLAY_BOUNDS.get(cell.rule, REPLAY_BOUND)
    return max(bound, CAUTIOUS_BOUND) if "weight_decay_form=cautious" in cell.options.split() else bound


def _matrices(cell: Cell, first: Mapping[str, Any], counts: Sequence[Mapping[str, int]]) -> list[str]:
    """Return reasons against: a matrix that is not on the rule, or is not orthogonalized once per step."""
    expected = first["matrix_names"]
    reasons = []
    if first["matrices"] != len(expected):
        reasons.append(f"{first['matrices']} matrices take the rule, {len(expected)} should")
    if not orthogonalizes(cell.rule):
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
