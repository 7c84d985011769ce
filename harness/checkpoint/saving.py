"""Decide when a checkpoint is due, and write it while training continues."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.checkpoint import contents, files, store
from harness.checkpoint.contents import Randomness
from harness.checkpoint.resuming import from_all
from harness.checkpoint.store import DamagedCheckpoint, Retention, Store
from harness.config.compose import to_yaml
from harness.config.schema import RunConfig
from harness.errors import first_line
from harness.files import atomic
from harness.loop import Run, drain_pending
from harness.protocols import Probe
from harness.schedule import length
from optimizers.named_state import StatePiece

EVERY_S = 900.0
"""Seconds of training between checkpoints with ``checkpoint.every=auto``."""
LAST_TRIES = 2
"""Attempts to save the last step."""
RETRY_S = 1.0
"""Seconds between these attempts: a quota or a full disk may have changed meanwhile."""
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
    """Writes the checkpoints of one run. Every process has one and calls it at the same points of the loop.

    A save copies this process' part to host memory, and a thread writes it from there, so that the next steps do not
    wait. When all processes are done, as the loop's flags tell, rank 0 gives the checkpoint its name. A save that fails
    (full disk, unreadable folder) is reported and the run continues; older checkpoints stay untouched. The last step is
    tried `LAST_TRIES` times; what still fails then is the run's `problem`.

    Args:
        run: assembled.
        folder: of the run, the same for all processes.
        facts: what the manifest says about the run, "identity" among it.
        attempt: number of this attempt, the same for all processes.
        say: takes messages.
        probes: of the run, whose state belongs to a checkpoint.
        saved_step: step of the checkpoint that the run continues from; None: it starts.

    Attributes:
        duration_s: from the start of the last save to its name.
    """

    def __init__(
        self,
        run: Run,
        folder: Path,
        facts: Mapping[str, Any],
        *,
        attempt: int,
        say: Callable[[str], None],
        probes: Sequence[Probe] = (),
        saved_step: int | None = None,
    ) -> None:
        self._run, self._say, self._attempt, self._probes = run, say, attempt, probes
        self._rows = folder / "metrics.jsonl"
        self._facts = {
            **facts,
            "attempt": attempt,
            "engine": run.engine.name,
            "world_size": run.engine.world_size,
        }
        self.store = Store(folder)
        config = run.config.checkpoint
        self._every, self._background = config.every, config.background
        self._before_decay = _before_decay(run.config)
        # A longer wsd run continues from there, so retention must not remove it.
        pinned = frozenset() if self._before_decay is None else frozenset({self._before_decay})
        self._retention = Retention(config.keep, config.keep_best, config.keep_every, pinned)
        self._last_began = time.monotonic()
        self._last_step: int | None = None
        """Step of the last save that began."""
        self._saved_step = saved_step
        """Step of the last save that got its name, the same on all processes."""
        self._reason = ""
        """Why the last save failed, the same on all processes."""
        self.problem = ""
        self._writing: _Write | None = None
        self._buffers: dict[tuple[str, str, int], Tensor] = {}
        self._randomness: Randomness | None = None
        self._tries = 0
        self.duration_s = 0.0

    def before_step(self) -> None:
        """Note the random states that a stop before this step's update would need."""
        self._randomness = Randomness.now(self._run.engine.device)

    @property
    def is_wanted(self) -> bool:
        """True if the clock of this process asks for a checkpoint."""
        # Rank 0's alone: the processes would not agree.
        is_due = self._every == "auto" and time.monotonic() - self._last_began >= EVERY_S
        return is_due and self._run.engine.rank == 0

    @property
    def is_writing(self) -> bool:
        """True while this process is writing."""
        thread = self._writing.thread if self._writing else None
        return thread is not None and thread.is_alive()

    def after_step(self, *, wanted: bool, writing: bool) -> None:
        """Save where it is due, and give its name to what has been written.

        Args:
            wanted: any process wanted a checkpoint, as the flags say.
            writing: any process was still writing.
        """
        state = self._run.state
        # Two steps on, the flags were set after that save had begun.
        if self._writing is not None and not writing and state.step >= self._writing.step + 2:
            self._name()
        due = isinstance(self._every, int) and state.step % self._every == 0
        due = due or (self._every is not None and state.step == self._before_decay)
        if due or (wanted and is_still_wanted(self._last_step, state.step)):
            drain_pending(self._run)
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
        state = self._run.state
        self._name()
        for number in range(LAST_TRIES):
            if self._saved_step == state.step:
                return
            if number:
                time.sleep(RETRY_S)
            if state.step == self._run.config.steps:
                randomness = Randomness.now(self._run.engine.device)
            else:
                # The step that was broken off has drawn numbers since.
                assert self._randomness is not None
                randomness = self._randomness
            # Counted as a probe's time if the run continues: saving is not training.
            with self._run.clock.part("probes"):
                self.save(randomness, background=False)
        if self._saved_step != state.step:
            start = "the beginning" if self._saved_step is None else f"step {self._saved_step}"
            self.problem = (
                f"the checkpoint of step {state.step} could not be written ({self._reason}); "
                f"the same command continues from {start}"
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
        pieces = [
            p
            for p in (*contents.weight_pieces(run), *contents.optimizer_state(run).pieces())
            if p.is_primary and p.tensor.numel()
        ]
        # Found out before anything is written, on all processes alike.
        if self._lacks_space(pieces):
            return
        self._tries += 1
        partial = self.store.partial(run.state.step, f"{self._attempt}-{self._tries}")
        facts = contents.counters(run, self._probes)
        if run.engine.rank == 0:
            facts["optimizer"] = contents.optimizer_state(run).facts()
        # From here on the next step may change the weights.
        copies = self._copied(pieces)
        manifest = {**self._facts, "step": run.state.step, "tokens": run.state.tokens, **self._known_loss()}
        self._writing = _Write(run.state.step, partial, manifest, None, began)
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
                write.problem = first_line(error)

        # Not a daemon: a process that ends by itself waits for it. One that ends by an exception does not
        # (`process.leaving`): what was written then keeps its partial name, and the next start discards it.
        write.thread = threading.Thread(target=work, name="checkpoint")
        write.thread.start()
        self._last_step = run.state.step
        if not background:
            self._name()

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
        # A time limit must leave this much time for the next save.
        self._run.stop.save_s = self.duration_s

    def _is_agreed_failure(self, write: _Write) -> bool:
        """Return True if the save failed on any process (a collective); then report it and clean up."""
        engine = self._run.engine
        failed = torch.tensor(float(bool(write.problem)), device=engine.device)
        # One small reduction in the usual case; texts are only gathered after a failure.
        if not engine.max(failed).item():
            return False
        problems = from_all(write.problem)
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
            write.problem = first_line(error)
            return
        try:
            # The checkpoint has its name by now: what fails here costs only old ones' space.
            self.store.point_to(write.step)
            self.store.prune(self._retention)
        except OSError as error:
            self._say(
                f"checkpoint of step {write.step} is written; what it replaces stays ({first_line(error)})"
            )

    def _sync_rows(self) -> None:
        """Put the rows up to this step on the disk: a checkpoint that outlives a power failure needs them."""
        if self._rows.exists():
            atomic.sync_file(self._rows)

    def _lacks_space(self, pieces: Sequence[StatePiece]) -> bool:
        engine = self._run.engine
        # Summed over processes: they write to one disk.
        size = torch.tensor(
            float(sum(p.tensor.nbytes for p in pieces)), dtype=torch.float64, device=engine.device
        )
        needed = engine.sum(size).item() * _HEADROOM
        free, why = 0.0, ""
        if engine.rank == 0:
            try:
                free = float(self.store.free_bytes())
            except OSError as error:
                why = f": {first_line(error)}"
        free = engine.max(torch.tensor(free, dtype=torch.float64, device=engine.device)).item()
        if free >= needed:
            return False
        self._reason = f"it needs {needed / 1e9:.3g} GB, the disk has {free / 1e9:.3g} GB" + why
        if engine.rank == 0:
            self._say(
                f"no checkpoint of step {self._run.state.step}: {self._reason}; "
                "its older checkpoints are as they were"
            )
        return True

    def _copied(self, pieces: Sequence[StatePiece]) -> list[StatePiece]:
        """Return copies of the parts in host memory."""
        # The memory is kept from save to save: touching new pages costs more than the copy itself.
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
        for probe in self._probes:
            step, loss = getattr(probe, "last", (None, None))
            if step == self._run.state.step:
                return {"val_loss": loss}
        return {"val_loss": None}


def is_still_wanted(last: int | None, step: int) -> bool:
    """Return True if the checkpoint that a process wanted one step ago has not been made since."""
    return last is None or step > last + 1


def _before_decay(config: RunConfig) -> int | None:
    """Return the last step that a longer wsd run shares with this one: what `steps` is raised from."""
    if config.schedule.name != "wsd":
        return None
    step = config.steps - length(config.schedule.decay, config.steps)
    return step if 0 < step < config.steps else None
