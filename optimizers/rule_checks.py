"""A rule of another package is checked completely before it is used: its options, its state, one step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.fused_projections import Block
from optimizers.interfaces import LowRank, MatrixRef, Update
from optimizers.layouts.batches import BatchState
from optimizers.layouts.layout import Unsharded, run_updates
from optimizers.layouts.replicated import FullView
from optimizers.options import Option, OptionError, closest
from optimizers.rule import Rule
from optimizers.skipping import StepMask

# A wide and a tall matrix, no side equal to the number of matrices, so that a mixed-up dimension shows.
_SHAPES = ((4, 6), (6, 4))
_COUNT = 2

_RENAMED = {
    "factors": "low_rank_form",
    "row_traffic": "sharded_step_bytes",
    "spectrum_of_state": "state_holds_spectrum",
}
"""Optional methods of `Rule` by their former names. A rule that still has one would be run without it."""


def checked(name: str, point: Any, known: Mapping[str, Option], common: Mapping[str, Any]) -> Rule:
    """Load and check the rule of an entry point.

    Args:
        name: of the rule.
        point: the entry point; its `value` says what it loads.
        known: options that have one meaning in all rules.
        common: values of the options that every rule takes.

    Raises:
        OptionError: it cannot be loaded, or is not what a rule has to be; one sentence says what.
    """
    try:
        target = point.load()
        _refuse_old_contract(name, target)
        rule = target() if isinstance(target, type) and issubclass(target, Rule) else target
    except OptionError:
        raise
    except Exception as error:
        raise _refused(name, f"cannot be loaded from {point.value} ({_text(error)})") from error
    if not isinstance(rule, Rule):
        raise _refused(name, f"is not an optimizers.Rule, but {target!r}")
    _check_options(name, rule, known)
    options = {**common, **rule.defaults}
    if "rank" in options:
        options["rank"] = 2
    for shape in _SHAPES:
        _check_state(name, rule, shape, options)
        try:
            _check_step(name, rule, shape, options)
        except OptionError:
            raise
        except Exception as error:
            m, n = shape
            raise _refused(name, f"fails on {m}×{n} matrices ({_text(error)})") from error
    return rule


def _refuse_old_contract(name: str, target: Any) -> None:
    kind = target if isinstance(target, type) else type(target)
    if not issubclass(kind, Rule):
        return
    if hasattr(kind, "step") and kind.update is Rule.update:
        raise _refused(
            name,
            "defines step(stacks, rows), which rules no longer have: write update(self, b) for one batch b of "
            "same-shape matrices that returns optimizers.Update(…) (docs/optimizers.md, A rule of your own)",
        )
    for old, new in _RENAMED.items():
        # A helper of that name in a rule that has the new method, too, is the rule's own affair.
        if hasattr(kind, old) and getattr(kind, new) is getattr(Rule, new):
            raise _refused(name, f"defines {old}, which is now called {new}: rename it")


def own_options(name: str, rule: Rule, known: Mapping[str, Option]) -> dict[str, Option]:
    """Return the options of a rule that are not among the `known` ones: as declared, else by their defaults.

    Raises:
        OptionError: an option whose default does not determine its type.
    """
    declared = {option.name: option for option in rule.own_options}
    options: dict[str, Option] = {}
    for key, default in rule.defaults.items():
        if key in known:
            continue
        option = declared.get(key)
        if option is None:
            kinds = {bool: "bool", int: "int", float: "float"}
            if type(default) not in kinds:
                raise _refused(
                    name,
                    f"has the option {key}, whose default {default!r} does not determine its type: declare it in "
                    "own_options",
                )
            option = Option(key, kinds[type(default)], f"option of {name}")
        options[key] = option
    return options


def _check_options(name: str, rule: Rule, known: Mapping[str, Option]) -> None:
    if not isinstance(rule.defaults, Mapping) or not all(isinstance(key, str) for key in rule.defaults):
        raise _refused(name, "has defaults that are no mapping from option names to values")
    for option in rule.own_options:
        if not isinstance(option, Option):
            raise _refused(name, f"declares {option!r} in own_options, which is not an optimizers.Option")
        if option.name in known:
            raise _refused(name, f"declares {option.name}, which has one meaning in all rules")
        if option.name not in rule.defaults:
            guess = closest(option.name, list(rule.defaults))
            more = f"; did you mean {guess}?" if guess else ""
            raise _refused(name, f"declares the option {option.name}, which has no value in defaults{more}")
    meanings = {**known, **own_options(name, rule, known)}
    for key, default in rule.defaults.items():
        try:
            meanings[key].check(default)
        except OptionError as error:
            raise _refused(name, f"has a default that is not allowed: {error}") from error
        except KeyError as error:
            raise _refused(
                name, f"declares {key} with the type {meanings[key].type}, which is unknown"
            ) from error


def _check_state(name: str, rule: Rule, shape: tuple[int, int], options: Mapping[str, Any]) -> None:
    m, n = shape
    try:
        state = rule.state(shape, options)
        axes = {} if rule.needs_whole else rule.axes(shape, options)
    except Exception as error:
        raise _refused(name, f"gives no state for {m}×{n} matrices ({_text(error)})") from error
    if not isinstance(state, Mapping):
        raise _refused(name, f"gives a state that is not a mapping from kinds to shapes, but {state!r}")
    for kind, size in state.items():
        if not isinstance(kind, str) or not kind.isidentifier() or kind in ("step", "compensation"):
            raise _refused(
                name, f"calls a state {kind!r}: an identifier is needed, other than step and compensation"
            )
        if not isinstance(size, tuple) or not all(isinstance(side, int) and side >= 0 for side in size):
            raise _refused(
                name, f"gives the state {kind} the shape {size!r}, which is not a tuple of whole numbers"
            )
        if not rule.needs_whole:
            along = axes.get(kind)
            fits = along is not None and len(along) == len(size)
            if not fits or any(
                axis is not None and shape[axis] != side for axis, side in zip(along or (), size)
            ):
                raise _refused(
                    name, f"has a row form, but its axes {along!r} do not fit the state {kind} of {size}"
                )


def _check_step(name: str, rule: Rule, shape: tuple[int, int], options: Mapping[str, Any]) -> None:
    m, n = shape
    generator = torch.Generator().manual_seed(0)
    matrices = []
    for i in range(_COUNT):
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape, generator=generator)
        matrices.append(MatrixRef(parameter, Block(f"{name}.check.{i}", shape), "", 0, FullView(shape)))
    state: dict[Tensor, dict[str, Any]] = {matrix.parameter: {"step": 0} for matrix in matrices}
    batch_state = BatchState(matrices, options, rule.state(shape, options))
    batch_state.bind(state)
    # A rule may draw random numbers; the caller's must not depend on that.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for step in range(2):
            for entries in state.values():
                entries["step"] = step
            batch = batch_state.batch(range(_COUNT), state, StepMask())
            [(_, update)] = run_updates(rule, [batch], Unsharded())
            if not isinstance(update, Update):
                raise _refused(
                    name, f"must return an optimizers.Update from update(self, b), not {update!r:.60}"
                )
            delta = update.delta
            dense = delta.dense(batch) if isinstance(delta, LowRank) else delta
            if not isinstance(dense, Tensor) or tuple(dense.shape) != (_COUNT, m, n):
                size = tuple(dense.shape) if isinstance(dense, Tensor) else type(dense).__name__
                raise _refused(name, f"gives an update of shape {size} for {_COUNT} matrices of {m}×{n}")
            if not bool(dense.isfinite().all()):
                raise _refused(name, f"gives an update that is not finite for {m}×{n} matrices")
    for kind, size in rule.state(shape, options).items():
        wrong = tuple(batch_state.stacked(kind).shape) != (_COUNT, *size)
        if wrong or math.isnan(float(batch_state.stacked(kind).sum())):
            raise _refused(name, f"leaves a state {kind} that is not what it said or not finite")


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _refused(name: str, reason: str) -> OptionError:
    return OptionError("name", name, reason)
