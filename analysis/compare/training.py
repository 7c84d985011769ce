"""The runs of a comparison, made one after the other. Torch-free: each run trains in processes of its own."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

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
    """All runs of a plan: checked when it is made, trained by `train`."""

    def __init__(self, plan: Plan) -> None:
        """Compose and check every run of every arm; nothing is started.

        Raises:
            InputError: the first thing that is wrong with any of them.
        """
        self._stream = sys.stderr if plan.as_json else sys.stdout
        self._output = sys.stderr if plan.as_json else None
        self._pending: list[Prepared] = []
        for seed in plan.seeds:
            for arm in plan.arms:
                run = prepare(plan.overrides(arm, seed), say=self.say, writes_folder=False)
                self.root: Path = run.folder.parent
                if is_done(run):
                    self.say(f"{run.folder} is finished: not repeated")
                else:
                    self._pending.append(run)
        for run in self._pending:
            run_folder.check(run.folder, run.config, run.identity)

    def say(self, text: str) -> None:
        """A line for the user: on standard output, or on standard error where that is for JSON."""
        print(text, file=self._stream, flush=True)

    def train(self) -> int:
        """Make the runs that are not finished yet; the exit code of the whole."""
        code = FINISHED
        for index, run in enumerate(self._pending, 1):
            self.say(f"[{index}/{len(self._pending)}] {run.folder.name}")
            ended = self._one(run)
            if ended == INTERRUPTED:
                group = shlex.quote(f"group={run.config.group}")
                self.say(f"    interrupted: the same command with {group} goes on from here")
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
        self.say(f"    {state} in {time.monotonic() - started:.1f} s: {result}")
        return {"finished": FINISHED, "interrupted": INTERRUPTED}.get(state, FAILED)


def is_done(run: Prepared) -> bool:
    status = reading.mapping(run.folder / "status.json", [])
    same = status.get("identity") == run.identity and (run.folder / "DONE").exists()
    return same and not run.config.overwrite


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
