"""The building blocks of rules: momentum, orthogonal factors, subspaces, norm limits.

Names are resolved when first used (PEP 562), so that a module of `optimizers.rules` is imported without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimizers.interfaces import InTurn, Update
    from optimizers.rules.parts.norm_growth import limit_growth, record_projected_norm
    from optimizers.rules.parts.orthogonal import momentum, orthogonalize, scale
    from optimizers.rules.parts.subspace import lift, orthogonalize_subspace, project, refresh

__all__ = [
    "InTurn",
    "Update",
    "lift",
    "limit_growth",
    "momentum",
    "orthogonalize",
    "orthogonalize_subspace",
    "project",
    "record_projected_norm",
    "refresh",
    "scale",
]

_MODULES = {
    "optimizers.interfaces": ("InTurn", "Update"),
    "optimizers.rules.parts.norm_growth": ("limit_growth", "record_projected_norm"),
    "optimizers.rules.parts.orthogonal": ("momentum", "orthogonalize", "scale"),
    "optimizers.rules.parts.subspace": ("lift", "orthogonalize_subspace", "project", "refresh"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value
