"""When a checkpoint is due, and writing it while training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.checkpoint import agreement, files, parts, progress, store
from harness.checkpoint.progress import Randomness
from harness.checkpoint.store import DamagedCheckpoint, Retention, Store
from harness.config.compose import to_yaml
from harness.config.schema import RunConfig
from harness.files import atomic
from harness.loop import Run, settle
from harness.preparation import Prepared
from harness.schedule import length
from optimizers.named_state import StatePiece

EVERY_S = 900.0
"""Seconds of training between checkpoints with ``checkpoint.every=auto``."""
LAST_TRIES = 2
"""How often the last step is tried to be saved."""
RETRY_S = 1.0
"""Seconds between these tries: a quota or a full disk may have changed meanwhile."""
_HEADROOM = 1.05
"""Free space asked for, over what the tensors take: headers, block sizes, a metrics file that grows meanwhile."""


@dataclass
class _Write:
    """A checkpoint that is being written."""

    step: int
    folder: Path
    manifest: dict[str, Any]
    thread: threading.Thread | None
    began: float
    problem: str = ""


class Checkpoints:
    """Keeps the checkpoints of one run; every process has one and calls it at the same points of the loop.

    A save copies this process' part to host memory, and from there a thread writes it; the next steps do not wait.
    When all processes are done, which the loop's vote tells, rank 0 gives the checkpoint its name. A save that
    fails (full disk, unreadable folder) is said, and the run goes on; older checkpoints are not touched. The last
    step is tried again (`LAST_TRIES`); what still fails then is the run's `problem`.

    Args:
        run: assembled.
        prepared: as prepared; its folder is the same for all processes.
        attempt: number of this attempt, the same for all processes.
        say: where this process' messages go.
        saved_step: step of the checkpoint that the run goes on from; None: it begins.
    """

    def __init__(
        self,
        run: Run,
        prepared: Prepared,
        attempt: int,
        say: Callable[[str], None],
        *,
        saved_step: int | None = None,
    ) -> None:
        self._run, self._say, self._attempt = run, say, attempt
        self._facts = {
            "identity": prepared.identity,
            "comparison_key": prepared.comparison_key,
            "corpus_sha256": prepared.corpus.sha256,
            "attempt": attempt,
            "engine": run.engine.name,
            "world_size": run.engine.world_size,
        }
        self.store = Store(prepared.folder)
        config = run.config.checkpoint
        self._every, self._background = config.every, config.background
        self._before_decay = _before_decay(run.config)
        pinned = frozenset() if self._before_decay is None else frozenset({self._before_decay})
        self._retention = Retention(config.keep, config.keep_best, config.keep_every, pinned)
        self._last_began = time.monotonic()
        self._last_step: int | None = None
        """Of the last save that began."""
        self._saved_step = saved_step
        """Of the last save that got its name, the same on all processes."""
        self._reason = ""
        """Why the last save failed, the same on all processes."""
        self.problem = ""
        self._writing: _Write | None = None
        self._buffers: dict[tuple[str, str, int], Tensor] = {}
        self._randomness: Randomness | None = None
        self._tries = 0
        self.duration_s = 0.0
        """From the beginning of the last save to its name."""
        self.waited_s = 0.0
        """How long training waited for the last save."""

    def before_step(self) -> None:
        """Remember the random states that a stop before this step's update would need."""
        self._randomness = Randomness.now(self._run.engine.device)

    @property
    def is_wanted(self) -> bool:
        """Whether this process' clock asks for a checkpoint: rank 0's alone, or they would not agree."""
        is_due = self._every == "auto" and time.monotonic() - self._last_began >= EVERY_S
        return is_due and self._run.engine.rank == 0

    @property
    def is_writing(self) -> bool:
        """Whether this process is still writing."""
        thread = self._writing.thread if self._writing else None
        return thread is not None and thread.is_alive()

    def after_step(self, *, wanted: bool, writing: bool) -> None:
        """Save where it is due, and name what has been written.

        Args:
            wanted: any process wanted a checkpoint, as the vote said.
            writing: any process was still writing.
        """
        ledger = self._run.ledger
        # Two steps on, the vote was cast after that save had begun.
        if self._writing is not None and not writing and ledger.step >= self._writing.step + 2:
            self._name()
        due = isinstance(self._every, int) and ledger.step % self._every == 0
        due = due or (self._every is not None and ledger.step == self._before_decay)
        if due or (wanted and wish_stands(self._last_step, ledger.step)):
            settle(self._run)
            with self._run.clock.part("probes"):
                self.save(Randomness.now(self._run.engine.device), background=self._background)

    def stop(self) -> None:
        """Save the steps that are done before the processes end."""
        self._save_last()

    def finish(self) -> None:
        """Save the last step, unless nobody wants checkpoints (``checkpoint.every=null``)."""
        if self._every is None:
            self._name()
        else:
            self._save_last()

    def _save_last(self) -> None:
        ledger = self._run.ledger
        self._name()
        for number in range(LAST_TRIES):
            if self._saved_step == ledger.step:
                return
            if number:
                time.sleep(RETRY_S)
            if ledger.step == self._run.config.steps:
                randomness = Randomness.now(self._run.engine.device)
            else:
                # The step that was broken off has drawn numbers since.
                assert self._randomness is not None
                randomness = self._randomness
            # As a probe's time, should the run be gone on with: it is no training.
            with self._run.clock.part("probes"):
                self.save(randomness, background=False)
        if self._saved_step != ledger.step:
            goes_on = "the beginning" if self._saved_step is None else f"step {self._saved_step}"
            self.problem = (
                f"the checkpoint of step {ledger.step} could not be written ({self._reason}); "
                f"the same command goes on from {goes_on}"
            )

    def save(self, randomness: Randomness, *, background: bool) -> None:
        """Write a checkpoint of the steps that are done (a collective).

        Args:
            randomness: random states of this process right after the last of them.
            background: return once the numbers are copied.
        """
        self._name()
        run, began = self._run, time.monotonic()
        self._last_began = began
        pieces = [p for p in (*parts.weights(run), *parts.state(run)) if p.is_primary and p.tensor.numel()]
        if self._lacks_space(pieces):
            return
        self._tries += 1
        partial = self.store.partial(run.ledger.step, f"{self._attempt}-{self._tries}")
        facts = progress.facts(run)
        if run.engine.rank == 0:
            facts["optimizer"] = parts.bookkeeping(run)
        copies = self._copied(pieces)
        manifest = {**self._facts, "step": run.ledger.step, "tokens": run.ledger.tokens, **self._known_loss()}
        self._writing = _Write(run.ledger.step, partial, manifest, None, began)
        write = self._writing

        def work() -> None:
            try:
                partial.mkdir(parents=True, exist_ok=True)
                if run.engine.rank == 0:
                    atomic.write_text(partial / store.CONFIG, to_yaml(run.config), sync_name=False)
                    self._sync_rows()
                files.write(partial, run.engine.rank, copies, randomness.tensors(), facts)
            except Exception as error:
                # Of any kind: a thread's exception would be lost, and the others must hear of it.
                write.problem = _first_line(error)

        write.thread = threading.Thread(target=work, name="checkpoint")
        write.thread.start()
        self._last_step = run.ledger.step
        if not background:
            self._name()
        self.waited_s = time.monotonic() - began

    def _name(self) -> None:
        """Wait for what is being written and give it its name, or discard it (a collective)."""
        write, self._writing = self._writing, None
        if write is None:
            return
        assert write.thread is not None
        write.thread.join()
        engine = self._run.engine
        if not self._is_agreed_failure(write):
            if engine.rank == 0:
                self._commit(write)
            if not self._is_agreed_failure(write):
                self._saved_step = write.step
        self.duration_s = time.monotonic() - write.began
        self._run.stop.save_s = self.duration_s

    def _is_agreed_failure(self, write: _Write) -> bool:
        """Whether the save failed on any process (a collective); says so and cleans up if it did."""
        engine = self._run.engine
        failed = torch.tensor(float(bool(write.problem)), device=engine.device)
        if not engine.max(failed).item():
            return False
        problems = agreement.from_all(write.problem)
        rank, self._reason = next((r, line) for r, line in enumerate(problems) if line)
        if engine.rank == 0:
            self.store.discard_partial()
            self._say(f"checkpoint of step {write.step} failed on rank {rank}: {self._reason}")
            self._say("its older checkpoints are as they were")
        return True

    def _commit(self, write: _Write) -> None:
        try:
            self.store.commit(write.step, write.folder, write.manifest)
        except (OSError, DamagedCheckpoint) as error:
            write.problem = _first_line(error)
            return
        try:
            self.store.point_to(write.step)
            self.store.prune(self._retention)
        except OSError as error:
            self._say(
                f"checkpoint of step {write.step} is written; what it replaces stays ({_first_line(error)})"
            )

    def _sync_rows(self) -> None:
        """Put the rows up to this step on the disk: a checkpoint that outlives a power failure needs them."""
        if self._run.folder is not None and (rows := self._run.folder / "metrics.jsonl").exists():
            atomic.sync_file(rows)

    def _lacks_space(self, pieces: Sequence[StatePiece]) -> bool:
        engine = self._run.engine
        size = torch.tensor(
            float(sum(p.tensor.nbytes for p in pieces)), dtype=torch.float64, device=engine.device
        )
        needed = engine.sum(size).item() * _HEADROOM
        free, why = 0.0, ""
        if engine.rank == 0:
            try:
                free = float(self.store.free_bytes())
            except OSError as error:
                why = f": {_first_line(error)}"
        free = engine.max(torch.tensor(free, dtype=torch.float64, device=engine.device)).item()
        if free >= needed:
            return False
        self._reason = f"it needs {needed / 1e9:.3g} GB, the disk has {free / 1e9:.3g} GB" + why
        if engine.rank == 0:
            self._say(
                f"no checkpoint of step {self._run.ledger.step}: {self._reason}; "
                "its older checkpoints are as they were"
            )
        return True

    def _copied(self, pieces: Sequence[StatePiece]) -> list[StatePiece]:
        """The parts in host memory. The memory is kept from save to save: touching new pages costs more than the
        copy itself."""
        copies = []
        is_cuda = self._run.engine.device.type == "cuda"
        for part in pieces:
            key = (part.kind, part.name, part.start)
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != part.tensor.shape or buffer.dtype != part.tensor.dtype:
                buffer = torch.empty(part.tensor.shape, dtype=part.tensor.dtype, pin_memory=is_cuda)
                self._buffers[key] = buffer
            buffer.copy_(part.tensor.detach(), non_blocking=True)
            copies.append(part._replace(tensor=buffer))
        if is_cuda:
            torch.cuda.synchronize(self._run.engine.device)
        return copies

    def _known_loss(self) -> dict[str, float | None]:
        for probe in self._run.probes:
            step, loss = getattr(probe, "last", (None, None))
            if step == self._run.ledger.step:
                return {"val_loss": loss}
        return {"val_loss": None}


def wish_stands(last: int | None, step: int) -> bool:
    """Whether a wish that was uttered a step ago still stands: the save that it asked for may have been made since."""
    return last is None or step > last + 1


def _before_decay(config: RunConfig) -> int | None:
    """Return the last step that a longer wsd run shares with this one: what `steps` is raised from."""
    if config.schedule.name != "wsd":
        return None
    step = config.steps - length(config.schedule.decay, config.steps)
    return step if 0 < step < config.steps else None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
