"""Matrix optimizers for language models: SUMO, GaLore, Muon and AdamW, batched, exact, usable alone.

    from optimizers import SUMO
    optimizer = SUMO(model.named_parameters(), lr=1e-3, rank=128)

`optimizers.build(name, named_parameters, modules=model, **options)` builds any preset of
`optimizers.presets` with routing by module type. Importing this package does not import torch: names are
resolved when first used (PEP 562), so that a command line can check options before it pays for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from optimizers.options import Option, OptionError
from optimizers.presets import OPTIONS, PRESETS, names, rank_limit_check, resolve
from optimizers.rule_options import Preset

if TYPE_CHECKING:
    from optimizers.interfaces import Update
    from optimizers.linalg.polar import Polar, polar
    from optimizers.optimizer import Optimizer
    from optimizers.registry import SUMO, AdamW, GaLore, Muon, build, plugin
    from optimizers.routing import Route
    from optimizers.rule import Rule
    from optimizers.rules.parts.building_blocks import momentum, orthogonalize, scale

_LAZY = {
    "build": "optimizers.registry",
    "plugin": "optimizers.registry",
    "Optimizer": "optimizers.optimizer",
    "SUMO": "optimizers.registry",
    "GaLore": "optimizers.registry",
    "Muon": "optimizers.registry",
    "AdamW": "optimizers.registry",
    "Route": "optimizers.routing",
    "polar": "optimizers.linalg.polar",
    "Polar": "optimizers.linalg.polar",
    "Rule": "optimizers.rule",
    "Update": "optimizers.interfaces",
    "momentum": "optimizers.rules.parts.building_blocks",
    "orthogonalize": "optimizers.rules.parts.building_blocks",
    "scale": "optimizers.rules.parts.building_blocks",
}

__all__ = [
    "OPTIONS",
    "PRESETS",
    "SUMO",
    "AdamW",
    "GaLore",
    "Muon",
    "Optimizer",
    "Option",
    "OptionError",
    "Polar",
    "Preset",
    "Route",
    "Rule",
    "Update",
    "build",
    "momentum",
    "names",
    "orthogonalize",
    "plugin",
    "polar",
    "rank_limit_check",
    "resolve",
    "scale",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
