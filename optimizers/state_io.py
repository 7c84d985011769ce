"""State dicts: refused where they are foreign, restored bit by bit where they are ours."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

# Options that shape the state or what it means; others may differ and are taken from the state dict, as torch
# does.
_STRUCTURAL = ("rule", "rank", "side")


def validate(
    optimizer: torch.optim.Optimizer,
    state_dict: Mapping[str, Any],
    start: Callable[[Iterable[Tensor]], None],
) -> None:
    """Refuse a state dict that this optimizer could not go on from, and say why.

    Args:
        optimizer: that is to take it.
        state_dict: of an optimizer like it.
        start: gives state to parameters that are frozen here and had been trained there.

    Raises:
        ValueError: naming the group or parameter that does not fit.
    """
    saved, state = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(saved, list) or not isinstance(state, Mapping):
        raise ValueError("not an optimizer's state dict: it lacks 'param_groups' or 'state'")
    own = optimizer.param_groups
    for i, group in enumerate(saved):
        if "rule" not in group:
            keys = ", ".join(sorted(group))
            raise ValueError(f"written by another optimizer: its group {i} names no rule (it has {keys})")
    if len(saved) != len(own):
        raise ValueError(f"has {len(saved)} parameter groups, this optimizer has {len(own)}")
    for i, (theirs, ours) in enumerate(zip(saved, own)):
        _check_group(i, theirs, ours)
    pairs = _pairs(state_dict, optimizer)
    start([parameter for identifier, parameter in pairs if state.get(identifier)])
    for identifier, parameter in pairs:
        own = optimizer.state.get(parameter)
        # A parameter that is frozen here and was frozen there.
        if own or state.get(identifier):
            _check_parameter(identifier, state.get(identifier), own or {})


def _check_group(i: int, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    counts = len(theirs["params"]), len(ours["params"])
    if counts[0] != counts[1]:
        raise ValueError(f"group {i} has {counts[0]} parameters, this optimizer's has {counts[1]}")
    for key in _STRUCTURAL:
        if theirs.get(key) != ours.get(key):
            raise ValueError(
                f"group {i} was written with {key}={theirs.get(key)}, this optimizer has {ours.get(key)}"
            )
    for saved, own in zip(theirs.get("param_names", ()), ours.get("param_names", ())):
        if saved != own:
            raise ValueError(f"group {i} holds {saved} where this optimizer has {own}")


def _check_parameter(identifier: int, saved: Mapping[str, Any] | None, own: Mapping[str, Any]) -> None:
    if saved is None:
        raise ValueError(f"has no state for parameter {identifier}")
    if set(saved) != set(own):
        raise ValueError(f"state of parameter {identifier} has {sorted(saved)}, expected {sorted(own)}")
    for key, value in saved.items():
        theirs = tuple(value.shape) if isinstance(value, Tensor) else ()
        ours = tuple(own[key].shape) if isinstance(own[key], Tensor) else ()
        if theirs != ours:
            raise ValueError(f"state {key} of parameter {identifier} has shape {theirs}, expected {ours}")


def restore_exactly(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Undo torch's cast of floating state to the weight's dtype: moments of bf16 weights are fp32."""
    for identifier, parameter in _pairs(state_dict, optimizer):
        for key, value in state_dict["state"].get(identifier, {}).items():
            if key == "step":
                optimizer.state[parameter][key] = int(value)
            elif isinstance(value, Tensor):
                optimizer.state[parameter][key] = value.detach().to(parameter.device, copy=True)


def compact(state: Mapping[Tensor, Mapping[str, Any]]) -> defaultdict[Tensor, dict[str, Any]]:
    """The state with each tensor in memory of its own: pickle would store a shared block once per view."""
    copy: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    for parameter, entries in state.items():
        copy[parameter] = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in entries.items()}
    return copy


def _pairs(state_dict: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> list[tuple[Any, Tensor]]:
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    own = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return list(zip(saved, own))
