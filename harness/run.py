"""One run from its parts to its record."""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import torch
from rich.table import Table

from harness import engines, memory_errors, model, schedule
from harness.checkpoint import resuming
from harness.checkpoint.saving import Checkpoints
from harness.checkpoint.store import Store
from harness.clock import Clock
from harness.config import deepspeed_config, durations, evaluation_budget
from harness.config.engine_checks import ZERO
from harness.config.schema import RunConfig
from harness.data import Batches, Validation
from harness.devices import device_name
from harness.engines import Engine
from harness.feed import Feed
from harness.loop import Run, Whole, train
from harness.optimizer import build_optimizer, ownership, shard_axes
from harness.preparation import Prepared
from harness.probes.balance import Balance
from harness.probes.flops import FORMULA, FlopCount
from harness.probes.memory import MemoryMeter
from harness.probes.moments import Moments
from harness.probes.throughput import Progress
from harness.probes.validation import Evaluation
from harness.process.heartbeat import Heartbeat
from harness.process.stop import Stop
from harness.profiling import StepProfile
from harness.record import certificates, environment, summary
from harness.record.folder import Row, RunFolder
from harness.record.log import Log, ProgressSink
from harness.record.readers import stalled_ranks
from harness.record.wandb import WandbSink
from harness.spikes import SpikeGuard


def execute(prepared: Prepared) -> str:
    """Train as prepared; returns the state in which the run ended. All processes call it.

    Raises:
        InputError: what only shows once the model exists; nothing was trained.
    """
    engine = engines.start(prepared.config)
    run = assemble(prepared, engine)
    if engine.rank != 0:
        keeper, choice = _keeper(run, prepared, attempt=0, say=_to_stderr)
        resuming.resume(run, keeper.store, choice, lambda line: None)
        state = train(run)
    else:
        with _recording(prepared, run) as recorder:
            state = recorder.train()
    if run.heartbeat is not None:
        run.heartbeat.stop()
    # Not after an exception: the other processes are elsewhere then, and waiting for them would hide it.
    engine.close()
    return state


def _keeper(
    run: Run, prepared: Prepared, *, attempt: int, say: Callable[[str], None]
) -> tuple[Checkpoints, resuming.Choice]:
    """Hang the checkpoints on a run and find the one to go on from (a collective)."""
    run.engine.bound_waiting()
    store = Store(prepared.folder)
    choice = resuming.choose(
        run, store, identity=prepared.identity, attempt=attempt, shorter_runs=prepared.shorter_runs
    )
    if run.engine.rank == 0:
        store.set_aside(choice.attempt - 1, after=-1 if choice.step is None else choice.step)
    # Only now: rank 0 has opened the folder, which must be its own, or empty, until then.
    run.heartbeat = Heartbeat(prepared.folder, run.engine.rank)
    run.heartbeat.start()
    keeper = run.checkpoints = Checkpoints(run, prepared, choice.attempt, say, saved_step=choice.step)
    return keeper, choice


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def assemble(prepared: Prepared, engine: Engine) -> Run:
    """Build model, optimizer and data, and hang the probes on them."""
    config, corpus = prepared.config, prepared.corpus
    assert config.micro_batch_size is not None
    network = model.build(
        config.model,
        seed=config.seed,
        precision=config.precision,
        device=str(engine.device),
        trust_remote_code=config.trust_remote_code,
    )
    # From here on the processes draw different numbers (dropout): their rows are different, too.
    torch.manual_seed(config.seed * 1_000_003 + engine.rank + 1)
    parameters = model.count_parameters(network)
    flops = FlopCount.of(
        network,
        seq_len=config.seq_len,
        precision=config.precision,
        device=engine.device,
        peak_flops=config.peak_flops,
    )
    if engine.layout == "sharded":
        engine.shard(network, shard_axes(config, network, engine.shards))
    optimizer = build_optimizer(config, network, engine)
    whole = Whole(parameters, ownership(optimizer, network), flops)
    if config.model.compile:
        network.compile()
    engine.prepare(network, optimizer)
    batches = Batches(corpus, seq_len=config.seq_len, seed=config.seed, mode=config.data.mode)
    validation = Validation(corpus, seq_len=config.seq_len, mode=config.data.mode)
    feed = Feed(
        batches,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        rank=engine.rank,
        world_size=engine.world_size,
        device=engine.device,
    )
    factor = schedule.factor(config.schedule, config.steps)
    stop = Stop(durations.seconds("time_limit", config.time_limit))
    run = Run(config, engine, network, whole, optimizer, factor, feed, Clock(engine.device), stop)
    if config.max_loss_rise is not None:
        run.spikes = SpikeGuard(engine, config.max_loss_rise)
    run.probes = [
        Evaluation(run, validation),
        Moments(run),
        Balance(run),
        Progress(run, MemoryMeter(engine, optimizer)),
    ]
    run.stop.install()
    return run


class _Recorder:
    """Rank 0's duties around a run: the folder, W&B, the log, the summary."""

    def __init__(self, prepared: Prepared, run: Run, folder: RunFolder) -> None:
        self.prepared, self.run, self.folder = prepared, run, folder
        self.log = Log(folder.add_log)
        self.reason = ""
        self.state = "failed"
        self.rows: list[Row] = []
        self.facts: dict[str, object] = {}
        self.warnings: list[str] = []

    def train(self) -> str:
        """Announce, train, and note how it ended."""
        run = self.run
        store = Store(self.folder.path)
        store.discard_partial()
        for problem in self.folder.problems:
            self.log.say(f"warning: {problem}")
        keeper, choice = _keeper(run, self.prepared, attempt=self.folder.attempt, say=self.log.say)
        self._announce(run)
        first_step = resuming.resume(run, keeper.store, choice, self.log.say)
        for shorter in self.prepared.shorter_runs:
            self.log.say(f"goes on beyond the {shorter.steps} steps of run {shorter.identity}")
        known = len(self.folder.problems)
        self.rows = self.folder.begin(first_step)
        for problem in self.folder.problems[known:]:
            self.log.say(f"warning: {problem}")
        progress = ProgressSink(self.log, run.config.steps)
        mirror = self._mirror(run)
        run.sinks = [_Keeper(self), progress, mirror]
        try:
            with self._profiled(run):
                state = train(run)
            self.folder.sync_rows()
            if state == "finished" and run.observer is not None and run.observer.problem:
                state, self.reason = "failed", f"all steps done, but {run.observer.problem}"
            self.state = state
        except BaseException as error:
            self.reason = self._told(error)
            raise
        finally:
            progress.close()
            self.reason = self.reason or summary.reason(self.state, run)
            self._sum_up(run)
            if self.state == "interrupted":
                self.folder.ask_to_be_requeued(run.ledger.step)
            mirror.finish(self.facts, exit_code=0 if self.state in ("finished", "interrupted") else 1)
        return self.state

    def _told(self, error: BaseException) -> str:
        """What happened, in one line."""
        if memory_errors.is_one(error):
            reason = memory_errors.explained(self.run)
            self.log.say(reason)
            return reason
        reason = _first_line(error)
        late = stalled_ranks(self.prepared.folder)
        return f"{late}; then {reason}" if late else reason

    @contextlib.contextmanager
    def _profiled(self, run: Run) -> Iterator[None]:
        if not run.config.profile:
            yield
            return
        profiler = run.observer = StepProfile(self.folder.path, run.engine.device, self.log.say)
        profiler.start()
        try:
            yield
        finally:
            profiler.stop()

    def _announce(self, run: Run) -> None:
        config, corpus = run.config, self.prepared.corpus
        routes, flops = run.whole.ownership, run.whole.flops
        certificate = certificates.of_run(config)
        self.folder.write_json("parameters.json", routes)
        if config.engine.name in ZERO:
            self.folder.write_json("deepspeed.json", deepspeed_config.effective(config))
        self.folder.write_json(
            "environment.json",
            {
                **environment.describe(run.engine.device, run.engine.world_size),
                "engine": run.engine.name,
                "corpus_sha256": corpus.sha256,
                "tokenizer_sha256": corpus.tokenizer_sha256,
                "flops": {"formula": FORMULA, "per_token": flops.per_token, "peak_per_device": flops.peak},
                "certificate": certificate,
            },
        )
        table = Table(
            title=f"{config.optimizer.name}: which parameter takes which rule", title_justify="left"
        )
        for column in ("rule", "parameters", "numbers", "e.g."):
            table.add_column(column, justify="right" if column in ("parameters", "numbers") else "left")
        for rule in dict.fromkeys(str(route["rule"]) for route in routes):
            mine = [route for route in routes if route["rule"] == rule]
            table.add_row(
                rule, str(len(mine)), f"{sum(int(str(r['numel'])) for r in mine):,}", str(mine[0]["name"])
            )
        self.log.show(table)
        self.warnings = summary.warnings(run, corpus)
        if uncertified := certificates.warning(certificate):
            self.warnings.append(uncertified)
        self.log.say(
            f"{config.model.name}{_origin(config)}: {run.whole.parameters:,} parameters, {config.precision}, "
            f"{run.engine.world_size} process(es) on {device_name(run.engine.device)} ({run.engine.name}); "
            f"{config.steps} steps of {config.batch_size}×{config.seq_len} tokens; "
            f"lr {config.optimizer.lr:g} ({config.optimizer.lr_source})"
        )
        self.log.say(
            f"corpus {corpus.sha256[:12]}: {corpus.train_tokens:,} training tokens, unigram entropy "
            f"{corpus.unigram_entropy:.3f} nats; evaluation on {evaluation_budget.tokens(config):,} tokens"
            f"{corpus.left_out}"
        )
        for warning in self.warnings:
            self.log.say(f"warning: {warning}")

    def _mirror(self, run: Run) -> WandbSink:
        if self.folder.wandb_run_id is None:
            self.folder.wandb_run_id = f"{self.prepared.identity[:8]}{int(time.time()):x}"
        keys = {
            "identity": self.prepared.identity,
            "comparison_key": self.prepared.comparison_key,
            "parameters": run.whole.parameters,
            "unigram_entropy": self.prepared.corpus.unigram_entropy,
            "certificate": certificates.of_run(run.config),
        }
        mirror = WandbSink(run.config, self.folder.path, self.folder.wandb_run_id, keys, self.log.say)
        mirror.catch_up(self.rows)
        self.folder.set_state("running", step=run.ledger.step)
        return mirror

    def _sum_up(self, run: Run) -> None:
        self.facts = summary.build(
            self.prepared,
            run,
            rows=self.rows,
            state=self.state,
            reason=self.reason,
            warnings=self.warnings,
            resumed_from=self.folder.resumed_from,
            extended_from=self.folder.extended_from,
        )
        self.folder.write_json("summary.json", self.facts)


class _Keeper:
    """The sink that writes the run folder."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder

    def write(self, row: Row) -> None:
        self._recorder.rows.append(row)
        self._recorder.folder.add_row(row)
        self._recorder.folder.set_state("running", step=int(row["step"] or 0))


@contextlib.contextmanager
def _recording(prepared: Prepared, run: Run) -> Iterator[_Recorder]:
    """The run folder, open; whatever happens inside, it says afterwards how the run ended."""
    folder = RunFolder(prepared.folder, prepared.config, prepared.identity, prepared.shorter_runs)
    run.folder = folder.path
    recorder = _Recorder(prepared, run, folder)
    try:
        yield recorder
    except BaseException as error:
        recorder.state = "failed"
        recorder.reason = recorder.reason or _first_line(error)
        folder.add_log(traceback.format_exc())
        raise
    finally:
        folder.end(recorder.state, step=run.ledger.step, reason=recorder.reason)


def _origin(config: RunConfig) -> str:
    """Where weights come from that are not random, for the log."""
    path = config.model.path
    return "" if path is None else f" ({config.model.model_type}, weights from {path})"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
