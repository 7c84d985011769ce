"""Stage 4: time and error of the polar methods by size and batch, and the directions that they keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.record import StageContext
from benchmarks.gpu_check.runs import interleaved_ms
from benchmarks.polar import METHODS
from optimizers.linalg.polar import APPROXIMATE, polar
from optimizers.linalg.robust import default_rtol

_SIZES, _QUICK_SIZES = ((256, 512, 1024), (1, 8, 64)), ((16,), (1, 2))
_ASPECT = 4
"""Long over short side, as a moment of rank 1024 of a 7B model has it."""
_DROPPED = 0.25
"""Share of the directions that are below the cut, in a spectrum with a gap around it."""
_KAPPA = 1e2
"""Condition number of the directions above the cut."""
_TOLERANCE = 1e-3
"""Relative error of an exact factor: κ = 1e2 costs the fp32 SVD, the least accurate one, about 1e-5."""
_JUDGED = 2
"""Matrices of a batch that are compared with fp64: that SVD takes a second at 1024."""
_SLOW_MS = 150.0
"""A method that takes longer is not measured at the next larger batch or size, where it would take eight times that."""

ACCURATE = "Every exact method agrees with the fp64 SVD under the same cut to 1e-3."
CUT = "Every exact method keeps all directions above the cut and none below it, with condition numbers beyond 1/cut."


def run(context: StageContext) -> None:
    """Measure all methods at all sizes, then judge the exact ones."""
    sizes, batches = _QUICK_SIZES if context.quick else _SIZES
    rows: list[list[Any]] = []
    slow: set[str] = set()
    for short in sizes:
        for batch in batches:
            # A device with little memory loses the largest batch only.
            with context.attempt(f"r {short}, batch {batch}", ACCURATE):
                rows += _measured(context, short, batch, slow)
    columns = ["r", "batch", "method", "ms", "error against fp64", "‖O‖² over kept directions"]
    context.table(
        f"Matrices of r × {_ASPECT}r in fp32, {_DROPPED:.0%} of the directions below the cut", columns, rows
    )
    for name in METHODS:
        own = [row for row in rows if row[2] == name]
        if own and not name.startswith(APPROXIMATE):
            error = max(row[4] for row in own)
            kept = max(abs(row[5] - 1) for row in own)
            context.check(f"{name}: accuracy", ACCURATE, error <= _TOLERANCE, {"error": error})
            context.check(f"{name}: cut", CUT, kept <= _TOLERANCE, {"rank_off_by": kept})
    fastest = {short: _fastest(rows, short, batches[-1]) for short in sizes}
    context.table(f"Fastest exact method at batch {batches[-1]}", ["r", "method"], list(fastest.items()))


def _measured(context: StageContext, short: int, batch: int, slow: set[str]) -> list[list[Any]]:
    """Return the rows of one size, and add to `slow` what is too slow for larger ones."""
    cut = default_rtol((short, _ASPECT * short), torch.float32)
    matrices = stack(batch, short, cut, context.device)
    judged = matrices[:_JUDGED]
    reference = polar(judged.double(), "qr_svd", cut).factor
    calls = {name: _call(name, matrices, cut) for name in METHODS if name not in slow}
    times = interleaved_ms(calls, context.device, 1 if context.quick else 2)
    rows: list[list[Any]] = []
    for name, ms in times.items():
        factor = METHODS[name](judged, cut).double()
        error = float((factor - reference).norm() / reference.norm())
        rank = float(factor.square().sum() / (1 - _DROPPED) / short / len(judged))
        rows.append([short, batch, name, ms, error, rank])
        if ms > _SLOW_MS:
            slow.add(name)
    return rows


def stack(batch: int, short: int, cut: float, device: torch.device, seed: int = 0) -> Tensor:
    """Return fp32 matrices (batch, short, long) whose spectrum has a gap around `cut`.

    Three quarters of the singular values are log-uniform in [1/κ, 1] with κ = 1e2, the others in
    [cut/1000, cut/10], relative to the largest one.
    """
    generator = torch.Generator(device).manual_seed(seed)
    dropped = round(short * _DROPPED)
    top = torch.logspace(0, -torch.tensor(_KAPPA).log10(), short - dropped, dtype=torch.float64)
    low = cut * torch.logspace(-1, -3, dropped, dtype=torch.float64)
    sigma = torch.cat([top, low]).to(device)

    def orthonormal(rows: int) -> Tensor:
        drawn = torch.randn(rows, short, generator=generator, device=device, dtype=torch.float64)
        return torch.linalg.qr(drawn)[0]

    # One pair of bases for the batch, permuted: QR of 64 matrices in fp64 would take longer than what is measured.
    left, right = orthonormal(short), orthonormal(_ASPECT * short)
    orders = [torch.randperm(short, generator=generator, device=device) for _ in range(batch)]
    return torch.stack([((left * sigma) @ right[:, order].mT).float() for order in orders])


def _call(name: str, matrices: Tensor, cut: float) -> Callable[[], Tensor]:
    return lambda: METHODS[name](matrices, cut)


def _fastest(rows: list[list[Any]], short: int, batch: int) -> str:
    """Return the fastest exact method at a size."""
    exact = [
        (row[3], row[2]) for row in rows if row[:2] == [short, batch] and not row[2].startswith(APPROXIMATE)
    ]
    return min(exact)[1] if exact else ""
