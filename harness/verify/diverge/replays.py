"""What a rank process does for `optbench diverge`: the first steps of a run, or of a twin of it, with a recorder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from harness import engines
from harness.loop import Callbacks, Run, mean_losses, train_step
from harness.preparation import prepare
from harness.protocols import MetricRow
from harness.run import assemble
from harness.verify.controls import DEFECTS, Defect
from harness.verify.diverge.trajectory import Trajectory, sketch
from harness.verify.step_recorder import StepRecorder
from harness.verify.twins import Twin, make_twin


class TrajectoryRecorder:
    """A probe of every step that records a `Trajectory`; on rank 0, others record no weights.

    Args:
        run: assembled; its weights are the first entry.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.trajectory = Trajectory()
        self._record(0)

    def _record(self, step: int) -> None:
        weights = self._run.engine.full_weights()
        self.trajectory.sketches[step] = {name: sketch(name, weight) for name, weight in weights.items()}

    def due(self, step: int) -> bool:
        """Return True: every step is recorded."""
        return True

    def before_update(self, step: int) -> None:
        """Do nothing: the figures are read after the step."""

    def state(self) -> dict[str, Any]:
        """Return nothing: replays are not resumed."""
        return {}

    def restore(self, state: dict[str, Any], steps: int) -> None:
        """Do nothing: replays are not resumed."""

    def measure(self, step: int, row: MetricRow) -> None:
        """Record what a step left (a collective)."""
        self.trajectory.tokens[step + 1] = self._run.state.loss_tokens
        self.trajectory.losses[step + 1] = mean_losses(self._run)["train/loss"]
        norm = self._run.state.grad_norm
        assert norm is not None
        self.trajectory.gradient_norms[step + 1] = float(norm)
        self._record(step + 1)


def replay(words: Sequence[str], steps: int, twin: Twin | None = None, control: str = "") -> Trajectory:
    """Train the first steps of a run in this process (a collective), and return what rank 0 recorded.

    Args:
        words: overrides of the run.
        steps: to train; the schedule is that of the whole run.
        twin: how to differ from the run; None: not at all.
        control: name of a defect (`harness.verify.controls`) that is put in; "": none.
    """
    prepared = prepare(words, say=lambda text: None, worker=True, writes_folder=False)
    defect = DEFECTS[control] if control else Defect()
    with defect.around():
        run = assemble(prepared, engines.start(prepared.config))
        run.stop.restore()
        try:
            if twin is not None:
                make_twin(run, twin)
            recorder = TrajectoryRecorder(run)
            defect.change(run, cast(StepRecorder, recorder))
            callbacks = Callbacks([recorder])
            for step in range(steps):
                due = callbacks.before_step(step)
                train_step(run, callbacks, step, due)
                callbacks.after_step(run, step, due)
        finally:
            run.loader.close()
            run.engine.release()
    return recorder.trajectory
