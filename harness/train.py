"""Entry point of a training process: ``accelerate launch -m harness.train key=value …``, or without a launcher.

From Python the module can be called: ``from harness import train; train(optimizer="sumo", steps=100)`` starts processes
and returns a data frame (docs/python.md).

Read in this order: `harness.preparation` (what can be checked before torch is imported), `harness.run` (the parts of a
run), `harness.loop` (training), `harness.recorder` (its record).
"""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from harness.process.leaving import leave_after
from harness.process.stop import outlive_the_terminal
from harness.worker import main


class _CallableModule(ModuleType):
    """Lets ``from harness import train`` give the function of the Python API: this module has its name."""

    def __call__(self, *overrides: str, **keys: Any) -> Any:
        """Train one run; see `analysis.api.train`."""
        return import_module("analysis.api").train(*overrides, **keys)


if __name__ in sys.modules and __name__ != "__main__":
    sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    # Until the run takes it over, Ctrl-C ends this process without a traceback, as SIGTERM does.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    outlive_the_terminal()
    leave_after(main)
