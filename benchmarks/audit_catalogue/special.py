"""Optimizers that the catalogue cannot take as they come: through a factory, or with a remark. Torch-free on import."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from harness.verify.audit.targets import Target

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer

_GALORE = {"rank": 4, "update_proj_gap": 2, "scale": 0.25, "proj_type": "std"}
_PYTORCH_OPTIMIZER = {"rank": 4, "update_proj_gap": 2, "scale": 0.25, "projection_type": "std"}
_APOLLO = {
    **_GALORE,
    "scale": 1.0,
    "proj": "random",
    "scale_type": "channel",
}

RANKED: Mapping[str, Mapping[str, Any]] = {
    **{f"pytorch_optimizer.{name}": _PYTORCH_OPTIMIZER for name in ("APOLLO", "Fira", "GaLore")},
    **{f"galore_torch.{name}": _GALORE for name in ("GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit")},
    "apollo_torch.APOLLOAdamW": _APOLLO,
    "apollo_torch.QAPOLLOAdamW": _APOLLO,
}
"""Optimizer whose groups say which matrices are projected → the options of the group of matrices. Without them it is
AdamW or Adafactor."""


@dataclass(frozen=True)
class Understated:
    """An optimizer whose update depends on more than the audit's gradients show.

    Attributes:
        update_class: that its formula has.
        reason: what hides it, one sentence.
    """

    update_class: str
    reason: str


UNDERSTATED: Mapping[str, Understated] = {}
"""Optimizer → what the audit does not show. A "safe" where its parameters are dealt out says nothing."""

REMARKS: Mapping[str, str] = {}
"""Optimizer → what a reader of its row should know."""


def audited(target: Target) -> Target:
    """Return what is audited in the place of a listed optimizer: itself, or a factory that gives ranks to matrices."""
    options = RANKED.get(target.name)
    if options is None:
        return target
    return Target(f"{__name__}.{ranked.__name__}", {"target": target.name, **options})


def ranked(params: Iterable[Parameter], *, target: str, **options: Any) -> Optimizer:
    """Build an optimizer with two groups: the matrices with ``options``, and everything else.

    Args:
        params: of the model, whole or as an engine holds them.
        target: import path of the optimizer.
        options: of the group of matrices.
    """
    module, _, name = target.rpartition(".")
    trained = list(params)
    groups = [
        {"params": [p for p in trained if p.ndim == 2], **options},
        {"params": [p for p in trained if p.ndim != 2]},
    ]
    return getattr(import_module(module), name)([group for group in groups if group["params"]])
