"""The building blocks of rules that orthogonalize: momentum, the factor and its scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Rules take them from here, so that their own modules import no torch.
from optimizers.interfaces import InTurn as InTurn
from optimizers.interfaces import MatrixBatch
from optimizers.interfaces import Update as Update
from optimizers.linalg.inverse_root import RootSolver
from optimizers.linalg.newton_schulz import cubic, newton_schulz, polar_express
from optimizers.linalg.polar import Polar, polar
from optimizers.linalg.robust import GRAM_RTOL, choose_method, default_rtol

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ITERATIONS = {"newton_schulz": newton_schulz, "cubic": cubic, "polar_express": polar_express}


def momentum(b: MatrixBatch, gradient: Tensor, overwrites: bool = False) -> Tensor:
    """Advance the state "moment" by a (projected) gradient; return what is to be orthogonalized.

    sum: M ← μM + G, look-ahead G + μM (Moonlight, SUMO). ema: M ← μM + (1 - μ)G, look-ahead (1 - μ)G + μM
    (Jordan). nesterov "stored": the look-ahead also replaces M in the state, so that M ← (1 + μ)G + μ²M (what
    the public SUMO code does).

    Args:
        b: batch whose moments are advanced.
        gradient: (b, …), of the shape of the moment.
        overwrites: a look-ahead that is not stored may take the gradient's memory.
    """
    mu, nesterov = b.options["momentum"], b.options["nesterov"]
    weight = 1.0 if b.options["momentum_form"] == "sum" else 1.0 - mu
    if nesterov == "stored":
        return b.blend("moment", gradient, mu * mu, weight * (1.0 + mu))
    moment = b.blend("moment", gradient, mu, weight)
    if not nesterov:
        return moment
    if weight == 1.0:
        return gradient.add_(moment, alpha=mu) if overwrites else torch.add(gradient, moment, alpha=mu)
    return gradient.lerp_(moment, mu) if overwrites else torch.lerp(gradient, moment, mu)


def orthogonalize(moment: Tensor, options: Mapping[str, Any]) -> Polar:
    """Return the factor of whole matrices (b, m, n).

    A matrix that is not finite gets a zero factor and counts as a fallback.
    """
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


def root_solver(
    moment: Tensor, shape: tuple[int, int], options: Mapping[str, Any], is_split: bool
) -> RootSolver | None:
    """Return how the Gram becomes its inverse root; None: the moment is orthogonalized as it is."""
    method = options["orthogonalizer"]
    if method in _ITERATIONS:
        if not is_split:
            return None
        return RootSolver(method, steps=options["orthogonalizer_steps"], dtype=moment.dtype)
    if method == "auto":
        method = choose_method(shape, moment.dtype, moment.device)
    if is_split and method not in ("gram", "dwh"):
        method = "gram"
    if method in ("gram", "dwh") and (is_split or moment.dtype == torch.float32):
        return RootSolver(method, max(GRAM_RTOL, default_rtol(shape, moment.dtype)), dtype=moment.dtype)
    return None


def scale(name: str, shape: tuple[int, int], fans: tuple[int, int], rank: int) -> float:
    """Return the factor on an orthogonal update of an m×n matrix.

    Args:
        name: "none"; "rms_max" 0.2·√max(m, n) (Moonlight); "rows_cols" √max(1, out/in) (Jordan); "rms_rank"
            0.2·√(mn/r), for which the update's RMS is 0.2 whatever the rank; "fan_ratio" √(out/in) (Dion).
        fans: (out, in), which differ from (m, n) where the weight is stored transposed.
    """
    m, n = shape
    if name == "rms_max":
        return 0.2 * math.sqrt(max(m, n))
    if name == "rows_cols":
        return math.sqrt(max(1.0, fans[0] / fans[1]))
    if name == "rms_rank":
        return 0.2 * math.sqrt(m * n / rank)
    if name == "fan_ratio":
        return math.sqrt(fans[0] / fans[1])
    return 1.0
