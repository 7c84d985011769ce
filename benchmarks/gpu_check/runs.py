"""Runs of the harness for the GPU check: a synthetic corpus, the assembled run, and a log of its steps."""

from __future__ import annotations

import gc
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

from benchmarks.gpu_check.record import StageContext
from benchmarks.gpu_check.trace import Trace
from harness import engines
from harness.loop import Callbacks, Run, train
from harness.preparation import prepare
from harness.run import assemble

LARGE = (
    "model=llama_60m",
    "model.config.vocab_size=32000",
    "batch_size=32",
    "micro_batch_size=32",
    "seq_len=512",
)
SMALL = (
    "model=llama_tiny",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=2",
    "model.config.num_key_value_heads=2",
    "model.config.vocab_size=512",
    "batch_size=4",
    "micro_batch_size=4",
    "seq_len=32",
)
NOTHING_ELSE = (
    "world_size=1",
    "schedule=constant",
    "schedule.warmup=0",
    "moments.every=null",
    "checkpoint.every=null",
    "wandb.mode=disabled",
    "log_every=1000000",
    "eval.every=null",
    "eval.tokens=512",
)
"""Keys of a run that only steps."""


def write_corpus(folder: Path, documents: int = 3000) -> Path:
    """Write a JSON-lines corpus of pseudo-words, always the same, and return its path."""
    path = folder / "documents.jsonl"
    if path.is_file():
        return path
    generator = random.Random(0)
    words = ["".join(generator.choices("abdeiklmnorstuvw", k=generator.randint(2, 8))) for _ in range(400)]
    with path.open("w") as file:
        for _ in range(documents):
            text = " ".join(generator.choices(words, k=generator.randint(20, 300)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def overrides(context: StageContext, *keys: str) -> list[str]:
    """Return the overrides of a run of the check's size; later keys win."""
    corpus = write_corpus(context.folder, 300 if context.quick else 3000)
    base = [
        *(SMALL if context.quick else LARGE),
        *NOTHING_ELSE,
        "precision=bf16",
        "data=jsonl",
        f"data.files=[{corpus}]",
        "data.vocab_size=512",
        "data.validation_tokens=2000",
        f"data.cache_dir={context.folder / 'cache'}",
        f"runs_dir={context.folder / 'runs'}",
    ]
    given = {key.partition("=")[0] for key in keys}
    return [key for key in base if key.partition("=")[0] not in given] + list(keys)


@contextmanager
def assembled(context: StageContext, *keys: str) -> Iterator[Run]:
    """Assemble a run of this process alone, and undo afterwards what it did to the process.

    The run's own stop signals are not installed.
    """
    had_group = dist.is_initialized()
    prepared = prepare(overrides(context, *keys), say=lambda line: None, worker=True, writes_folder=False)
    run = assemble(prepared, engines.start(prepared.config))
    run.stop.restore()
    try:
        yield run
    finally:
        run.loader.close()
        run.engine.release()
        if dist.is_initialized() and not had_group:
            # Sharded engines make a group of one process.
            dist.destroy_process_group()
        del run, prepared
        gc.collect()
        if context.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(context.device)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stamp:
    """A point in time of the device, without a wait for it.

    Args:
        device: a CUDA device, whose current stream is marked, or the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def ms_until(self, other: Stamp) -> float:
        """Return the milliseconds to a later stamp; the device must have passed both."""
        if self._event is None or other._event is None:
            return 1e3 * (other._time - self._time)
        return self._event.elapsed_time(other._event)


@dataclass
class StepLog:
    """Measure the steps of a run: times of all steps, waits of one optimizer step, and a trace of three steps.

    Give it to `harness.loop.Callbacks` as the observer. Nothing in it waits for the device.

    Args:
        run: assembled.
        folder: for the trace.
        traced: number of the step in the middle of the three that are traced; 0 for no trace.
        watched: number of the step whose optimizer step runs in CUDA's sync debug mode.
        splits_memory: keep the peaks before and inside of each optimizer step apart; the run's own are void then.
    """

    run: Run
    folder: Path
    traced: int = 0
    watched: int = 3
    splits_memory: bool = False
    step_stamps: list[Stamp] = field(default_factory=list)
    optimizer_stamps: list[tuple[Stamp, Stamp]] = field(default_factory=list)
    debug_warnings: list[str] = field(default_factory=list)
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    part_peaks: list[tuple[int, int]] = field(default_factory=list)
    """On CUDA, of each step: peak bytes of forward and backward pass, and of the optimizer's step."""
    problem: str = ""
    _begin: Stamp | None = None
    _backward_peak: int = 0

    def __post_init__(self) -> None:
        self._device = self.run.engine.device
        self._path = self.folder / "trace.json"
        self._profiler: Any = None
        if self.traced:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(
                activities=activities,
                schedule=schedule(wait=self.traced - 2, warmup=1, active=3, repeat=1),
                on_trace_ready=lambda p: p.export_chrome_trace(str(self._path)),
                acc_events=True,
            )
        self._hooks = [
            self.run.optimizer.register_step_pre_hook(lambda *_: self._before_update()),
            self.run.optimizer.register_step_post_hook(lambda *_: self._after_update()),
        ]

    def train(self) -> None:
        """Train the run to its end and measure it.

        Raises:
            RuntimeError: the run did not finish.
        """
        if self._profiler is not None:
            self._profiler.start()
        self.step_stamps.append(Stamp(self._device))
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                state = train(self.run, Callbacks(observer=self))
        finally:
            for hook in self._hooks:
                hook.remove()
            if self._profiler is not None:
                self._profiler.stop()
        synchronize(self._device)
        self.debug_warnings = [
            str(entry.message) for entry in caught if "synchronizing CUDA operation" in str(entry.message)
        ]
        if self._device.type == "cuda":
            # A CPU's figure is the resident set with all libraries.
            self.peak_bytes = self.run.memory.peaks()["training"]
            self.reserved_bytes = self.run.memory.reserved()
        if state != "finished":
            raise RuntimeError(f"the run ended as {state}")

    def step(self) -> None:
        """Note the end of a step."""
        self.step_stamps.append(Stamp(self._device))
        if self._profiler is not None:
            self._profiler.step()

    def trace(self) -> Trace:
        """Return the trace of the three steps."""
        return Trace.load(self._path)

    def all_step_ms(self) -> list[float]:
        """Return the milliseconds of every step."""
        return [begin.ms_until(end) for begin, end in pairwise(self.step_stamps)]

    def step_ms(self, *, without: set[int] = frozenset()) -> float:  # type: ignore[assignment]
        """Return the median milliseconds of the steps after the first three, without the traced ones and `without`."""
        spans = self._ordinary(without)
        return statistics.median(self.step_stamps[i].ms_until(self.step_stamps[i + 1]) for i in spans)

    def optimizer_ms(self, *, without: set[int] = frozenset()) -> float:  # type: ignore[assignment]
        """Return the same of the optimizer's step alone."""
        spans = self._ordinary(without)
        return statistics.median(
            begin.ms_until(end) for begin, end in (self.optimizer_stamps[i] for i in spans)
        )

    def _ordinary(self, without: set[int]) -> list[int]:
        left_out = set(without) | {0, 1, 2, self.watched}
        if self.traced:
            left_out |= set(range(self.traced - 2, self.traced + 3))
        done = range(len(self.step_stamps) - 1)
        return [i for i in done if i not in left_out] or list(done)[-1:]

    def _before_update(self) -> None:
        self._backward_peak = self._take_peak()
        if len(self.optimizer_stamps) == self.watched and self._device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        self._begin = Stamp(self._device)

    def _after_update(self) -> None:
        assert self._begin is not None
        torch_mode = len(self.optimizer_stamps) == self.watched and self._device.type == "cuda"
        if torch_mode:
            torch.cuda.set_sync_debug_mode("default")
        self.optimizer_stamps.append((self._begin, Stamp(self._device)))
        if self.splits_memory:
            self.part_peaks.append((self._backward_peak, self._take_peak()))

    def _take_peak(self) -> int:
        """Return the allocator's peak since the last call; 0 on a CPU, and where peaks are not kept apart."""
        if not self.splits_memory or self._device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak


def interleaved_ms(
    calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, float]:
    """Return the median milliseconds of each call over rounds of one call each, after a round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 1):
        for name, call in calls.items():
            synchronize(device)
            begin = time.perf_counter()
            call()
            synchronize(device)
            if round_number:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in times.items()}
