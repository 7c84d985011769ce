"""Runs of a comparison, made one after the other. Torch-free: each run trains in processes of its own."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

from analysis.compare import reading
from analysis.compare.arguments import Plan
from harness.config import compose
from harness.config.errors import InputError
from harness.jobs import launch
from harness.preparation import Prepared, prepare
from harness.record import atomic
from harness.record import folder as run_folder
from harness.record.schema import SCHEMA_VERSION

FINISHED, FAILED, INTERRUPTED = 0, 3, 75


class Session:
    """Runs that are made one after the other, without those that are over already."""

    def __init__(
        self,
        runs: Sequence[Prepared],
        *,
        group: str,
        as_json: bool,
        is_over: Callable[[Prepared], bool] | None = None,
    ) -> None:
        """Check the folders of the runs; nothing is started.

        Args:
            runs: in the order in which they are to be made.
            group: of the command that goes on after an interruption.
            as_json: standard output is for one JSON document.
            is_over: a run that is not to be made again; None: one that finished (`is_done`).

        Raises:
            InputError: a folder that belongs to another run.
        """
        self._group = group
        self._say = speaker(as_json)
        self._output = sys.stderr if as_json else None
        self._pending: list[Prepared] = []
        is_over = is_over or is_done
        for run in runs:
            if is_over(run):
                self._say(f"{run.folder} is {state_of(run)}: not repeated")
            else:
                self._pending.append(run)
        for run in self._pending:
            run_folder.check(run.folder, run.config, run.identity, run.shorter_runs)

    def train(self, after: Callable[[], None] = lambda: None) -> int:
        """Make the runs that are not over yet; the exit code of the whole. ``after`` is called after each of them."""
        code = FINISHED
        for index, run in enumerate(self._pending, 1):
            self._say(f"[{index}/{len(self._pending)}] {run.folder.name}")
            ended = self._one(run)
            after()
            if ended == INTERRUPTED:
                group = shlex.quote(f"group={self._group}")
                self._say(f"    interrupted: the same command with {group} goes on from here")
                return INTERRUPTED
            code = code or ended
        return code

    def _one(self, run: Prepared) -> int:
        started = time.monotonic()
        try:
            outcome = launch.start(run, output=self._output)
            state, reason = outcome.state, outcome.reason
        except InputError as error:
            # Found by the run's own processes only: this run can't be made, the others can.
            state, reason = "failed", str(error)
        except KeyboardInterrupt:
            return INTERRUPTED
        if not (run.folder / "status.json").is_file():
            _record_failed_start(run, state, reason)
        loss = reading.number(reading.mapping(run.folder / "summary.json", []).get("val/loss"))
        result = f"validation loss {loss:.4f}" if state == "finished" else reason
        self._say(f"    {state} in {time.monotonic() - started:.1f} s: {result}")
        return {"finished": FINISHED, "interrupted": INTERRUPTED}.get(state, FAILED)


def prepared(plan: Plan, say: Callable[[str], None]) -> list[Prepared]:
    """All runs of a plan, composed and checked: seeds outside, arms inside.

    Raises:
        InputError: the first thing that is wrong with any of them.
    """
    return [
        prepare(plan.overrides(arm, seed), say=say, writes_folder=False)
        for seed in plan.seeds
        for arm in plan.arms
    ]


def speaker(as_json: bool) -> Callable[[str], None]:
    """Prints a line for the user: on standard output, or on standard error where that is for JSON."""
    return partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)


def is_done(run: Prepared) -> bool:
    """The folder holds this very run, finished, and it is not to be replaced."""
    return bool(state_of(run)) and (run.folder / "DONE").exists() and not run.config.overwrite


def has_ended(run: Prepared) -> bool:
    """As `is_done`, or this very run diverged, as it would again."""
    return is_done(run) or (state_of(run) == "diverged" and not run.config.overwrite)


def state_of(run: Prepared) -> str:
    """State of this very run as its folder tells it; empty if that holds no run, or another one."""
    status = reading.mapping(run.folder / "status.json", [])
    return str(status.get("state", "running")) if status.get("identity") == run.identity else ""


def _record_failed_start(run: Prepared, state: str, reason: str) -> None:
    """Leave a run folder of a run that died before it wrote one: a failure is a row, not a gap."""
    run.folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(run.folder / "config.yaml", compose.to_yaml(run.config))
    now = run_folder.now()
    attempt = {
        "started": now,
        "ended": now,
        "state": state,
        "reason": reason,
        "first_step": 0,
        "last_step": 0,
    }
    status = {
        "schema_version": SCHEMA_VERSION,
        "identity": run.identity,
        "wandb_run_id": None,
        "state": state,
    }
    steps = {"step": 0, "steps": run.config.steps, "updated": now, "attempts": [attempt]}
    atomic.write_json(run.folder / "status.json", {**status, **steps})
