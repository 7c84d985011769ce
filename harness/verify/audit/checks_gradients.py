"""Checks of unusual gradients: zero, not finite, sparse, none at all, and left as they were."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness.verify.audit.document import Check
from harness.verify.audit.subject import (
    Subject,
    SubjectRun,
    describe,
    difference,
    finite,
    gradients_of,
    moved,
    set_option,
    tensors,
)


def zero_gradients(subject: Subject) -> Check:
    """Step with gradients of zero, then with ordinary ones: all weights and all state must stay finite."""
    name = "zero gradients"
    run = subject.start()
    set_option(run, "weight_decay", 0.0)
    zeros = {key: torch.zeros(tuple(p.shape)) for key, p in run.named}
    for _ in range(2):
        run.step(zeros)
    idle = max(moved(run, key) for key, _ in run.named)
    for _ in range(2):
        run.step()
    bad = [key for key, w in run.weights().items() if not bool(w.isfinite().all())]
    if bad:
        return Check(
            name, False, f"{', '.join(bad)} is not finite: add eps to the norm or root that it divides by"
        )
    spoiled = _not_finite_state(run)
    if spoiled:
        return Check(name, False, f"state {', '.join(spoiled)} is not finite after a zero gradient")
    words = "no movement" if idle == 0 else f"moves by up to {idle:.1e} without a gradient"
    return Check(name, True, f"finite; {words}")


def nonfinite_gradients(subject: Subject) -> Check:
    """Give one parameter a NaN: where does it go?

    An optimizer that lets it into the state of this parameter is as torch's own: the caller must skip the step, so the
    check does not apply. One that spreads it to other parameters fails.
    """
    name = "nonfinite gradients"
    run = subject.after(1)
    hit = run.named[0][0]
    gradients: dict[str, Tensor | None] = dict(gradients_of(run.t, run.named))
    spoiled = gradients[hit]
    assert spoiled is not None
    spoiled.view(-1)[0] = math.nan
    try:
        run.step(gradients)
    except Exception as error:
        return Check(name, None, f"refused: {describe(error)}")
    others = [key for key, w in run.weights().items() if key != hit and not bool(w.isfinite().all())]
    if others:
        return Check(
            name,
            False,
            f"a NaN in the gradient of {hit} reaches {', '.join(others)}: the whole step must be skipped",
        )
    state = _not_finite_state(run)
    own = not bool(dict(run.weights())[hit].isfinite().all())
    if own or state:
        where = " and ".join(filter(None, ["its weights" if own else "", ", ".join(state)]))
        return Check(
            name, None, f"a NaN enters {where}, as in torch's optimizers: skip such steps in the loop"
        )
    run.step()
    if not finite(run.weights()):
        return Check(name, False, "weights are not finite in the step after a NaN gradient")
    return Check(name, True, "a NaN gradient enters neither weights nor state")


def _not_finite_state(run: SubjectRun) -> list[str]:
    return sorted(
        {
            path
            for state in run.optimizer.state.values()
            for path, tensor in tensors(state)
            if tensor.is_floating_point() and not bool(tensor.isfinite().all())
        }
    )


def sparse_gradients(subject: Subject) -> Check:
    """Give the embedding a sparse gradient: it must be refused, or move as the dense one does."""
    name = "sparse gradients"
    run = subject.start()
    hit, p = run.named[0]
    dense = gradients_of(0, run.named)
    dense[hit][::2] = 0
    run.give(dense)
    p.grad = dense[hit].to_sparse(1)
    try:
        run.take()
    except Exception as error:
        text = describe(error)
        # torch's kernels say "layout" or "strides", libraries say "sparse".
        clear = "sparse" in text.lower()
        advice = "" if clear else ": refuse sparse gradients in the first step, by name"
        return Check(name, None, f"refused: {text}{advice}")
    reference = subject.start()
    reference.step(dense)
    if not finite(run.weights()):
        return Check(name, False, "weights are not finite after a sparse gradient")
    zero_rows = dense[hit].norm(dim=1) == 0
    change = run.weights()[hit] - run.start[hit]
    if float(change.norm()) == 0:
        return Check(name, False, "a sparse gradient is ignored without a word: refuse it")
    kept = ~zero_rows
    expected = reference.weights()[hit] - reference.start[hit]
    error = float((change - expected)[kept].norm() / expected[kept].norm())
    if error > 10 * subject.rounding:
        return Check(
            name, False, f"rows with a gradient move {error:.1e} differently from a dense gradient: refuse it"
        )
    return Check(name, True, "rows with a gradient move as under a dense one")


def no_gradients(subject: Subject) -> Check:
    """Step while no parameter has a gradient: nothing may move, and later steps must not change."""
    name = "no gradients"
    run = subject.after(1)
    before = run.weights()
    run.step({})
    if any(moved(run, key, before) for key, _ in run.named):
        return Check(name, False, "weights move in a step without gradients")
    run.t -= 1
    for _ in range(subject.steps - 1):
        run.step()
    error, parameter = difference(run, subject.after(subject.steps))
    if error > subject.rounding:
        return Check(
            name,
            False,
            f"the step counts although no parameter has a gradient: later updates of {parameter} differ by {error:.1e}",
        )
    return Check(name, True, "nothing moves, and later steps are the same")


def keeps_gradients(subject: Subject) -> Check:
    """Compare gradients before and after a step, bit for bit; torch's contract does not forbid to overwrite them."""
    run = subject.start()
    set_option(run, "weight_decay", 0.1)
    changed: set[str] = set()
    for _ in range(2):
        run.give(gradients_of(run.t, run.named))
        before = {key: p.grad.clone() for key, p in run.named if p.grad is not None}
        run.take()
        for key, p in run.named:
            if key in before and (p.grad is None or not torch.equal(p.grad, before[key])):
                changed.add(key)
    if changed:
        return Check(
            "keeps gradients",
            None,
            f"the step overwrites the gradients of {', '.join(sorted(changed))}: a norm logged after it is wrong",
        )
    return Check("keeps gradients", True, "gradients are the same after the step")
