"""A file per process that says that the process lives, which step it is in and which line it executes."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

FOLDER = "heartbeat"
"""Name of the folder of these files in a run folder."""
BEAT_S = 2.0
"""Seconds between two signs of life."""
_HARNESS = Path(__file__).parent.parent


class Heartbeat:
    """A file per process that says, every `BEAT_S` seconds, which step it is in and which line it executes.

    A thread writes it, so it stops where the process was stopped or killed, and shows the place where it hangs. A
    folder that cannot be written stops nothing.

    Args:
        folder: the run folder.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / FOLDER / f"rank_{rank:05d}.json"
        self._main = threading.main_thread().ident
        self._ended = threading.Event()
        self.step = 0
        """That the process is in; set by the loop."""
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; the file stays."""
        self._ended.set()

    def _beat(self) -> None:
        while True:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                # Not synced to the disk: it is of no use after a crash of the machine.
                part = self._path.with_suffix(".part")
                part.write_text(json.dumps({"step": self.step, "where": self._where()}))
                part.replace(self._path)
            except OSError:
                return
            if self._ended.wait(BEAT_S):
                return

    def _where(self) -> str:
        frame = sys._current_frames().get(self._main or 0)
        while frame is not None and not _is_ours(frame.f_code.co_filename):
            frame = frame.f_back
        if frame is None:
            return ""
        path = Path(frame.f_code.co_filename)
        return f"{path.parent.name}/{path.name}:{frame.f_lineno} {frame.f_code.co_name}"


def _is_ours(filename: str) -> bool:
    return Path(filename).parent.is_relative_to(_HARNESS)
