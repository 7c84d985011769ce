"""The record of a run, kept by rank 0: run folder, W&B, log and summary."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from rich.table import Table

from harness import devices, summary
from harness.config import deepspeed_config
from harness.config.schema import ZERO, RunConfig
from harness.errors import first_line
from harness.loop import Run
from harness.preparation import Prepared
from harness.probes import memory
from harness.probes.flops import FORMULA
from harness.profiling import StepProfile
from harness.protocols import CheckpointManager, MetricRow, Sink
from harness.record import certificates
from harness.record.folder import RunFolder
from harness.record.log import Log, ProgressSink
from harness.record.mirror import Mirror
from harness.record.readers import stalled_ranks
from harness.record.wandb import WandbSink
from harness.tasks import task_of

Training = Callable[[Sequence[Sink], StepProfile | None], str]
"""Trains with sinks and a profiler, and returns the state that training ended in."""


class RunRecorder:
    """Rank 0's duties around a run: announce it, take its rows, and write how it ended.

    Args:
        prepared: as prepared.
        run: assembled.
        folder: open.
    """

    def __init__(self, prepared: Prepared, run: Run, folder: RunFolder) -> None:
        self._prepared, self._run, self.folder = prepared, run, folder
        self.log = Log(folder.add_log)
        self.reason = ""
        self.state = "failed"
        self.rows: list[MetricRow] = []
        self._summary: dict[str, object] = {}
        self._warnings: list[str] = []
        self._certificate: dict[str, object] = {}
        self._task = task_of(prepared.config)
        self._facts = self._task.facts(prepared.data)

    def record(self, first_step: int, checkpoints: CheckpointManager, train: Training) -> str:
        """Train after ``first_step`` steps, and record rows, end and summary.

        Args:
            first_step: steps that are done.
            checkpoints: of the run.
            train: called with the sinks of the rows and a profiler or None; returns the state that it ended in.

        Returns:
            The state of the run.
        """
        for shorter in self._prepared.shorter_runs:
            self.log.say(f"continues beyond the {shorter.steps} steps of run {shorter.identity}")
        known = len(self.folder.problems)
        self.rows = self.folder.begin(first_step)
        self.warn_of(self.folder.problems[known:])
        progress = ProgressSink(self.log, self._run.config.steps)
        mirror = self._mirror()
        try:
            with self._profile() as profile:
                state = train([RunFolderSink(self), progress, mirror], profile)
            # A full disk may only refuse now; then the run has failed.
            self.folder.sync_rows()
            if state == "finished" and profile is not None and profile.problem:
                state, self.reason = "failed", f"all steps done, but {profile.problem}"
            self.state = state
        except BaseException as error:
            self.reason = self._describe(error)
            raise
        finally:
            progress.close()
            # Also after an exception: the summary says how far the run came.
            self.reason = self.reason or summary.reason(self.state, self._run, checkpoints.problem)
            self._write_summary()
            if self.state == "interrupted":
                self.folder.ask_to_be_requeued(self._run.state.step)
            mirror.finish(self._summary, exit_code=0 if self.state in ("finished", "interrupted") else 1)
        return self.state

    def announce(self) -> None:
        """Write the facts of a run that are known before its first step, and show them."""
        run, config, data = self._run, self._run.config, self._prepared.data
        self._certificate = certificates.of_run(config)
        self.folder.write_json("parameters.json", run.info.routes)
        if config.engine.name in ZERO:
            self.folder.write_json("deepspeed.json", deepspeed_config.effective(config))
        flops = {
            "formula": FORMULA,
            "per_token": run.info.flops_per_token,
            "peak_per_device": run.info.peak_flops,
        }
        self.folder.write_json(
            "environment.json",
            {
                **devices.environment(run.engine.device, run.engine.world_size),
                "processes": list(run.devices),
                "engine": run.engine.name,
                "corpus_sha256": data.sha256,
                "tokenizer_sha256": data.tokenizer_sha256,
                "flops": flops,
                "certificate": self._certificate,
            },
        )
        self.log.show(_routes_table(run))
        self._warnings = [*self._task.warnings(data), *summary.warnings(run, self._facts)]
        if uncertified := certificates.warning(self._certificate):
            self._warnings.append(uncertified)
        self.log.say(
            f"{config.model.name}{_origin(config)}: {run.info.parameters:,} parameters, "
            f"{config.precision}{' with TF32 products' if config.tf32 else ''}, "
            f"{run.engine.world_size} process(es) on {devices.device_name(run.engine.device)} ({run.engine.name}); "
            f"{config.steps} steps of {config.batch_size}×{config.seq_len} tokens; "
            f"lr {config.optimizer.lr:g} ({config.optimizer.lr_source})"
        )
        self.log.say(self._task.describe(config, data))
        for note in run.info.notes:
            self.log.say(note)
        self.warn_of(self._warnings)

    def warn_of(self, problems: Sequence[str]) -> None:
        """Log each problem as a warning."""
        for problem in problems:
            self.log.say(f"warning: {problem}")

    def _describe(self, error: BaseException) -> str:
        """Return what happened, in one line."""
        if memory.is_out_of_memory(error):
            reason = memory.explain_out_of_memory(self._run)
            self.log.say(reason)
            return reason
        reason = first_line(error)
        # Where another rank hangs or died, this rank's error only names the connection that broke.
        stalled = stalled_ranks(self._prepared.folder)
        return f"{stalled}; then {reason}" if stalled else reason

    @contextlib.contextmanager
    def _profile(self) -> Iterator[StepProfile | None]:
        if not self._run.config.profile:
            yield None
            return
        profile = StepProfile(self.folder.path, self._run.engine.device, self.log.say)
        profile.start()
        try:
            yield profile
        finally:
            profile.stop()

    def _mirror(self) -> Mirror:
        """Start the W&B run, which gets the rows that the folder holds from before."""
        folder, prepared = self.folder, self._prepared
        if folder.wandb_run_id is None:
            folder.wandb_run_id = f"{prepared.identity[:8]}{int(time.time()):x}"
        facts = {
            "identity": prepared.identity,
            "comparison_key": prepared.comparison_key,
            "parameters": self._run.info.parameters,
            **{name: self._facts[name] for name in ("unigram_entropy",) if name in self._facts},
            "certificate": self._certificate,
        }
        open_sink = partial(
            WandbSink, self._run.config, folder.path, folder.wandb_run_id, facts, self.log.say
        )
        # W&B may lack rows that a killed attempt had not sent yet.
        mirror = Mirror(open_sink, self.rows)
        folder.set_state("running", step=self._run.state.step)
        return mirror

    def _write_summary(self) -> None:
        self._summary = summary.build(
            self._prepared,
            self._run,
            rows=self.rows,
            state=self.state,
            reason=self.reason,
            warnings=self._warnings,
            resumed_from=self.folder.resumed_from,
            extended_from=self.folder.extended_from,
        )
        self.folder.write_json("summary.json", self._summary)


class RunFolderSink:
    """The sink that writes the run folder."""

    def __init__(self, recorder: RunRecorder) -> None:
        self._recorder = recorder

    def write(self, row: MetricRow) -> None:
        self._recorder.rows.append(row)
        self._recorder.folder.add_row(row)
        # status.json tells others the step without reading all rows.
        self._recorder.folder.set_state("running", step=int(row["step"] or 0))


@contextlib.contextmanager
def recording(prepared: Prepared, run: Run) -> Iterator[RunRecorder]:
    """Open the run folder; whatever happens inside, status.json says afterwards how the run ended."""
    folder = RunFolder(prepared.folder, prepared.config, prepared.identity, prepared.shorter_runs)
    recorder = RunRecorder(prepared, run, folder)
    try:
        # First, because choosing a checkpoint may end the run.
        recorder.warn_of(folder.problems)
        yield recorder
    except BaseException as error:
        recorder.state = "failed"
        recorder.reason = recorder.reason or first_line(error)
        folder.add_log(traceback.format_exc())
        raise
    finally:
        folder.end(recorder.state, step=run.state.step, reason=recorder.reason)


def _routes_table(run: Run) -> Table:
    routes = run.info.routes
    title = f"{run.config.optimizer.name}: which parameter takes which rule"
    table = Table(title=title, title_justify="left")
    for column in ("rule", "parameters", "numbers", "e.g."):
        table.add_column(column, justify="right" if column in ("parameters", "numbers") else "left")
    for rule in dict.fromkeys(str(route["rule"]) for route in routes):
        own = [route for route in routes if route["rule"] == rule]
        numbers = sum(int(str(route["numel"])) for route in own)
        table.add_row(rule, str(len(own)), f"{numbers:,}", str(own[0]["name"]))
    return table


def _origin(config: RunConfig) -> str:
    """Return where weights come from that are not random, for the log."""
    path = config.model.path
    return "" if path is None else f" ({config.model.model_type}, weights from {path})"
