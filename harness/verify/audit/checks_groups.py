"""Checks of parameter groups: learning-rate schedules, frozen and late parameters, tensor lr, weight decay."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

from harness.verify.audit.document import Check
from harness.verify.audit.subject import (
    ROUNDING,
    Named,
    Subject,
    SubjectRun,
    describe,
    difference,
    finite,
    gradient_of,
    moved,
    parameter,
    set_option,
)

STEPS = 3
DECAY = 0.1
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
    slow = {id(p) for p in groups[-1]["params"]}
    names = [key for key, p in scheduled.named if id(p) in slow]
    others = [key for key, p in scheduled.named if id(p) not in slow]
    schedulers = [
        LambdaLR(run.optimizer, [_constant] * (len(groups) - 1) + [_drop(factor)])
        for run, factor in ((plain, 1.0), (scheduled, FACTOR))
    ]
    late = 0
    for step in range(STEPS + 1):
        since, since_scheduled = plain.weights(), scheduled.weights()
        plain.step()
        scheduled.step()
        for scheduler in schedulers:
            scheduler.step()
        if step < STEPS - 1:
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
    if leak > ROUNDING:
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


def _drop(factor: float) -> Callable[[int], float]:
    return lambda step: factor if step >= STEPS - 1 else 1.0


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
    for step in range(STEPS):
        run.step({name: gradient_of(step, name, tuple(p.shape)) for name, p in run.named if name != still})
    if moved(run, still):
        return Check(
            "frozen parameter",
            False,
            f"{still} has no gradient and moves by {moved(run, still):.1e}: skip parameters whose grad is None",
        )
    stuck = [name for name in others if not moved(run, name)]
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
    for step in range(STEPS):
        run.step({name: gradient_of(step, name, tuple(p.shape)) for name, p in run.named if name != late})
    dict(run.named)[late].requires_grad_(True)
    return _first_update("late unfrozen", subject, run, late)


def added_group(subject: Subject) -> Check:
    """Add a parameter with `add_param_group` after some steps; it must move."""
    run = subject.after(STEPS)
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
    """Call `add_param_group`, with names where the optimizer's groups have names, as torch demands."""
    if "param_names" in run.optimizer.param_groups[0]:
        run.optimizer.add_param_group({"params": list(named)})
    else:
        run.optimizer.add_param_group({"params": [p for _, p in named]})


def _first_update(name: str, subject: Subject, run: SubjectRun, late: str) -> Check:
    before = run.weights()
    run.step()
    late_move = moved(run, late, before)
    if not finite(run.weights()):
        return Check(name, False, f"weights are not finite after the first gradient of {late}")
    if not late_move:
        return Check(
            name, False, f"{late} does not move: create state when a parameter has its first gradient"
        )
    fresh = subject.over([(key, torch.nn.Parameter(w.clone())) for key, w in before.items()])
    fresh.t = run.t - 1
    fresh.step()
    usual = moved(fresh, late)
    ratio = f"its first update is {late_move / usual:.2f} of a new optimizer's" if usual else "it moves"
    return Check(name, True, ratio)


def tensor_lr(subject: Subject) -> Check:
    """Replace the float rate of each group by a 0-D tensor: the weights must be the same."""

    def replace(run: SubjectRun) -> None:
        for group in run.optimizer.param_groups:
            if isinstance(group.get("lr"), float | int):
                group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float64)

    reference = subject.after(STEPS)
    if not any(isinstance(group.get("lr"), float | int) for group in reference.optimizer.param_groups):
        return Check("tensor lr", None, "the groups have no float lr")
    run = subject.start()
    replace(run)
    kept = [group["lr"].clone() for group in run.optimizer.param_groups if torch.is_tensor(group.get("lr"))]
    for _ in range(STEPS):
        run.step()
    now = [group["lr"] for group in run.optimizer.param_groups if torch.is_tensor(group.get("lr"))]
    error, name = difference(run, reference)
    if error > ROUNDING:
        return Check("tensor lr", False, f"ΔW of {name} differs by {error:.1e} from that of a float lr")
    if len(now) == len(kept) and any(not torch.equal(a, b) for a, b in zip(now, kept, strict=True)):
        return Check("tensor lr", False, "the step writes into the tensor lr: use it read-only")
    return Check("tensor lr", True, f"equal to a float lr (difference {error:.1e})")


def weight_decay(subject: Subject) -> Check:
    """Classify weight decay as decoupled, coupled or ignored, from the weights alone.

    With fixed gradients, decoupled decay adds c·W to each step and changes nothing else, so the difference to a run
    without decay grows by the same multiple of the current weights in each step.
    """
    name = "weight decay"
    probe = subject.start()
    if not set_option(probe, "weight_decay", 0.0):
        return Check(name, None, "the groups have no weight_decay")
    plain, decayed = subject.start(), subject.start()
    set_option(plain, "weight_decay", 0.0)
    set_option(decayed, "weight_decay", DECAY)
    matrix = max(subject.shapes, key=lambda key: len(subject.shapes[key]))
    factors, rest = [], 0.0
    lr = next((group["lr"] for group in decayed.optimizer.param_groups if group.get("lr")), None)
    for _ in range(STEPS):
        w = decayed.weights()[matrix].double()
        gap = w - plain.weights()[matrix].double()
        plain.step()
        decayed.step()
        grown = decayed.weights()[matrix].double() - plain.weights()[matrix].double() - gap
        if float(grown.norm()) <= 16 * torch.finfo(torch.float32).eps * float(w.norm()):
            factors.append(0.0)
            continue
        factor = float((grown * w).sum() / w.square().sum())
        rest = max(rest, float((grown - factor * w).norm() / grown.norm()))
        factors.append(factor)
    if not finite(decayed.weights()):
        return Check(name, False, f"weights are not finite with weight_decay={DECAY}")
    if not any(factors):
        return Check(
            name, False, f"ignored: weight_decay={DECAY} in the group changes nothing: read it in every step"
        )
    spread = max(factors) - min(factors)
    is_decoupled = rest < 0.02 and spread < 0.02 * max(map(abs, factors))
    if not is_decoupled:
        return Check(name, *_against_flag(decayed, False, "coupled: the decay enters the update rule"))
    if factors[0] > 0:
        return Check(name, False, f"wrong sign: the decay adds {factors[0]:.1e} of the weights per step")
    return Check(name, *_against_flag(decayed, True, f"decoupled: {_convention(-factors[0], lr)}"))


def _convention(factor: float, lr: object) -> str:
    words = f"{factor:.3g} of the weights per step"
    if not isinstance(lr, float | int):
        return words
    if abs(factor / (lr * DECAY) - 1) < 0.02:
        return f"{words}, lr · weight_decay"
    if abs(factor / DECAY - 1) < 0.02:
        return f"{words}, weight_decay without lr: it does not follow the schedule of the rate"
    return f"{words}, {factor / (lr * DECAY):.3g} times lr · weight_decay"


_DECOUPLING_FLAGS = ("weight_decouple", "decoupled_weight_decay", "decoupled_decay")


def _against_flag(run: SubjectRun, is_decoupled: bool, words: str) -> tuple[bool, str]:
    """Compare the measured kind with the option that claims it, where there is one."""
    group = run.optimizer.param_groups[0]
    flag = next((key for key in _DECOUPLING_FLAGS if isinstance(group.get(key), bool)), None)
    # Without momentum, coupled and decoupled decay are the same rule.
    if flag is None or group[flag] == is_decoupled or is_decoupled:
        return True, words
    return False, f"{words}, but {flag}={group[flag]}"
