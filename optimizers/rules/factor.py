"""The orthogonal factor of a list of moments, by whatever method the options name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial as bound
from typing import Any

import torch
from torch import Tensor

from optimizers.layouts.rows import Rows, SplitMoment
from optimizers.linalg.gram_root import GramRoot
from optimizers.linalg.inverse_root import GRAM_RTOL
from optimizers.linalg.newton_schulz import cubic, newton_schulz, polar_express
from optimizers.linalg.polar import Polar, choose_method, default_rtol, polar
from optimizers.linalg.precision import multiplies
from optimizers.stacks import Stack

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def iteration_dtype(device: torch.device) -> str:
    """What orthogonalizer_dtype "auto" stands for: bf16 where the hardware multiplies it."""
    return "bfloat16" if multiplies(torch.bfloat16, device.type) else "float32"


_ITERATIONS = {"newton_schulz": newton_schulz, "cubic": cubic, "polar_express": polar_express}


def orthogonalize(moment: Tensor, options: Mapping[str, Any]) -> Polar:
    """Factor of whole matrices (b, m, n). A matrix that is not finite gets a zero factor and counts as a
    fallback."""
    method = options["orthogonalizer"]
    if method not in _ITERATIONS:
        return polar(moment, method)
    dtype = _DTYPES[options["orthogonalizer_dtype"]]
    if moment.dtype == torch.float64 and dtype == torch.float32:
        dtype = torch.float64
    factor = _ITERATIONS[method](moment, options["orthogonalizer_steps"], dtype=dtype)
    # The norm and the first product spread a NaN or Inf over every row of its own matrix: one row tells.
    broken = ~torch.isfinite(factor[:, 0]).all(-1)
    return Polar(factor.masked_fill_(broken[:, None, None], 0.0), None, None, broken.sum())


def subspace_factors(
    stacks: Sequence[Stack], moments: Sequence[Tensor], lefts: Sequence[bool], rows: Rows
) -> list[Polar]:
    """Factors of subspace moments, r×n (left) or m×r; where the method allows it through `rows.roots`.

    The r×r Gram is all that has to cross ranks, and for fp32 moments it loses nothing: the cut max(m,
    n)·eps32 lies above the 1e-6 below which an fp64 Gram cannot see. A moment of which this rank holds an
    interval takes the Gram whatever the method: the exact ones its fp64 root, the polynomial ones the same
    polynomial of the Gram, in fp64. Where that would send more, its rows go to an owner.
    """
    results: dict[int, Polar] = {}
    solvers: dict[int, GramRoot] = {}
    brought: dict[int, SplitMoment] = {}
    partial = [s.split is not None and s.split == (1 if left else 0) for s, left in zip(stacks, lefts)]
    for i, (stack, moment, left) in enumerate(zip(stacks, moments, lefts)):
        r = stack.state["basis"].shape[-1]
        shape = (r, stack.shape[1]) if left else (stack.shape[0], r)
        solver = _solver(moment, shape, stack.options, partial[i])
        if partial[i] and rows.brings(shape[1 if left else 0], r):
            solve = bound(orthogonalize, options=stack.options)
            brought[i] = SplitMoment(moment, shape, -1 if left else -2, stack.pattern, solve)
        elif solver is None:
            results[i] = orthogonalize(moment, stack.options)
        else:
            solvers[i] = solver
    grams = {i: _gram(moments[i], lefts[i]) for i in solvers}
    roots = rows.roots(list(grams.values()), list(solvers.values()), [partial[i] for i in solvers])
    for (i, gram), root in zip(grams.items(), roots):
        x = root.root.to(moments[i].dtype)
        factor = x @ moments[i] if lefts[i] else moments[i] @ x
        # 0·NaN is NaN: the zero root of a matrix that is not finite does not silence it.
        broken = ~torch.isfinite(gram.diagonal(dim1=-2, dim2=-1).sum(-1))[:, None, None]
        factor = factor.masked_fill_(broken, 0.0)
        results[i] = Polar(factor, root.singular_values, root.effective_rank, root.fallbacks)
    results.update(zip(brought, rows.factors(list(brought.values()))))
    return [results[i] for i in range(len(moments))]


def _solver(
    moment: Tensor, shape: tuple[int, int], options: Mapping[str, Any], partial: bool
) -> GramRoot | None:
    """How the Gram becomes its inverse root; None: the moment is taken as it is."""
    method = options["orthogonalizer"]
    if method in _ITERATIONS:
        if not partial:
            return None
        return GramRoot(method, steps=options["orthogonalizer_steps"], dtype=moment.dtype)
    if method == "auto":
        method = choose_method(shape, moment.dtype, moment.device)
    if partial and method not in ("gram", "dwh"):
        method = "gram"
    if method in ("gram", "dwh") and (partial or moment.dtype == torch.float32):
        rtol = max(GRAM_RTOL, default_rtol(shape, moment.dtype))
        return GramRoot(method, rtol, dtype=moment.dtype)
    return None


def _gram(moment: Tensor, left: bool) -> Tensor:
    wide = moment.double()
    return wide @ wide.mT if left else wide.mT @ wide


def scale(name: str, shape: tuple[int, int], fans: tuple[int, int], rank: int) -> float:
    """Factor on an orthogonal update of an m×n matrix.

    Args:
        name: "none"; "rms_max" 0.2·√max(m, n) (Moonlight); "rows_cols" √max(1, out/in) (Jordan); "rms_rank"
            0.2·√(mn/r), for which the update's RMS is 0.2 whatever the rank.
        fans: (out, in), which differ from (m, n) where the weight is stored transposed.
    """
    m, n = shape
    if name == "rms_max":
        return 0.2 * math.sqrt(max(m, n))
    if name == "rows_cols":
        return math.sqrt(max(1.0, fans[0] / fans[1]))
    if name == "rms_rank":
        return 0.2 * math.sqrt(m * n / rank)
    return 1.0
