"""Modes `toy` and `flow`: from the configuration to judged runs, their table, notes and headline."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from analysis.formatting import listing, significant
from analysis.margin import starts
from analysis.margin.config import MarginConfig
from analysis.margin.flow import flow
from analysis.margin.net import Nets, ToyProblem
from analysis.margin.optimizer_specs import OptimizerSpec, resolve_spec
from analysis.margin.order import order_over_starts, sentence, share
from analysis.margin.outputs import MarginReport
from analysis.margin.plots import shown_runs, toy_plots
from analysis.margin.points import parse_points
from analysis.margin.steps import TrainResult, record_times, train
from analysis.margin.trajectory import MarginRun, ToyState, TrajectoryRow, judge, measure, value_at_loss
from harness.errors import InputError

LR, STEPS = 0.01, 100_000
PER_DECADE, PER_DECADE_FLOW, MANY = 20, 4, 20
"""States recorded per decade of steps, of flow or many runs, and how many runs are many."""
FIRST_DECADE = -2
"""log₁₀ of the first recorded flow time."""
TABLE_STEPS = (10**3, 10**4, 10**5, 10**6)
TABLE_LOSSES = (-5.0, -10.0, -20.0, -40.0)
"""ln of the loss at which optimizers are compared, next to equal steps."""
ORDER_AT = -5.0
"""ln of the loss at which gaps are compared start by start."""
QUESTION = "How fast does training reach its largest margin, and does the optimizer change it?"
CLASSES = {"log": "C/ln t", "power": "a power of t", "zero": "no gap", "undetermined": "not settled"}
"""Rate class → what the table says."""
PROVED = (
    "Proved by others for two ReLU neurons and two points: gradient descent reaches the optimum, at the rate 1/ln t "
    "exactly (arXiv 2603.02095). Derived here, and checked against steps: the constant C. All else on this page was "
    "observed, from the starts that this page names."
)
Say = Callable[[str], None]


def problem_of(config: MarginConfig) -> ToyProblem:
    """Return points, loss and what is trained.

    Raises:
        InputError: points that nothing separates.
    """
    points = parse_points(list(config.data) if isinstance(config.data, tuple) else config.data, config.dim)
    return ToyProblem(points, config.loss, config.reduction, config.train_v or config.v == "trained")


def optimizers_of(config: MarginConfig, default_lr: float) -> list[OptimizerSpec]:
    """Return the optimizers of a comparison, with their options.

    Raises:
        InputError: unknown names or options; options of an optimizer that is not compared.
    """
    strangers = [name for name in config.options if name and name not in config.optimizer]
    if strangers:
        key = next(iter(config.options[strangers[0]]))
        raise InputError(
            f"{strangers[0]}.{key}",
            config.options[strangers[0]][key],
            "is for an optimizer that does not run",
            fix=f"optimizer={','.join([*config.optimizer, strangers[0]])}",
        )
    specs = []
    for name in config.optimizer:
        options = {**config.options.get("", {}), **config.options.get(name, {})}
        lr = options.pop("lr", config.lr if config.lr is not None else default_lr)
        if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0.0 < lr < math.inf:
            raise InputError(f"{name}.lr", lr, allowed="a number > 0")
        specs.append(resolve_spec(name, float(lr), options, config.grad))
    return specs


def run_toy(config: MarginConfig, say: Say) -> list[MarginRun]:
    """Take optimizer steps from each start and judge the runs.

    Raises:
        InputError: bad input.
    """
    problem, optimizers = problem_of(config), optimizers_of(config, LR)
    start = starts.start(config, problem)
    steps = config.steps or STEPS
    per_decade = config.record or (PER_DECADE_FLOW if config.runs > MANY else PER_DECADE)
    at = record_times(steps, per_decade)
    runs: list[MarginRun] = []
    for optimizer in optimizers:
        stepped = train(start, problem, optimizer, at, gives_up=config.runs > 1)
        say(f"{optimizer.name}: {steps} steps of {start.runs} run(s), computed by {stepped.computed_by}")
        dead = set(stepped.dead)
        runs += [
            _judge_steps(config, problem, optimizer, stepped, run, is_dead=run in dead)
            for run in range(start.runs)
        ]
    return runs


def run_flow(config: MarginConfig, say: Say) -> list[MarginRun]:
    """Follow gradient flow, from the start or from where gradient descent is after `join_at` steps.

    Raises:
        InputError: bad input.
    """
    problem, optimizers = problem_of(config), optimizers_of(config, LR)
    others = [optimizer.name for optimizer in optimizers if optimizer.kind != "gd"]
    if others:
        reason = "has no flow here: flow is the limit of gradient descent for small lr"
        raise InputError("optimizer", others[0], reason, allowed="gd", fix="mode=toy, or optimizer=gd")
    if config.dtype != "float64":
        raise InputError("dtype", config.dtype, "is for steps", allowed="float64 with mode=flow")
    start = starts.start(config, problem)
    runs = [_follow_flow(config, problem, optimizers[0], start.one(run), run) for run in range(start.runs)]
    say(f"flow of {start.runs} run(s) to ln τ = {config.ln_tau_max:.1f}")
    return runs


def log_time(t: float, optimizer: OptimizerSpec, problem: ToyProblem) -> float:
    """Return ln τ of step t."""
    return math.log(t * optimizer.lr * problem.time_per_lr) if t > 0 else -math.inf


def _judge_steps(
    config: MarginConfig,
    problem: ToyProblem,
    optimizer: OptimizerSpec,
    result: TrainResult,
    number: int,
    *,
    is_dead: bool,
) -> MarginRun:
    states: list[ToyState] = []
    # Of a run that was given up its last state tells all; there may be thousands of them.
    for snapshot in reversed(result.snapshots):
        place = int(np.searchsorted(snapshot.ids, number))
        if place < len(snapshot.ids) and snapshot.ids[place] == number:
            log_tau = log_time(snapshot.t, optimizer, problem)
            states.append(ToyState(float(snapshot.t), log_tau, snapshot.nets.one(place)))
            if is_dead:
                break
    states.reverse()
    flag = result.flags.get(number)
    run = MarginRun(optimizer.name, number, "dead" if is_dead else "ok")
    run.facts = {
        "lr": optimizer.lr,
        "grad": "log" if optimizer.scale_free else "raw",
        "dtype": config.dtype,
        "computed_by": result.computed_by,
        "steps": int(states[-1].t or 0),
        "stagnated_at": flag[0] if flag else None,
        "stagnation": flag[1] if flag else "",
    }
    stop = log_time(flag[0], optimizer, problem) if flag else math.inf
    return judge(run, problem, optimizer, states, stop)


def _follow_flow(
    config: MarginConfig, problem: ToyProblem, optimizer: OptimizerSpec, start: Nets, number: int
) -> MarginRun:
    run = MarginRun("gd", number, "ok")
    states = [ToyState(0.0, -math.inf, start)]
    if config.join_at is not None:
        at = record_times(config.join_at, config.record or PER_DECADE, [config.join_at // 10])
        snapshots = train(start, problem, optimizer, at, gives_up=False).snapshots
        states = [ToyState(float(s.t), log_time(s.t, optimizer, problem), s.nets) for s in snapshots]
        run.facts["join"] = _check_join(problem, optimizer, states, config.join_at)
    joined = states[-1].log_tau
    if config.ln_tau_max <= joined:
        reason = f"is before the join at ln τ = {joined:.3f}"
        raise InputError("ln_tau_max", config.ln_tau_max, reason, fix="ln_tau_max=690.8")
    at_flow = _flow_times(joined, config.ln_tau_max, config.record or PER_DECADE_FLOW)
    flowed = flow(states[-1].net, problem, at_flow, joined)
    shift = math.log(optimizer.lr * problem.time_per_lr)
    states += [
        ToyState(_step_of(log_tau - shift), log_tau, net)
        for log_tau, net in zip(flowed.log_tau, flowed.states)
    ]
    run.facts |= {
        "lr": optimizer.lr,
        "dtype": "float64",
        "flow_steps": flowed.steps,
        "flow_switches": flowed.switches,
        "flow_steps_near_kinks": flowed.steps_near_kinks,
        "flow_stuck": flowed.stuck,
    }
    return judge(run, problem, optimizer, states, math.inf)


def _flow_times(joined: float, last: float, per_decade: int) -> list[float]:
    """Return powers of ten of τ and times in between, after the join, and the last time."""
    unit = math.log(10.0) / per_decade
    first = FIRST_DECADE * per_decade
    grid = [n * unit for n in range(first, math.ceil(last / unit) + 1)]
    near = 1e-9 * max(1.0, abs(last))
    return [x for x in grid if joined + near < x < last - near] + [last]


def _check_join(
    problem: ToyProblem,
    optimizer: OptimizerSpec,
    states: Sequence[ToyState],
    join_at: int,
) -> dict[str, object]:
    """Compare flow from a tenth of the steps on with the steps themselves.

    A step of gradient descent and flow over the same time differ by ½(lr·e^(-u))² in u, in all by
    ½ lr·ln(10)/τ over a decade, the same for both points to leading order; 1/T leaves room for inits with larger
    constants.
    """
    tenth = join_at // 10
    before = next(state for state in states if state.t == tenth)
    after = states[-1]
    flowed = flow(before.net, problem, [after.log_tau], log_time(tenth, optimizer, problem))
    if not flowed.states:
        return {"t": join_at, "passed": False, "why": "the gradient vanished"}
    by_flow, by_steps = (
        measure(net, problem, None, after.log_tau)[0]["gap"] for net in (flowed.states[0], after.net)
    )
    difference = abs(by_flow - by_steps)
    tolerance = max(abs(by_steps), 1e-6) / join_at + 1e-9
    return {
        "t": join_at,
        "ln_tau": after.log_tau,
        "gap_steps": by_steps,
        "gap_flow": by_flow,
        "difference": difference,
        "tolerance": tolerance,
        "passed": bool(difference <= tolerance),
    }


def _step_of(log_t: float) -> float | None:
    """Return e^x to 12 digits, so that powers of ten are what they are called; None beyond fp64."""
    return float(f"{math.exp(log_t):.12g}") if log_t < 709.0 else None


def report(config: MarginConfig, runs: Sequence[MarginRun]) -> MarginReport:
    """Return the report of a toy or flow job."""
    order = order_over_starts(runs, ORDER_AT) if config.runs > 1 else []
    return MarginReport(
        runs,
        notes_on(runs),
        headline(runs) + sentence(order),
        scope(config, runs),
        table(runs),
        toy_plots(runs),
        {"order_over_starts": order} if order else {},
        question=QUESTION,
    )


def table(runs: Sequence[MarginRun]) -> list[dict[str, Any]]:
    """Return a row per optimizer: median and quartiles over the runs that separate the points.

    Gaps are taken at equal steps and at equal loss.
    """
    rows = []
    for name in dict.fromkeys(run.optimizer for run in runs):
        own = [run for run in runs if run.optimizer == name]
        alive = [run for run in own if run.status in ("ok", "flat")]
        classes = [run.rate.rate_class for run in alive]
        most = max(sorted(set(classes)), key=classes.count) if classes else None
        ratios = [run.rate.constant / run.predicted for run in alive if run.rate.constant and run.predicted]
        row: dict[str, Any] = {
            "optimizer": name,
            **_shares("separated", len(alive), len(own)),
            "rate": CLASSES[most] if most else None,
            **_shares("of this rate", classes.count(most) if most else 0, len(alive)),
            "C predicted": _median([run.predicted for run in alive]),
            "C fitted": _median([run.rate.constant for run in alive]),
        }
        row |= _spread("C fitted/predicted", ratios) if len(own) > 1 else {}
        for t in TABLE_STEPS:
            row |= _spread(f"gap at step {t:,}", [_at_step(run.rows, t) for run in alive])
        for level in TABLE_LOSSES:
            row |= _spread(
                f"gap at ln L = {level:g}", [value_at_loss(run.rows, level, "gap") for run in alive]
            )
        rows.append(row)
    return rows


def _shares(key: str, count: int, of: int) -> dict[str, float | None]:
    """Return a share of random starts with its interval; None for one start, of which a share says nothing."""
    values = share(count, of) if of > 1 else (None, None, None)
    return dict(zip((key, f"{key} low", f"{key} high"), values))


def notes_on(runs: Sequence[MarginRun]) -> list[str]:
    """Return what a reader must know before believing a number, once per optimizer."""
    notes: list[str] = []
    for run in runs:
        name = run.optimizer
        if run.facts.get("stagnated_at") is not None:
            notes.append(
                f"{name}: from step {run.facts['stagnated_at']} on {run.facts['stagnation']}; "
                "nothing after it is used for a rate"
            )
        join = run.facts.get("join")
        if join and not join["passed"]:
            notes.append(
                f"{name}: flow and steps disagree at step {join['t']}: the learning rate is too large for flow"
            )
        if run.facts.get("flow_stuck"):
            notes.append(f"{name}: every neuron is off, so that flow stops")
        if run.facts.get("note"):
            notes.append(f"{name}: {run.facts['note']}")
    return list(dict.fromkeys(notes))


def headline(runs: Sequence[MarginRun]) -> str:
    """Return a sentence: which optimizer closes the gap at which rate."""
    rows = [row for row in table(runs) if row["rate"]]
    if not rows:
        return "No run separates the points."
    by_rate: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_rate.setdefault(row["rate"], []).append(row)
    parts = []
    for kind, text in (
        ("log", "the gap closes as C/ln t"),
        ("power", "the gap closes as a power of t"),
        ("zero", "no gap"),
        ("undetermined", "no settled rate yet"),
    ):
        if CLASSES[kind] in by_rate:
            members = by_rate[CLASSES[kind]]
            parts.append(
                f"{listing([row['optimizer'] for row in members])}: {text}{_constants(kind, members)}"
            )
    return "; ".join(parts) + "."


def _constants(kind: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the constants of one optimizer with the law C/ln t."""
    if kind != "log" or len(rows) > 1:
        return ""
    (row,) = rows
    ratio = row.get("C fitted/predicted")
    if ratio is not None:
        return f", fitted C over predicted {ratio:.4f} in the median"
    if row["C predicted"] is None:
        return f", C = {row['C fitted']:.4g} fitted"
    return f", C = {row['C predicted']:.4g} predicted and {row['C fitted']:.5g} fitted"


def scope(config: MarginConfig, runs: Sequence[MarginRun]) -> str:
    """Return what was run, and what of it is known."""
    shown = [run for run in shown_runs(runs) if run.status in ("ok", "flat") and run.rows]
    gaps = ", ".join(f"{run.optimizer} {significant(run.rows[-1]['gap'])}" for run in shown)
    last = shown[0].rows[-1] if shown else None
    at = f" Gap at ln τ = {last['ln_tau']:.4g}: {gaps}." if last else ""
    points = shown[0].facts["margin_opt"] if shown else None
    best = f" The optimal margin is {points:g}." if points is not None else ""
    loss = {"exp": "exponential", "logistic": "logistic"}[config.loss]
    return f"{config.mode}, {loss} loss.{best}{at} {PROVED}"


def _at_step(rows: Sequence[TrajectoryRow], t: int) -> float | None:
    return next((row["gap"] for row in rows if row["t"] is not None and abs(row["t"] - t) < 0.5), None)


def _spread(key: str, values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return {key: known[0] if known else None, f"{key} q1": None, f"{key} q3": None}
    low, middle, high = (float(q) for q in np.quantile(known, (0.25, 0.5, 0.75)))
    return {key: middle, f"{key} q1": low, f"{key} q3": high}


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None
