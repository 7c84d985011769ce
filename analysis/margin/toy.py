"""Modes `toy` and `flow`: from settings to judged runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from analysis.margin import chosen as choice
from analysis.margin import points as sites
from analysis.margin import starts, trajectory
from analysis.margin.chosen import Chosen
from analysis.margin.flow import Flowed, flow
from analysis.margin.judging import judged
from analysis.margin.net import Nets, Problem
from analysis.margin.settings import Settings
from analysis.margin.steps import Stepped, record_times, train
from analysis.margin.trajectory import Run
from harness.config.errors import InputError

LR, STEPS = 0.01, 100_000
PER_DECADE, PER_DECADE_FLOW, MANY = 20, 4, 20
FIRST_DECADE = -2
Say = Callable[[str], None]


def problem_of(settings: Settings) -> Problem:
    """Points, loss and what is trained.

    Raises:
        InputError: points that nothing separates.
    """
    points = sites.given(
        list(settings.data) if isinstance(settings.data, tuple) else settings.data, settings.dim
    )
    return Problem(points, settings.loss, settings.reduction, settings.train_v or settings.v == "trained")


def optimizers_of(settings: Settings, default_lr: float) -> list[Chosen]:
    """The optimizers of a comparison, with their options.

    Raises:
        InputError: unknown names or options; options of an optimizer that is not compared.
    """
    strangers = [name for name in settings.options if name and name not in settings.optimizer]
    if strangers:
        key = next(iter(settings.options[strangers[0]]))
        raise InputError(
            f"{strangers[0]}.{key}",
            settings.options[strangers[0]][key],
            "is for an optimizer that does not run",
            fix=f"optimizer={','.join([*settings.optimizer, strangers[0]])}",
        )
    found = []
    for name in settings.optimizer:
        options = {**settings.options.get("", {}), **settings.options.get(name, {})}
        lr = options.pop("lr", settings.lr if settings.lr is not None else default_lr)
        if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0.0 < lr < math.inf:
            raise InputError(f"{name}.lr", lr, allowed="a number > 0")
        found.append(choice.choose(name, float(lr), options, settings.grad))
    return found


def run_toy(settings: Settings, say: Say) -> list[Run]:
    """Optimizer steps.

    Raises:
        InputError: bad input.
    """
    problem, chosen = problem_of(settings), optimizers_of(settings, LR)
    start = starts.start(settings, problem)
    steps = settings.steps or STEPS
    per_decade = settings.record or (PER_DECADE_FLOW if settings.runs > MANY else PER_DECADE)
    at = record_times(steps, per_decade)
    runs: list[Run] = []
    for optimizer in chosen:
        stepped = train(start, problem, optimizer, at, gives_up=settings.runs > 1)
        say(f"{optimizer.name}: {steps} steps of {start.runs} run(s), computed by {stepped.computed_by}")
        dead = set(stepped.dead)
        runs += [
            _judged_steps(settings, problem, optimizer, stepped, run, is_dead=run in dead)
            for run in range(start.runs)
        ]
    return runs


def run_flow(settings: Settings, say: Say) -> list[Run]:
    """Gradient flow, from the start or from where gradient descent is after `join_at` steps.

    Raises:
        InputError: bad input.
    """
    problem, chosen = problem_of(settings), optimizers_of(settings, LR)
    others = [optimizer.name for optimizer in chosen if optimizer.kind != "gd"]
    if others:
        reason = "has no flow here: flow is the limit of gradient descent for small lr"
        raise InputError("optimizer", others[0], reason, allowed="gd", fix="mode=toy, or optimizer=gd")
    if settings.dtype != "float64":
        raise InputError("dtype", settings.dtype, "is for steps", allowed="float64 with mode=flow")
    start = starts.start(settings, problem)
    runs = [_flowed(settings, problem, chosen[0], start.one(run), run) for run in range(start.runs)]
    say(f"flow of {start.runs} run(s) to ln τ = {settings.ln_tau_max:.1f}")
    return runs


def log_time(t: float, optimizer: Chosen, problem: Problem) -> float:
    """ln τ of step t."""
    return math.log(t * optimizer.lr * problem.time_per_lr) if t > 0 else -math.inf


def _judged_steps(
    settings: Settings, problem: Problem, optimizer: Chosen, stepped: Stepped, run: int, *, is_dead: bool
) -> Run:
    times: list[float] = []
    states: list[Nets] = []
    # Of a run that was given up its last state tells all; there may be thousands of them.
    for snapshot in reversed(stepped.snapshots):
        place = int(np.searchsorted(snapshot.ids, run))
        if place < len(snapshot.ids) and snapshot.ids[place] == run:
            times.insert(0, float(snapshot.t))
            states.insert(0, snapshot.nets.one(place))
            if is_dead:
                break
    log_taus = [log_time(t, optimizer, problem) for t in times]
    flag = stepped.flags.get(run)
    out = Run(optimizer.name, run, "dead" if is_dead else "ok")
    out.facts = {
        "lr": optimizer.lr,
        "grad": "log" if optimizer.scale_free else "raw",
        "dtype": settings.dtype,
        "computed_by": stepped.computed_by,
        "steps": int(times[-1]),
        "stagnated_at": flag[0] if flag else None,
        "stagnation": flag[1] if flag else "",
    }
    stop = log_time(flag[0], optimizer, problem) if flag else math.inf
    return judged(out, problem, optimizer, list(zip(times, log_taus, states)), stop)


def _flowed(settings: Settings, problem: Problem, optimizer: Chosen, start: Nets, run: int) -> Run:
    out = Run("gd", run, "ok")
    states: list[tuple[float | None, float, Nets]] = [(0.0, -math.inf, start)]
    net, joined = start, -math.inf
    if settings.join_at is not None:
        at = record_times(settings.join_at, settings.record or PER_DECADE, [settings.join_at // 10])
        stepped = train(start, problem, optimizer, at, gives_up=False)
        states = [(float(s.t), log_time(s.t, optimizer, problem), s.nets) for s in stepped.snapshots]
        net, joined = states[-1][2], states[-1][1]
        out.facts["join"] = _join_check(problem, optimizer, states, settings.join_at)
    if settings.ln_tau_max <= joined:
        reason = f"is before the join at ln τ = {joined:.3f}"
        raise InputError("ln_tau_max", settings.ln_tau_max, reason, fix="ln_tau_max=690.8")
    at_flow = _flow_times(joined, settings.ln_tau_max, settings.record or PER_DECADE_FLOW)
    flowed = flow(net, problem, at_flow, joined)
    shift = math.log(optimizer.lr * problem.time_per_lr)
    states += [
        (_step_of(log_tau - shift), log_tau, state) for log_tau, state in zip(flowed.log_tau, flowed.states)
    ]
    out.facts |= {"lr": optimizer.lr, "dtype": "float64", **_flow_facts(flowed)}
    return judged(out, problem, optimizer, states, math.inf)


def _flow_facts(flowed: Flowed) -> dict[str, object]:
    return {
        "flow_steps": flowed.steps,
        "flow_switches": flowed.switches,
        "flow_steps_near_kinks": flowed.steps_near_kinks,
        "flow_stuck": flowed.stuck,
    }


def _flow_times(joined: float, last: float, per_decade: int) -> list[float]:
    """Powers of ten of τ and steps in between, after the join, and the last time."""
    unit = math.log(10.0) / per_decade
    first = FIRST_DECADE * per_decade
    grid = [n * unit for n in range(first, math.ceil(last / unit) + 1)]
    near = 1e-9 * max(1.0, abs(last))
    return [x for x in grid if joined + near < x < last - near] + [last]


def _join_check(
    problem: Problem, optimizer: Chosen, states: Sequence[tuple[float | None, float, Nets]], join_at: int
) -> dict[str, object]:
    """Flow from a tenth of the steps on, against the steps themselves.

    A step of gradient descent and flow over the same time differ by ½(lr·e^(-u))² in u, in all by
    ½ lr·ln(10)/τ over a decade, the same for both points to leading order; 1/T leaves room for inits with larger
    constants.
    """
    tenth = join_at // 10
    before = next(state for t, _, state in states if t == tenth)
    _, log_tau, after = states[-1]
    flowed = flow(before, problem, [log_tau], log_time(tenth, optimizer, problem))
    if not flowed.states:
        return {"t": join_at, "passed": False, "why": "the gradient vanished"}
    by_flow, by_steps = (
        trajectory.measured(net, problem, None, log_tau)[0]["gap"] for net in (flowed.states[0], after)
    )
    difference = abs(by_flow - by_steps)
    tolerance = max(abs(by_steps), 1e-6) / join_at + 1e-9
    return {
        "t": join_at,
        "ln_tau": log_tau,
        "gap_steps": by_steps,
        "gap_flow": by_flow,
        "difference": difference,
        "tolerance": tolerance,
        "passed": bool(difference <= tolerance),
    }


def _step_of(log_t: float) -> float | None:
    """e^x to 12 digits, so that powers of ten are what they are called; None beyond fp64."""
    return float(f"{math.exp(log_t):.12g}") if log_t < 709.0 else None
