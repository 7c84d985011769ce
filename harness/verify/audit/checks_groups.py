"""Checks of parameter groups: learning-rate schedules, frozen and late parameters, tensor lr, weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from harness.verify.audit.document import Check
from harness.verify.audit.subject import (
    Named,
    Subject,
    SubjectRun,
    describe,
    difference,
    finite,
    gradient_of,
    gradients_of,
    moved,
    parameter,
    set_option,
)

DECAY = 0.1
FIT = 0.02
"""Relative remainder up to which a measured decay is a multiple of the weights."""
FACTOR = 0.1
"""What the schedule multiplies the learning rate by in the step that is measured."""
LATE = "late.weight"


def lr_schedule(subject: Subject) -> Check:
    """Lower the rate of one of two groups by `LambdaLR`: its parameters must move less, the others as before.

    Finds optimizers that keep a copy of the rate, read the constructor's default, or read the first group only.
    """
    name = "lr schedule"
    plain, scheduled = _two_groups(subject), _two_groups(subject)
    groups = scheduled.optimizer.param_groups
    rates = [group.get("lr") for group in groups]
    if any(rate is None or float(rate) == 0 for rate in rates):
        return Check(name, None, f"the groups' lr is {rates[0]}: there is no rate to schedule")
    # A group of this project's presets can say that schedules leave it alone.
    last = max((i for i, group in enumerate(groups) if group.get("scheduled", True)), default=len(groups) - 1)
    slow = {id(p) for p in groups[last]["params"]}
    names = [key for key, p in scheduled.named if id(p) in slow]
    others = [key for key, p in scheduled.named if id(p) not in slow]
    begin = subject.steps - 1
    schedulers = [
        LambdaLR(
            run.optimizer, [_drop(factor, begin) if i == last else _constant for i in range(len(groups))]
        )
        for run, factor in ((plain, 1.0), (scheduled, FACTOR))
    ]
    late = 0
    for step in range(begin + 2):
        since, since_scheduled = plain.weights(), scheduled.weights()
        plain.step()
        scheduled.step()
        for scheduler in schedulers:
            scheduler.step()
        if step < begin:
            continue
        full = sum(moved(plain, key, since) ** 2 for key in names) ** 0.5
        less = sum(moved(scheduled, key, since_scheduled) ** 2 for key in names) ** 0.5
        if difference(scheduled, plain, names)[0] > 0:
            break
        late += 1
    else:
        if not any(moved(plain, key) for key in names):
            return Check(name, None, "the parameters do not move")
        return Check(
            name,
            False,
            f"the rate of a group is {FACTOR} of before, and its parameters move as far: "
            "read group['lr'] in every step, and keep no copy",
        )
    words = f"with {FACTOR} of the rate the scheduled group moves {less / full if full else 0:.3g} as far"
    leak, parameter_name = difference(scheduled, plain, others)
    if leak > subject.rounding:
        return Check(
            name,
            False,
            f"{words}, but {parameter_name} of another group moves differently ({leak:.1e}): "
            "read each group's own lr",
        )
    words += ", one step late" if late else ""
    return Check(name, True, words if others else f"{words} (one group: a second one was refused)")


def _constant(_step: int) -> float:
    return 1.0


def _drop(factor: float, begin: int) -> Callable[[int], float]:
    return lambda step: factor if step >= begin else 1.0


def _two_groups(subject: Subject) -> SubjectRun:
    """Return a run with at least two groups where the optimizer allows it."""
    run = subject.start()
    if len(run.optimizer.param_groups) > 1:
        return run
    half = len(run.named) // 2
    first, second = run.named[:half], run.named[half:]
    try:
        split = subject.over(first)
        add_group(split, second)
    except Exception:
        return run
    return SubjectRun(run.named, split.optimizer, split.uses_closure)


def frozen_parameter(subject: Subject) -> Check:
    """Give one parameter no gradient, with weight decay on: it must stay, and the others must move."""
    run = subject.start()
    set_option(run, "weight_decay", DECAY)
    still, *others = [name for name, _ in run.named]
    dict(run.named)[still].requires_grad_(False)
    for step in range(subject.steps):
        run.step({name: gradient_of(step, name, tuple(p.shape)) for name, p in run.named if name != still})
    if moved(run, still):
        return Check(
            "frozen parameter",
            False,
            f"{still} has no gradient and moves by {moved(run, still):.1e}: skip parameters whose grad is None",
        )
    usual = subject.after(subject.steps)
    stuck = [name for name in others if not moved(run, name) and moved(usual, name)]
    if stuck or not finite(run.weights()):
        return Check(
            "frozen parameter", False, f"{', '.join(stuck) or 'a weight'} does not move as it should"
        )
    return Check("frozen parameter", True, "a parameter without gradient stays; the others move")


def late_unfrozen(subject: Subject) -> Check:
    """Give a parameter its first gradient after some steps; its first update is compared with a new optimizer's."""
    run = subject.start()
    late = run.named[0][0]
    dict(run.named)[late].requires_grad_(False)
    for step in range(subject.steps):
        run.step({name: gradient_of(step, name, tuple(p.shape)) for name, p in run.named if name != late})
    dict(run.named)[late].requires_grad_(True)
    return _first_update("late unfrozen", subject, run, late)


def added_group(subject: Subject) -> Check:
    """Add a parameter with `add_param_group` after some steps; it must move."""
    run = subject.after(subject.steps)
    known = run.named[0][0]
    new = parameter(LATE, subject.shapes[known])
    try:
        add_group(run, [(LATE, new)])
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        return Check("added group", None, f"refused: {describe(error)}")
    run.named = [*run.named, (LATE, new)]
    run.start[LATE] = new.detach().clone()
    return _first_update("added group", subject, run, LATE)


def add_group(run: SubjectRun, named: Named) -> None:
    """Call `add_param_group`, with names and the route to a rule where the optimizer's groups have them."""
    first = run.optimizer.param_groups[0]
    group: dict[str, Any] = {"params": list(named) if "param_names" in first else [p for _, p in named]}
    if "use_muon" in first:
        group["use_muon"] = all(p.ndim >= 2 for _, p in named)
    run.optimizer.add_param_group(group)


def _first_update(name: str, subject: Subject, run: SubjectRun, late: str) -> Check:
    """Step on until the late parameter moves; some rules only start their averages in the first step."""
    before, begin = run.weights(), run.t
    fresh = subject.over([(key, torch.nn.Parameter(w.clone())) for key, w in before.items()])
    fresh.t = run.t
    while run.t < begin + subject.steps and not moved(run, late, before):
        run.step()
        fresh.step()
    late_move, usual = moved(run, late, before), moved(fresh, late)
    if not finite(run.weights()):
        return Check(name, False, f"weights are not finite after the first gradient of {late}")
    if not late_move:
        return Check(
            name, False, f"{late} does not move: create state when a parameter has its first gradient"
        )
    when = "" if run.t == begin + 1 else f" comes in step {run.t - begin} and"
    return Check(
        name,
        True,
        f"its first update{when} is {late_move / usual:.2f} of a new optimizer's" if usual else "it moves",
    )


def tensor_lr(subject: Subject) -> Check:
    """Replace the float rate of each group by a 0-D tensor: the weights must be the same."""

    def replace(run: SubjectRun) -> None:
        for group in run.optimizer.param_groups:
            if isinstance(group.get("lr"), float | int):
                group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float64)

    reference = subject.after(subject.steps)
    if not any(isinstance(group.get("lr"), float | int) for group in reference.optimizer.param_groups):
        return Check("tensor lr", None, "the groups have no float lr")
    run = subject.start()
    replace(run)
    kept = [group["lr"].clone() for group in run.optimizer.param_groups if torch.is_tensor(group.get("lr"))]
    for _ in range(subject.steps):
        run.step()
    now = [group["lr"] for group in run.optimizer.param_groups if torch.is_tensor(group.get("lr"))]
    error, name = difference(run, reference)
    if error > subject.rounding:
        return Check("tensor lr", False, f"ΔW of {name} differs by {error:.1e} from that of a float lr")
    if len(now) == len(kept) and any(not torch.equal(a, b) for a, b in zip(now, kept, strict=True)):
        return Check("tensor lr", False, "the step writes into the tensor lr: use it read-only")
    return Check("tensor lr", True, f"equal to a float lr (difference {error:.1e})")


def weight_decay(subject: Subject) -> Check:
    """Classify weight decay as decoupled, coupled or ignored, from the weights alone.

    Gradients are fixed, so decoupled decay adds c·W to a step and changes nothing else: the difference to a run without
    decay grows by a multiple of the weights, and no longer once the decay is 0 again. Coupled decay stays in the state.
    """
    found = _measured_decay(subject, DECAY)
    # A tiny rate leaves less of it than weights resolve.
    return (
        found
        or _measured_decay(subject, 1000 * DECAY)
        or Check(
            "weight decay",
            False,
            f"ignored: weight_decay={1000 * DECAY:g} in the group changes nothing: read it in every step",
        )
    )


def _measured_decay(subject: Subject, decay: float) -> Check | None:
    """Return None if the decay changes nothing."""
    name = "weight decay"
    plain, decayed = subject.start(), subject.start()
    if not set_option(plain, "weight_decay", 0.0):
        return Check(name, None, "the groups have no weight_decay")
    set_option(decayed, "weight_decay", decay)
    rates = [group["lr"] for group in decayed.optimizer.param_groups if group.get("lr")]
    matrix = max(subject.shapes, key=lambda key: len(subject.shapes[key]))
    factors, rest = [], 0.0
    for _ in range(subject.steps):
        before, gap = decayed.weights()[matrix].double(), _gap(decayed, plain, matrix)
        plain.step()
        decayed.step()
        grown = _gap(decayed, plain, matrix) - gap
        if float(grown.norm()) <= 16 * torch.finfo(torch.float32).eps * float(before.norm()):
            factors.append(0.0)
            continue
        # Applied before the update, or after it.
        fits = [_multiple(grown, w) for w in (before, decayed.weights()[matrix].double())]
        factor, remainder = min(fits, key=lambda fit: fit[1])
        factors.append(factor)
        rest = max(rest, remainder)
    if not finite(decayed.weights()):
        return Check(name, False, f"weights are not finite with weight_decay={decay:g}")
    if not any(factors):
        return None
    coupled = _coupled(subject, decayed, decay)
    gap = _gap(decayed, plain, matrix)
    set_option(decayed, "weight_decay", 0.0)
    for _ in range(subject.steps):
        plain.step()
        decayed.step()
    kept = float((_gap(decayed, plain, matrix) - gap).norm() / gap.norm()) if float(gap.norm()) else 0.0
    if rest > FIT or kept > FIT:
        return coupled
    if max(factors) > 0:
        return Check(name, False, f"wrong sign: the decay adds {max(factors):.1e} of the weights per step")
    return Check(name, True, f"decoupled: {_convention([-factor for factor in factors], rates, decay)}")


def _gap(run: SubjectRun, other: SubjectRun, name: str) -> Tensor:
    return run.weights()[name].double() - other.weights()[name].double()


def _multiple(grown: Tensor, w: Tensor) -> tuple[float, float]:
    """Return c of the best fit ``grown = c·w``, and the relative remainder."""
    factor = float((grown * w).sum() / w.square().sum())
    return factor, float((grown - factor * w).norm() / grown.norm())


def _coupled(subject: Subject, decayed: SubjectRun, decay: float) -> Check:
    """Compare with a run whose gradients got decay · W before the step, which is what coupled decay means."""
    name = "weight decay"
    oracle = subject.start()
    set_option(oracle, "weight_decay", 0.0)
    for step in range(subject.steps):
        gradients = gradients_of(step, oracle.named)
        weights = oracle.weights()
        oracle.step({key: gradient + decay * weights[key] for key, gradient in gradients.items()})
    if difference(decayed, oracle)[0] > max(subject.rounding, FIT):
        return Check(name, None, "in the rule's own way: neither decoupled, nor decay · W in the gradient")
    words = "coupled: as decay · W in the gradient"
    denies = [
        key
        for key in _DECOUPLING_FLAGS
        if any(group.get(key) is True for group in decayed.optimizer.param_groups)
    ]
    return Check(name, not denies, f"{words}, but {denies[0]}=True" if denies else words)


def _convention(factors: list[float], rates: list[Any], decay: float) -> str:
    """Say in words which multiple of the weights is taken off per step."""
    if max(factors) > (1 + FIT) * min(factors):
        return f"{min(factors) / decay:.2g} to {max(factors) / decay:.2g} times weight_decay"
    factor = factors[0] / decay
    rate = float(rates[0]) if len({float(rate) for rate in rates}) == 1 else None
    if rate is not None and abs(factor / rate - 1) < FIT:
        return "lr · weight_decay of the weights per step"
    if abs(factor - 1) < FIT:
        return "weight_decay of the weights per step, which does not follow the schedule of the rate"
    return f"{factor:.3g} · weight_decay of the weights per step" + (
        f" at lr {rate:g}" if rate is not None else ""
    )


_DECOUPLING_FLAGS = ("weight_decouple", "decoupled_weight_decay", "decoupled_decay")
