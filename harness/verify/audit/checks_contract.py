"""Checks of the contract of `torch.optim.Optimizer.step`, and of what the optimizer says aloud."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.verify.audit.document import Check
from harness.verify.audit.subject import (
    Subject,
    describe,
    difference,
    gradients_of,
    seed,
)

LOSS = 2.5


def closure(subject: Subject) -> Check:
    """Pass a closure: it must run with gradients on, its loss be returned, and the weights be those without it."""
    name = "closure"
    run = subject.start()
    calls = 0
    is_recording = True

    def evaluate() -> Tensor:
        nonlocal calls, is_recording
        calls += 1
        is_recording = is_recording and torch.is_grad_enabled()
        run.give(gradients_of(run.t, run.named))
        return torch.tensor(LOSS)

    # torch's stub wants a float of the closure; losses are tensors.
    step: Callable[..., Any] = run.optimizer.step
    returned = None
    for _ in range(subject.steps):
        calls = 0
        run.give({})
        seed(run.t)
        try:
            returned = step(evaluate)
        except TypeError as error:
            return Check(name, False, f"{describe(error)}; step takes a closure by torch's contract")
        if not calls:
            return Check(name, False, "step(closure) does not call the closure")
        run.t += 1
    if returned is None or float(returned) != LOSS:
        return Check(name, False, f"step(closure) returns {returned}, not the loss of the closure")
    if not is_recording:
        return Check(name, False, "the closure runs without gradients: call it under torch.enable_grad()")
    if not subject.uses_closure:
        error, parameter = difference(run, subject.after(subject.steps))
        if error > subject.rounding:
            return Check(
                name, False, f"ΔW of {parameter} differs by {error:.1e} from a step without a closure"
            )
    return Check(name, True, f"called {calls} × with gradients on; its loss is returned")


def silence(subject: Subject) -> Check:
    """Listen to standard output and to warnings while the optimizer is built and stepped."""
    printed = io.StringIO()
    with warnings.catch_warnings(record=True) as heard, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always")
        subject.after(subject.steps)
    text = " ".join(printed.getvalue().split())
    if text:
        return Check("silence", False, f"prints on standard output: {text[:120]!r}: use warnings or logging")
    if heard:
        message = " ".join(str(heard[0].message).split())
        return Check(
            "silence", None, f"{len(heard)} warnings, first {heard[0].category.__name__}: {message[:120]}"
        )
    return Check("silence", True, "no output and no warnings")
