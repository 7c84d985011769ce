"""Checks of parameters: 0-D to 4-D, empty, transposed, tied, in bf16, in another order."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from harness.verify.audit.document import Check
from harness.verify.audit.subject import (
    Subject,
    SubjectRun,
    describe,
    difference,
    finite,
    gradient_of,
    gradients_of,
    moved,
    parameter,
)

BF16_STEPS, BF16_STD = 20, 0.02
"""Weights of the size that language models start with."""


def vectors_and_scalars(subject: Subject) -> Check:
    """Step on 0-D and 1-D parameters, and on matrices of one row or column."""
    shapes = {"scalar": (), "one": (1,), "vector": (7,), "row": (1, 5), "column": (5, 1)}
    return _steps_on("vectors and scalars", subject, shapes)


def higher_ranks(subject: Subject) -> Check:
    """Step on stacks of matrices and on convolutions."""
    return _steps_on("higher ranks", subject, {"experts": (3, 4, 6), "convolution": (4, 3, 3, 3)})


def empty_parameters(subject: Subject) -> Check:
    """Step on parameters without elements, which empty shards are."""
    return _steps_on("empty parameters", subject, {"no_rows": (0, 6), "no_elements": (0,)})


def _steps_on(name: str, subject: Subject, shapes: Mapping[str, tuple[int, ...]]) -> Check:
    """Step on one shape at a time, next to an ordinary matrix."""
    companion = {"companion": (8, 8)}
    refused, failed = [], []
    for key, shape in shapes.items():
        words = f"{key} {tuple(shape)}".replace("'", "")
        try:
            run = subject.start({key: shape, **companion})
        except Exception as error:
            refused.append(f"{words} is refused ({describe(error)})")
            continue
        try:
            for _ in range(subject.steps):
                run.step()
        except NotImplementedError as error:
            refused.append(f"{words} is refused ({describe(error)})")
            continue
        except Exception as error:
            failed.append(f"{words} fails in the step: {describe(error)}")
            continue
        if not finite(run.weights()):
            failed.append(f"{words} is not finite")
        elif run.start[key].numel() and not moved(run, key) and moved(run, "companion"):
            failed.append(f"{words} does not move")
    if failed:
        return Check(name, False, "; ".join(failed))
    if len(refused) == len(shapes):
        return Check(name, None, "; ".join(refused))
    return Check(name, True, "; ".join(["all move" if not refused else "the others move", *refused]))


def transposed_parameters(subject: Subject) -> Check:
    """Step on matrices stored by column: the weights must be those of contiguous ones."""
    if subject.draws:
        return Check("transposed parameters", None, "it draws random numbers, in the order of memory")
    reference = subject.after(subject.steps)
    plain = subject.start()
    views = [
        (name, nn.Parameter(p.detach().t().contiguous().t()) if p.dim() == 2 else p)
        for name, p in plain.named
    ]
    run = subject.over(views)
    try:
        for _ in range(subject.steps):
            run.give(gradients_of(run.t, run.named))
            for _, p in run.named:
                if p.grad is not None and p.dim() == 2:
                    p.grad = p.grad.t().contiguous().t()
            run.take()
    except Exception as error:
        return Check(
            "transposed parameters", False, f"{describe(error)}; use reshape, and no view, of weights"
        )
    error, name = difference(run, reference)
    # Another order of the sums in products and norms: rounding that a polynomial iteration amplifies.
    if error > 10 * subject.rounding:
        return Check("transposed parameters", False, f"ΔW of {name} differs by {error:.1e} from contiguous")
    return Check("transposed parameters", True, f"equal to contiguous ones (difference {error:.1e})")


class _Tied(nn.Module):
    """An embedding whose weight is also the head, and one layer between them."""

    def __init__(self) -> None:
        super().__init__()
        weight = parameter("embed.weight", (24, 8))
        self.embed = nn.Embedding(24, 8)
        self.layer = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 24, bias=False)
        self.layer.weight = parameter("layer.weight", (8, 8))
        self.embed.weight = self.head.weight = weight

    def loss(self) -> torch.Tensor:
        """Return the loss on fixed tokens."""
        tokens = torch.arange(24)
        return nn.functional.cross_entropy(self.head(self.layer(self.embed(tokens))), tokens.flip(0))


def tied_weights(subject: Subject) -> Check:
    """Name a tied weight twice, as `named_parameters(remove_duplicate=False)` does.

    It must be stepped once, or the optimizer must refuse it or warn.
    """
    name = "tied weights"
    once, twice = _Tied(), _Tied()
    reference = subject.over(list(once.named_parameters()))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            run = subject.over(list(twice.named_parameters(remove_duplicate=False)))
        except Exception as error:
            return Check(name, True, f"refused: {describe(error)}")
    for _ in range(subject.steps):
        for model, under_test in ((once, reference), (twice, run)):
            model.zero_grad()
            model.loss().backward()
            under_test.take()
    error, _ = difference(run, reference)
    if error <= subject.rounding:
        return Check(name, True, "a weight that is named twice is stepped once")
    if any("duplicate" in str(item.message) for item in heard):
        return Check(name, True, f"warns of duplicate parameters (ΔW would differ by {error:.1e})")
    return Check(
        name, False, f"a weight that is named twice moves {error:.1e} differently, without a warning"
    )


def bf16_parameters(subject: Subject) -> Check:
    """Step on bf16 weights: how much of the fp32 movement arrives?

    Measured along the fp32 movement, under gradients of a constant direction.
    """
    name = "bf16 parameters"
    full = subject.start(weight_std=BF16_STD)
    try:
        half = subject.start(dtype=torch.bfloat16, weight_std=BF16_STD)
        for run in (full, half):
            for _ in range(BF16_STEPS):
                run.step({key: gradient_of(0, key, tuple(p.shape)) for key, p in run.named})
    except Exception as error:
        return Check(name, False, f"{describe(error)} on bf16 parameters")
    if not finite(half.weights()):
        return Check(name, False, "weights are not finite with bf16 parameters")
    product = square = 0.0
    for key in full.start:
        expected = full.weights()[key].double() - full.start[key].double()
        product += float(((half.weights()[key].double() - half.start[key].double()) * expected).sum())
        square += float(expected.square().sum())
    if square == 0:
        return Check(name, None, "fp32 weights do not move either")
    part = product / square
    rates = sorted({float(group["lr"]) for group in full.optimizer.param_groups if group.get("lr")})
    words = f"{100 * part:.0f} % of the fp32 movement arrives (lr {', '.join(map('{:g}'.format, rates))})"
    if not 0.5 <= part <= 1.5:
        return Check(name, None, f"{words}: keep fp32 master weights, or round stochastically")
    return Check(name, True, words)


def parameter_order(subject: Subject) -> Check:
    """Name the parameters in reverse order: the weights must be the same."""
    if subject.draws:
        return Check("parameter order", None, "it draws random numbers, in the order of parameters")
    run = subject.after(subject.steps, order=lambda names: names[::-1])
    error, name = difference(run, subject.after(subject.steps))
    if error > subject.rounding:
        return Check(
            "parameter order",
            False,
            f"ΔW of {name} differs by {error:.1e} in reverse order: the update depends on the order of parameters",
        )
    return Check("parameter order", True, f"equal in reverse order (difference {error:.1e})")


def repeatable(subject: Subject) -> Check:
    """Run twice with the same seeds: the weights must be bit-equal."""
    first, second = subject.after(subject.steps), subject.after(subject.steps)
    error, name = _bit_difference(first, second)
    if error:
        return Check("repeatable", False, f"two runs of one seed differ by {error:.1e} in {name}")
    return Check("repeatable", True, "two runs of one seed are bit-equal")


def _bit_difference(first: SubjectRun, second: SubjectRun) -> tuple[float, str]:
    other = second.weights()
    for name, w in first.weights().items():
        if not torch.equal(w, other[name]):
            return float((w - other[name]).abs().max()), name
    return 0.0, ""
