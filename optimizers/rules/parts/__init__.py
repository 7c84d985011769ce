"""What rules are built of, resolved when first used (PEP 562), so that a rule's module is imported without torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimizers.rules.parts.building_blocks import *  # noqa: F403
    from optimizers.rules.parts.eigenbases import *  # noqa: F403
    from optimizers.rules.parts.inner_rules import *  # noqa: F403
    from optimizers.rules.parts.normalized_factors import *  # noqa: F403
    from optimizers.rules.parts.norms import *  # noqa: F403
    from optimizers.rules.parts.residuals import *  # noqa: F403
    from optimizers.rules.parts.slices import *  # noqa: F403
    from optimizers.rules.parts.subspace_shapes import *  # noqa: F403
    from optimizers.rules.parts.subspaces import *  # noqa: F403

_MODULES = (
    "subspace_shapes",
    "building_blocks",
    "normalized_factors",
    "subspaces",
    "norms",
    "inner_rules",
    "residuals",
    "eigenbases",
    "slices",
)
"""Where a name is looked for. The state of a rule is asked for without torch, which all but the first need."""


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in _MODULES:
        value = getattr(import_module(f"{__name__}.{module}"), name, None)
        if value is not None:
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
