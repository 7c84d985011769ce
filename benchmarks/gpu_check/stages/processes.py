"""Stage 10: more processes than GPUs, and with two GPUs (or on CPUs): equal weights, and a rank that hangs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.gpu_check.record import StageContext
from benchmarks.gpu_check.runner import ROOT
from benchmarks.gpu_check.runs import overrides
from harness import export, model
from harness.checkpoint.store import CONFIG
from harness.config import checks, compose
from harness.process.gpu_environment import FLIGHT_RECORDER
from harness.record import readers

REFUSED = (
    "Two processes on one GPU are refused in one line that says what to type, before anything is trained."
)
EQUAL = "Two processes give the weights of one process to 2e-3 of their change in 4 steps of fp32."
HANGS = "A rank that hangs ends the other one within its time-out, and the record names the reason."
TOLERANCE = 2e-3
"""Relative to the change of the weights; TF32 is off, but reductions of another order meet AdamW's first steps."""
_HANG_LIMIT_S = 60.0
_UNDER_WAY = 10
"""Steps after which a rank is stopped."""


def run(context: StageContext) -> None:
    """Check what this machine allows."""
    with context.attempt("one GPU, two processes", REFUSED):
        _refusal(context)
    enough = not context.is_cuda or torch.cuda.device_count() >= 2
    one: dict[str, torch.Tensor] = {}
    for engine in ("ddp", "fsdp2"):
        name = f"{engine}: weights of two processes"
        if enough:
            with context.attempt(name, EQUAL):
                one = one or trained_weights(context, 1, "single")
                error = largest_error(context, one, trained_weights(context, 2, engine))
                context.check(name, EQUAL, error <= TOLERANCE, {"error": error})
        else:
            context.not_run(name, EQUAL, "needs two GPUs")
    if enough:
        with context.attempt("a rank that hangs", HANGS):
            _hang(context)
    else:
        context.not_run("a rank that hangs", HANGS, "needs two GPUs")


def _refusal(context: StageContext) -> None:
    if not context.is_cuda:
        context.not_run("one GPU, two processes", REFUSED, "needs CUDA")
        return
    ended = _train(context, "world_size=2", "engine=ddp", "steps=2", CUDA_VISIBLE_DEVICES="0")
    message = (ended.stderr.strip().splitlines() or [""])[-1]
    named = "one process needs one GPU" in message
    figures = {"exit_code": ended.returncode, "message": message[:300]}
    context.check("one GPU, two processes", REFUSED, ended.returncode == 2 and named, figures)


def trained_weights(context: StageContext, processes: int, engine: str) -> dict[str, torch.Tensor]:
    """Return the weights after four steps."""
    micro = 2 if context.quick else 8
    keys = _keys(engine, processes, engine)
    keys += ["steps=4", f"batch_size={4 * micro}", f"micro_batch_size={micro}"]
    ended = _train(context, *keys)
    if ended.returncode:
        raise RuntimeError(f"{engine} ended with {ended.returncode}: {ended.stderr.strip()[-300:]}")
    source = export.find(context.folder / "runs" / "default" / engine)
    loaded = export.load(source.folder, compose.load_file(source.folder / CONFIG))
    return {name: p.detach() for name, p in loaded.named_parameters()}


def largest_error(context: StageContext, one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of a parameter, relative to its change since the start."""
    config = checks.check(compose.load(overrides(context, *_keys("start", 1, "single"))), environ={})
    start = model.build(config.model, seed=config.seed, precision="fp32").state_dict()
    return max(
        float((two[name] - weight).norm() / (weight - start[name]).norm().clamp(min=1e-12))
        for name, weight in one.items()
    )


def _keys(name: str, processes: int, engine: str) -> list[str]:
    return [
        f"name={name}",
        f"world_size={processes}",
        f"engine={engine}",
        "precision=fp32",
        "optimizer=sumo",
        "optimizer.rank=8",
        "checkpoint.every=auto",
    ]


def _hang(context: StageContext) -> None:
    folder = context.folder / "runs" / "default" / "hangs"
    limit = 20
    keys = overrides(
        context,
        *_keys("hangs", 2, "ddp"),
        "steps=100000",
        "micro_batch_size=2",
        f"engine.timeout_s={limit}",
        "log_every=5",
    )
    command = [sys.executable, "-m", "harness.cli", "train", *keys]
    with (context.folder / "hangs.log").open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=_environ(context), stdout=output, stderr=output)
        try:
            _wait_for_step(folder, process, context.folder / "hangs.log")
            stopped = _rank(process.pid, 1)
            begin = time.monotonic()
            stopped.suspend()
            try:
                code = process.wait(limit + _HANG_LIMIT_S)
            finally:
                # The launcher may have ended it already.
                with contextlib.suppress(psutil.NoSuchProcess):
                    stopped.kill()
            seconds = time.monotonic() - begin
        finally:
            for child in (
                psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            ):
                child.kill()
            process.kill()
            process.wait()
    status, _ = readers.status(folder)
    reason = str(status.attempts[-1].reason if status and status.attempts else "")
    figures: dict[str, Any] = {
        "seconds": seconds,
        "exit_code": code,
        "reason": reason[:300],
        "flight_records": len(list(folder.glob(f"{FLIGHT_RECORDER}/*"))),
    }
    is_explained = any(word in reason for word in ("engine.timeout_s", "abort", "rank 1"))
    context.check("a rank that hangs", HANGS, code not in (0, None) and is_explained, figures)


def _wait_for_step(folder: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a run is under way."""
    until = time.monotonic() + 2 * _HANG_LIMIT_S
    while time.monotonic() < until and process.poll() is None:
        status, _ = readers.status(folder)
        if status and status.step and status.step >= _UNDER_WAY:
            return
        time.sleep(0.2)
    raise TimeoutError(f"the run did not come to step {_UNDER_WAY}: {log.read_text(errors='replace')[-300:]}")


def _rank(launcher: int, rank: int) -> psutil.Process:
    """Return the process of a rank below a launcher.

    Raises:
        LookupError: there is none.
    """
    for child in psutil.Process(launcher).children(recursive=True):
        # A fork keeps its server's environment in /proc, and has the rank in its name (`harness.jobs.fork_server`).
        if child.name() == f"optbench-rank{rank}" or child.environ().get("RANK") == str(rank):
            return child
    raise LookupError(f"no process of rank {rank}")


def _train(context: StageContext, *keys: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "harness.cli", "train", *overrides(context, *keys)]
    return subprocess.run(
        command, cwd=ROOT, env={**_environ(context), **environ}, capture_output=True, text=True
    )


def _environ(context: StageContext) -> dict[str, str]:
    return {**os.environ, **({} if context.is_cuda else {"ACCELERATE_USE_CPU": "true"})}
