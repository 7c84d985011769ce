"""Checks of the optimizer's state: its bytes, and that `state_dict` holds all of it."""

from __future__ import annotations

import copy
import io
import re
import warnings
from typing import Any

import torch

from harness.verify.audit.document import Check
from harness.verify.audit.subject import (
    Subject,
    SubjectRun,
    describe,
    difference,
    tensors,
)

MORE = 6
"""Steps between two measurements of the state."""
_GLOBAL = re.compile(r"GLOBAL (\S+) was not")


def state_bytes(subject: Subject) -> Check:
    """Measure state bytes per parameter element by kind; the state must not grow, nor exceed what it reports.

    An optimizer that has `state_bytes()`, as those of `optimizers`, is compared with it.
    """
    run = subject.after(subject.steps)
    early = bytes_by_kind(run)
    for _ in range(MORE):
        run.step()
    late = bytes_by_kind(run)
    elements = sum(p.numel() for _, p in run.named)
    words = ", ".join(f"{kind} {size / elements:.2f}" for kind, size in sorted(late.items()) if size)
    words = f"{sum(late.values()) / elements:.2f} bytes per parameter element ({words or 'no tensors'})"
    grown = [kind for kind, size in late.items() if size > early.get(kind, 0)]
    if grown:
        return Check(
            "state bytes",
            False,
            f"{words}; {', '.join(sorted(grown))} grew from step {subject.steps} to step {run.t}: bound the history",
        )
    claim = getattr(run.optimizer, "state_bytes", None)
    if callable(claim):
        claimed: Any = claim()
        total = sum(claimed.values()) if isinstance(claimed, dict) else claimed
        measured = sum(late.values())
        if not isinstance(total, int) or total != measured:
            return Check("state bytes", False, f"{words}; state_bytes() says {total} bytes, not {measured}")
    return Check("state bytes", True, words)


def bytes_by_kind(run: SubjectRun) -> dict[str, int]:
    """Return state key → bytes of the tensors in ``state_dict()["state"]`` that are not the parameters themselves."""
    own = {p.untyped_storage().data_ptr() for _, p in run.named if p.numel()}
    kinds: dict[str, int] = {}
    for state in run.optimizer.state_dict()["state"].values():
        for path, tensor in tensors(state):
            if tensor.numel() and tensor.untyped_storage().data_ptr() not in own:
                kind = path.partition(".")[0]
                kinds[kind] = kinds.get(kind, 0) + tensor.nbytes
    return kinds


def resume(subject: Subject) -> Check:
    """Compare an interrupted run, resumed from `state_dict` in a new optimizer, with one that went on."""
    reference, interrupted = subject.after(2 * subject.steps), subject.after(subject.steps)
    resumed = _resumed(subject, interrupted, copy.deepcopy(interrupted.optimizer.state_dict()))
    error, name = difference(resumed, reference)
    if error == 0:
        return Check("resume", True, "the resumed run takes the same steps")
    if error <= subject.rounding:
        return Check("resume", True, f"the resumed run differs by {error:.1e}, which is rounding")
    unsaved = _unsaved(interrupted)
    hint = f"; {unsaved} is not in state_dict()" if unsaved else ""
    return Check(
        "resume",
        False,
        f"ΔW of {name} differs by {error:.1e} after {subject.steps} steps{hint}: "
        "keep all state in self.state or the groups",
    )


def resume_weights_only(subject: Subject) -> Check:
    """Save `state_dict` with `torch.save`, load it with ``weights_only=True``, and compare the next steps."""
    name = "resume weights only"
    reference, interrupted = subject.after(2 * subject.steps), subject.after(subject.steps)
    file = io.BytesIO()
    try:
        torch.save(interrupted.optimizer.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
    except Exception as error:
        unknown = _GLOBAL.search(str(error))
        what = f"torch.load(weights_only=True) refuses {unknown[1]}" if unknown else describe(error)
        return Check(name, False, f"{what}: keep tensors, numbers, texts and plain containers in the state")
    error, parameter = difference(_resumed(subject, interrupted, loaded), reference)
    if error <= subject.rounding:
        return Check(name, True, f"torch.load(weights_only=True) restores it; difference {error:.1e}")
    return Check(name, False, f"ΔW of {parameter} differs by {error:.1e} after torch.save and torch.load")


def _resumed(subject: Subject, interrupted: SubjectRun, state: Any) -> SubjectRun:
    """Return a run over copies of the weights, with a new optimizer that loaded ``state``, some steps later."""
    copies = [(name, torch.nn.Parameter(p.detach().clone())) for name, p in interrupted.named]
    run = subject.over(copies)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.optimizer.load_state_dict(state)
    run.t, run.start = interrupted.t, interrupted.start
    for _ in range(subject.steps):
        run.step()
    return run


def _unsaved(run: SubjectRun) -> str:
    """Return the attributes of the optimizer, beyond torch's, that hold tensors."""
    kept = {"state", "param_groups", "defaults"}
    own = {id(p) for _, p in run.named}
    return ", ".join(
        f"self.{key}"
        for key, value in vars(run.optimizer).items()
        if key not in kept and any(id(tensor) not in own for _, tensor in tensors(value))
    )
