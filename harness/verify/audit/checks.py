"""All checks of an optimizer in one process, each under a time limit."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
from torch import nn

from harness.verify.audit import (
    checks_contract,
    checks_gradients,
    checks_groups,
    checks_shapes,
    checks_speed,
    checks_state,
)
from harness.verify.audit.document import FIRST_STEP, Check
from harness.verify.audit.subject import Build, Named, NotRunnable, Subject, describe
from harness.verify.audit.targets import Target

LIMIT_S = 20.0
"""Time of one check, s, where none is given; most take milliseconds, `torch.compile` seconds."""

CHECKS: Mapping[str, Callable[[Subject], Check]] = {
    "repeatable": checks_shapes.repeatable,
    "state bytes": checks_state.state_bytes,
    "resume": checks_state.resume,
    "resume weights only": checks_state.resume_weights_only,
    "lr schedule": checks_groups.lr_schedule,
    "tensor lr": checks_groups.tensor_lr,
    "weight decay": checks_groups.weight_decay,
    "frozen parameter": checks_groups.frozen_parameter,
    "late unfrozen": checks_groups.late_unfrozen,
    "added group": checks_groups.added_group,
    "zero gradients": checks_gradients.zero_gradients,
    "nonfinite gradients": checks_gradients.nonfinite_gradients,
    "sparse gradients": checks_gradients.sparse_gradients,
    "no gradients": checks_gradients.no_gradients,
    "keeps gradients": checks_gradients.keeps_gradients,
    "closure": checks_contract.closure,
    "silence": checks_contract.silence,
    "vectors and scalars": checks_shapes.vectors_and_scalars,
    "higher ranks": checks_shapes.higher_ranks,
    "empty parameters": checks_shapes.empty_parameters,
    "transposed parameters": checks_shapes.transposed_parameters,
    "tied weights": checks_shapes.tied_weights,
    "parameter order": checks_shapes.parameter_order,
    "bf16 parameters": checks_shapes.bf16_parameters,
    "foreach": checks_speed.foreach,
    "fused": checks_speed.fused,
    "host syncs": checks_speed.host_syncs,
    "torch.compile": checks_speed.compiled,
}
"""Name → check, in the order in which they run and are shown."""


class _TooSlow(BaseException):
    """The time limit of a check; no `except Exception` of an optimizer catches it."""


def first_step(target: Target, limit_s: float = LIMIT_S) -> Check | list[str]:
    """Return the names of the checks of a target, or, if it takes no step in this process, a check that says why.

    Args:
        target: that can be built.
        limit_s: time of the first step, s.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject = _subject(_builder(target), limit_s)
    _SUBJECTS.clear()
    if isinstance(subject, Check):
        return subject
    _SUBJECTS[repr(target)] = subject
    return list(CHECKS)


def run_check(target: Target, name: str, limit_s: float = LIMIT_S) -> Check:
    """Run one check of a target in this process; it runs the target's code.

    Args:
        target: that can be built; what `first_step` measured of it is kept for all its checks.
        name: of `CHECKS`.
        limit_s: time of the check, s.
    """
    subject = _SUBJECTS.get(repr(target))
    if subject is None:
        return checks_of(_builder(target), [name], limit_s)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _run(name, subject, limit_s)


_SUBJECTS: dict[str, Subject] = {}


def _builder(target: Target) -> Build:
    return lambda named: target.build(named, holder(named) if target.form == "model" else None)


def holder(named: Named) -> nn.Module:
    """Return a module whose parameters have these names."""
    root = nn.Module()
    for name, p in named:
        module = root
        *path, last = name.split(".")
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, p)
    return root


def checks_of(build: Build, names: Sequence[str] = tuple(CHECKS), limit_s: float = LIMIT_S) -> list[Check]:
    """Run checks of an optimizer in this process.

    Args:
        build: returns the optimizer over named parameters.
        names: of `CHECKS`, to run.
        limit_s: time of one check, s.

    Returns:
        One result per name; a single one if the optimizer takes no step. An exception in a step that a check does not
        expect makes it fail.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject = _subject(build, limit_s)
        return [subject] if isinstance(subject, Check) else [_run(name, subject, limit_s) for name in names]


def _subject(build: Build, limit_s: float) -> Subject | Check:
    """Return the optimizer under test, or a check that did not run, if it takes no step."""
    try:
        with _limited(limit_s):
            return Subject(build)
    except _TooSlow:
        return Check(FIRST_STEP, None, f"the first step did not end within {limit_s:g} s")
    except NotRunnable as error:
        return Check(FIRST_STEP, None, str(error))


def _run(name: str, subject: Subject, limit_s: float) -> Check:
    try:
        with _limited(limit_s), torch.enable_grad():
            return CHECKS[name](subject)
    except _TooSlow:
        return Check(name, None, f"did not end within {limit_s:g} s")
    except Exception as error:
        return Check(name, False, describe(error))


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise `_TooSlow` after some seconds; signals reach the main thread only, so elsewhere there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
