"""Replay a preset on a whole parameter in fp64, with recorded gradients and from the recorded weight of each update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import optimizers
from harness.verify.watch.claims import Claim
from harness.verify.watch.evidence import Evidence
from optimizers.routing import Route


def replayed(
    evidence: Evidence, claim: Claim, route: Route | None, dtype: str | None = None
) -> list[Tensor] | None:
    """Return the change of each update by the claimed preset.

    Args:
        evidence: recorded updates of the parameter.
        claim: names the preset and its options.
        route: says which matrices the parameter consists of.
        dtype: of the iteration that orthogonalizes; None: as claimed.

    Returns:
        ΔW of each update; None where the parameter cannot be replayed alone: a projection that only its module can take
        apart, state that came from elsewhere, or a `dtype` for a preset that does not iterate in another one.
    """
    if claim.preset is None or route is None or not route.blocks:
        return None
    pieces = _pieces(evidence.record.name, evidence.all_weights[0], route)
    options = {key: value for key, value in (claim.options or {}).items() if key != "lr"}
    if dtype is not None:
        if options.get("orthogonalizer_dtype", dtype) == dtype:
            return None
        options["orthogonalizer_dtype"] = dtype
    # With stagger, refreshes depend on all matrices of the model.
    options |= {key: False for key in ("refresh_stagger",) if key in options}
    built: Any = optimizers.build(claim.preset, list(pieces.items()), lr=1.0, **options)
    found = [(b.name, b.shape, b.transposed) for r in built.routes for b in r.blocks]
    if found != [(b.name, b.shape, b.transposed) for b in route.blocks]:
        return None
    if not _load(built, list(pieces.values()), evidence.state):
        return None
    changes = []
    for gradient, at, settings in zip(evidence.gradients, evidence.all_weights, evidence.record.settings):
        for group in built.param_groups:
            group["lr"] = settings.number("lr", default=0.0)
        change = torch.zeros_like(at, dtype=torch.float64)
        for weight, here, source, into in zip(
            pieces.values(),
            _parts(at, route, pieces),
            _parts(gradient, route, pieces),
            _parts(change, route, pieces),
        ):
            with torch.no_grad():
                weight.copy_(here)
            weight.grad = source.double().clone()
            into.copy_(-weight.detach())
        built.step()
        for weight, into in zip(pieces.values(), _parts(change, route, pieces)):
            into.add_(weight.detach())
        changes.append(change.to(at))
    return changes


def _pieces(name: str, weight: Tensor, route: Route) -> dict[str, nn.Parameter]:
    """Return the parameter, or its matrices where only a module knows how to cut it; their names seed bases."""
    from optimizers.fused_projections import split

    alone, _ = split(name, tuple(weight.shape))
    if [b.name for b in alone] == [b.name for b in route.blocks]:
        return {name: nn.Parameter(weight.double().clone())}
    return {b.name: nn.Parameter(b.matrix(weight).double().clone()) for b in route.blocks}


def _parts(tensor: Tensor, route: Route, pieces: Mapping[str, Any]) -> Sequence[Tensor]:
    """Return the pieces of a parameter-shaped tensor as views."""
    return [tensor] if route.name in pieces else [b.matrix(tensor) for b in route.blocks]


def _load(built: Any, weights: Sequence[nn.Parameter], state: Mapping[str, Tensor]) -> bool:
    """Continue from the optimizer's recorded state; return False if it has another form."""
    if not any(bool(value.any()) for value in state.values()):
        return True
    if len(weights) != 1:
        return False
    own = built.state[weights[0]]
    for key, value in own.items():
        if key not in state or (isinstance(value, Tensor) and value.shape != state[key].shape):
            return False
        own[key] = state[key].to(value) if isinstance(value, Tensor) else type(value)(state[key].item())
    return True
