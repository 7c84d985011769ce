"""Momentum in its three published forms."""

from __future__ import annotations

import torch
from torch import Tensor

from optimizers.stacks import Stack


def momentum(stack: Stack, gradient: Tensor, overwrites: bool = False) -> Tensor:
    """Advance the state "moment" by a (projected) gradient; returns what is to be orthogonalized.

    sum: M ← μM + G, look-ahead G + μM (Moonlight, SUMO). ema: M ← μM + (1 - μ)G, look-ahead (1 - μ)G + μM
    (Jordan). nesterov "stored": the look-ahead also replaces M in the state, so that M ← (1 + μ)G + μ²M (what
    the public SUMO code does).

    Args:
        stack: whose moments.
        gradient: (b, …), of the shape of the moment.
        overwrites: a look-ahead that is not stored may take the gradient's memory.
    """
    mu, nesterov = stack.options["momentum"], stack.options["nesterov"]
    weight = 1.0 if stack.options["momentum_form"] == "sum" else 1.0 - mu
    if nesterov == "stored":
        return stack.blend("moment", gradient, mu * mu, weight * (1.0 + mu))
    moment = stack.blend("moment", gradient, mu, weight)
    if not nesterov:
        return moment
    if weight == 1.0:
        return gradient.add_(moment, alpha=mu) if overwrites else torch.add(gradient, moment, alpha=mu)
    return gradient.lerp_(moment, mu) if overwrites else torch.lerp(gradient, moment, mu)
