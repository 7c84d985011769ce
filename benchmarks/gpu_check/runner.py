"""Run stages one after the other, each in its own process with its own time limit, and keep what each leaves."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.gpu_check.record import Check, StageRecord
from harness.process import gpu_environment

ROOT = Path(__file__).resolve().parents[2]
_SOURCES = ("optimizers", "harness", "analysis", "benchmarks", "configs", "tests")
_GRACE_S = 3.0
"""For a stage that is aborted to write its last words."""
_TAIL = 400
"""Characters of a crashed stage's last output that go into its record."""


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: as in ``--stages``.
        title: what it is about.
        target: ``module:function`` that takes a `StageContext`.
        limit_s: its time limit.
    """

    name: str
    title: str
    target: str
    limit_s: float


@dataclass(frozen=True)
class Session:
    """How the stages are run.

    Attributes:
        out: folder of the records and the outputs.
        device: "cuda" or "cpu".
        device_name: as the driver reports it: results of another GPU are not kept.
        quick: tiny sizes.
        again: run stages again that have a record of this session's key.
        budget_s: seconds of all stages together.
        say: takes messages.
    """

    out: Path
    device: str
    quick: bool = False
    device_name: str = "cpu"
    again: bool = False
    budget_s: float = 720.0
    say: Callable[[str], None] = print

    @cached_property
    def key(self) -> str:
        """What a record must have in common with this session to be kept: as it is at the start."""
        return f"{sources_sha256()[:16]} {self.device_name} {'quick' if self.quick else 'full'}"

    def path(self, stage: Stage) -> Path:
        """Return the file of a stage's record."""
        return self.out / "stages" / f"{stage.name}.json"


def run(stages: Sequence[Stage], session: Session) -> None:
    """Run the stages that have no record yet; a record is on the disk before the next stage begins.

    A stage whose process crashes, or exceeds its limit, keeps the checks that it had reported, gets a failed one,
    and is not run again unless `Session.again` asks for it. One whose watcher was killed, too, is run again.
    """
    (session.out / "stages").mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + session.budget_s
    key = session.key
    for stage in stages:
        path = session.path(stage)
        before = StageRecord.load(path)
        if not session.again and before and before.key == key and before.status not in ("running", "not run"):
            session.say(f"{stage.name}: kept ({before.status}, {before.seconds:.0f} s)")
            continue
        left = end - time.monotonic()
        if left < min(5.0, stage.limit_s):
            reason = f"the {session.budget_s / 60:g} minutes were over; start again to go on"
            StageRecord(name=stage.name, title=stage.title, key=key, reason=reason).save(path)
            session.say(f"{stage.name}: not run, {reason}")
            continue
        record = run_stage(stage, session, key, min(stage.limit_s, left))
        failed = sum(check.status == "failed" for check in record.checks)
        session.say(
            f"{stage.name}: {record.status}, {len(record.checks)} checks, {failed} failed, {record.seconds:.0f} s"
        )


def run_stage(stage: Stage, session: Session, key: str, limit_s: float) -> StageRecord:
    """Run one stage in a process of its own and return its record, which is on the disk."""
    path, scratch = session.path(stage), session.out / "scratch" / stage.name
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    log = session.out / "stages" / f"{stage.name}.log"
    StageRecord(name=stage.name, title=stage.title, key=key, status="running", limit_s=limit_s).save(path)
    command = [sys.executable, "-m", "benchmarks.gpu_check.worker", stage.target, str(path), str(scratch)]
    command += ["--device", session.device, *(["--quick"] if session.quick else [])]
    begin = time.monotonic()
    with log.open("wb") as output:
        # A session of its own, so that a hanging stage ends together with the processes that it started.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(session.out),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
            _abort(process)
        finally:
            _end(process)
    record = StageRecord.load(path) or StageRecord(name=stage.name, title=stage.title, key=key)
    record.seconds, record.limit_s = time.monotonic() - begin, limit_s
    if code == 0 and record.status == "done":
        record.reason = ""
    else:
        record.status = "timed out" if code is None else "crashed"
        ended = f"took longer than {limit_s:.0f} s" if code is None else _explain(code)
        record.reason = f"{ended}; {_last_words(log)}" if _last_words(log) else ended
        record.checks.append(
            Check(
                name="the stage ends",
                proves="The stage runs to its end within its time limit.",
                status="failed",
                reason=record.reason,
            )
        )
    record.save(path)
    shutil.rmtree(scratch, ignore_errors=True)
    return record


def sources_sha256() -> str:
    """Return a hash of the sources that the check runs."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _environment(out: Path) -> dict[str, str]:
    # The folder of the project before others: the stages are part of it, not of an installed copy.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "PYTHONUNBUFFERED": "1",
        # The allocator's settings of training processes.
        **gpu_environment.of_process(os.environ, out),
    }


def _abort(process: subprocess.Popen[bytes]) -> None:
    """Let a stage that hangs write into its log where it is."""
    process.send_signal(signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a stage's process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _explain(code: int) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # Python's dump of the calls of a stage that crashed or was aborted, innermost first.
    dumps = [number for number, line in enumerate(lines) if line.startswith("Fatal Python error")]
    if dumps:
        return " | ".join(lines[dumps[0] : dumps[0] + 6])[:_TAIL]
    return " | ".join(lines[-4:])[-_TAIL:]
