"""Heartbeat files: each process writes every two seconds which step it is in and which line it executes."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

FOLDER = "heartbeat"
"""Name of the folder of these files in a run folder."""
BEAT_S = 2.0
"""Seconds between two writes."""
_HARNESS = Path(__file__).parents[1]


class Heartbeat:
    """A thread that writes this process' heartbeat file every `BEAT_S` seconds.

    It stops when the process is stopped or killed, and its last file shows the line where a process hangs. A folder
    that cannot be written ends the thread and nothing else.

    Args:
        folder: the run folder.
        rank: of this process.

    Attributes:
        step: the step that the process is in; set by the loop.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / FOLDER / f"rank_{rank:05d}.json"
        self._main = threading.main_thread().ident
        self._ended = threading.Event()
        self.step = 0
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread that writes the heartbeat file."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; the file stays."""
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
        """Return the innermost line of the main thread that is in this package."""
        # The main thread trains; this thread would only see itself.
        frame = sys._current_frames().get(self._main or 0)
        while frame is not None and not Path(frame.f_code.co_filename).parent.is_relative_to(_HARNESS):
            frame = frame.f_back
        if frame is None:
            return ""
        path = Path(frame.f_code.co_filename)
        return f"{path.parent.name}/{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
