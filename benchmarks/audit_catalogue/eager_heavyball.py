"""The optimizers of heavyball without its compilation, which takes minutes per optimizer and engine on a CPU.

``heavyball.utils.compile_mode`` is its own setting; None runs the same functions as plain torch. An import path such as
``benchmarks.audit_catalogue.eager_heavyball.AdamW`` is ``heavyball.AdamW`` in a process that does not compile.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PACKAGE = import_module("heavyball")
_PACKAGE.utils.compile_mode = None


def __getattr__(name: str) -> Any:
    """Return the attribute of heavyball."""
    return getattr(_PACKAGE, name)
