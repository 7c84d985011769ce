"""One run: configuration → model and data → engine → loop → record.

`python -m` and `accelerate launch -m` put the current folder first on `sys.path`, so a user's own
`optimizers/` or `analysis/` there would shadow the packages that this one was written with. The finder
below pins the two names to this package's siblings, without importing them.
"""

# ruff: noqa: E402
from __future__ import annotations

from harness import import_path

# Before any other import: also those of Python's own modules would be taken from the current folder.
import_path.isolate()

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_HOME = Path(__file__).resolve().parent.parent
_SIBLINGS = ("optimizers", "analysis")


class _Siblings:
    """Finds the sibling packages next to this one, whatever `sys.path` says."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _SIBLINGS or not (_HOME / name).is_dir():
            return None
        return importlib.machinery.PathFinder.find_spec(name, [str(_HOME)], target)


def _pin() -> None:
    if not any(getattr(finder, "__name__", "") == "_Siblings" for finder in sys.meta_path):
        sys.meta_path.insert(0, _Siblings)
    for name in _SIBLINGS:
        loaded = sys.modules.get(name)
        places = [Path(place).resolve() for place in getattr(loaded, "__path__", [])]
        if loaded is not None and (_HOME / name).is_dir() and _HOME / name not in places:
            where = ", ".join(map(str, places)) or getattr(loaded, "__file__", "a module without a file")
            raise ImportError(
                f"the package '{name}' was already imported from {where}; "
                f"import harness before it, or rename it: optbench needs its own '{name}'"
            )


_pin()

_API = ("InputError", "RunFailed", "compare", "load_runs")
"""Names of the Python API, from the package above; `train` is the module of that name, which can be called."""


def __getattr__(name: str) -> Any:
    """Import a function of the Python API when it is asked for."""
    if name == "train":
        return importlib.import_module("harness.train")
    if name in _API:
        return getattr(importlib.import_module("analysis.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_API, "train"})
