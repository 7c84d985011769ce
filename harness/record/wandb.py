"""The mirror of a run in Weights & Biases, whose failures never stop the run."""

from __future__ import annotations

import logging
import math
import netrc
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from harness.config.schema import RunConfig
from harness.protocols import MetricRow
from harness.redaction import redact_paths

X_AXES = ("step", "tokens", "wall_s", "flops")
INIT_TIMEOUT_S = 20
FINISH_TIMEOUT_S = 60


class WandbSink:
    """One W&B run per job, under the id that the run folder keeps.

    A resumed job (the same id) adds to its run what the run lacks: the rows that a killed process had not sent
    (`catch_up`) and the new ones. Rows of steps that W&B has are left out: they repeat, and W&B takes none back.

    Every failure (no server, no disk, no package) is said once and ends the mirror, not the run. What could
    not be sent stays in ``<run folder>/wandb`` for ``wandb sync``.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        run_id: str,
        facts: Mapping[str, Any],
        say: Callable[[str], None],
        *,
        job_type: str = "train",
        described: Mapping[str, Any] | None = None,
    ) -> None:
        """Start the W&B run, or write an offline one where that fails.

        Args:
            config: says where and how to mirror, and is what the W&B run is described by.
            folder: of the run.
            run_id: of the W&B run.
            facts: recorded next to the configuration.
            say: takes messages.
            job_type: W&B's word for the kind of run.
            described: replaces the configuration, for jobs that are no training.
        """
        self._say = say
        self._run: Any = None
        self._first_step = 0
        self._lowest_loss = math.inf
        self._superseded: list[Path] = []
        self._job_type, self._described = job_type, described
        mode = resolve_mode(config.wandb.mode)
        if mode == "disabled":
            return
        try:
            self._run = self._start(config, folder, run_id, facts, mode)
        except Exception as error:
            # wandb raises many types (network, usage, its own service); none of them may stop a training run.
            if mode == "online":
                self._say(f"W&B: online failed ({_first_line(error)}); writing an offline run instead")
                self._try(lambda: self._restart_offline(config, folder, run_id, facts))
            else:
                self._say(f"W&B: not available ({_first_line(error)}); the run folder has everything")

    def catch_up(self, rows: Iterable[MetricRow]) -> None:
        """Log the rows that the folder holds from before, as far as W&B lacks them.

        W&B's service sends rows in batches, and dies with a process that is killed; offline, its file ends torn. So the
        rows of earlier attempts come out of the folder.
        """
        for row in rows:
            self.write(row)
        if self._run is not None:
            # Only now that the new files hold their rows; kept, twelve attempts would hold the first rows twelve times.
            for old in self._superseded:
                shutil.rmtree(old, ignore_errors=True)

    def write(self, row: MetricRow) -> None:
        """Log a row: all x axes in the same call, so that any of them can be a chart's axis."""
        if self._run is None:
            return
        step, loss = int(row["step"] or 0), row.get("val/loss")
        if step >= self._first_step:
            self._try(lambda: self._run.log({k: v for k, v in row.items() if v is not None}, step=step))
        if loss is not None and loss < self._lowest_loss and self._run is not None:
            # Not by define_metric(summary="min"), which forgets at a resume what was logged before it.
            self._lowest_loss = loss
            self._try(lambda: self._run.summary.update({"best_val_loss": loss}))

    def attach(self, action: Callable[[Any], object]) -> None:
        """Hand the W&B run to ``action``, for tables, images and artifacts; a failure ends the mirror alone."""
        if self._run is not None:
            run = self._run
            self._try(lambda: action(run))

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """Hand the summary over and close, giving up on a server that does not answer."""
        if self._run is None:
            return
        run = self._run

        def close() -> None:
            # The configuration says what the command line does.
            kept = {key: value for key, value in summary.items() if key != "command" and value is not None}
            run.summary.update(redact_paths(kept))
            run.finish(exit_code=exit_code)

        worker = threading.Thread(target=lambda: self._try(close), daemon=True)
        worker.start()
        worker.join(FINISH_TIMEOUT_S)
        if worker.is_alive():
            self._say(
                f"W&B: no answer for {FINISH_TIMEOUT_S} s; `wandb sync` of the run folder's wandb/ sends the rest"
            )
        self._run = None

    def _start(
        self, config: RunConfig, folder: Path, run_id: str, facts: Mapping[str, Any], mode: str
    ) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        hide = not config.wandb.upload_machine_facts
        facts_off: dict[str, Any] = {
            "disable_git": hide,
            "x_disable_meta": hide,
            "x_disable_stats": hide,
            "x_disable_machine_info": hide,
            "x_save_requirements": not hide,
        }
        if hide:
            wandb.setup()
            # Its debug.log, which is in the run folder, would begin with the folder's absolute path.
            logging.getLogger("wandb").setLevel(logging.WARNING)
            facts_off |= {
                "host": "hidden",
                "username": "hidden",
                "email": "hidden",
                "program": f"optbench {self._job_type}",
            }
        settings: Any = wandb.Settings(
            init_timeout=INIT_TIMEOUT_S, console="off", save_code=False, **facts_off
        )
        wandb_mode: Any = mode
        earlier = _offline_folders(folder, run_id)
        run = wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity,
            group=config.group,
            job_type=self._job_type,
            name=folder.name,
            id=run_id,
            resume="allow",
            dir=folder.absolute(),  # wandb-core lives as long as this process, in the directory that it began in
            mode=wandb_mode,
            config=redact_paths({**(self._described or config.model_dump(mode="json")), **facts}),
            settings=settings,
        )
        self._superseded = _supersede(earlier)
        for axis in X_AXES:
            run.define_metric(axis, hidden=True)
        run.define_metric("*", step_metric="step")
        self._first_step = run.starting_step
        return run

    def _restart_offline(
        self, config: RunConfig, folder: Path, run_id: str, facts: Mapping[str, Any]
    ) -> None:
        import wandb

        wandb.teardown()  # W&B's service still holds the run's id after an init that timed out
        self._run = self._start(config, folder, run_id, facts, "offline")

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self._say(f"W&B: stopped mirroring ({_first_line(error)}); the run folder has everything")
            self._run = None


def resolve_mode(mode: str) -> str:
    """Return W&B's mode; ``auto`` is WANDB_MODE if set, else online for a user who is logged in, else offline."""
    if mode != "auto":
        return mode
    return os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)


def _offline_folders(folder: Path, run_id: str) -> list[Path]:
    """Return W&B's offline folders of earlier attempts that were not synced, superseded ones included."""
    folders = (folder / "wandb").glob(f"*offline-run-*-{run_id}")
    return [
        old
        for old in folders
        if old.name.lstrip(".").startswith("offline-run-") and not list(old.glob("*.synced"))
    ]


def _supersede(folders: Iterable[Path]) -> list[Path]:
    """Put a dot before the names of folders whose rows `catch_up` puts into the new one; returns the new names.

    ``wandb sync`` would append them to each other, and stops at a file whose end is torn.
    """
    hidden = []
    for old in folders:
        new = old if old.name.startswith(".") else old.with_name(f".{old.name}")
        if new != old:
            old.rename(new)
        hidden.append(new)
    return hidden


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
