"""What rules are built of, resolved when first used (PEP 562), so that a rule's module is imported without torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimizers.rules.parts.building_blocks import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module("optimizers.rules.parts.building_blocks"), name)
    globals()[name] = value
    return value
