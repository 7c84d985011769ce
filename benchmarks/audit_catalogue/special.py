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
    # apollo-torch has copies of galore-torch's classes.
    **{
        f"{package}.{name}": _GALORE
        for package in ("galore_torch", "apollo_torch")
        for name in ("GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit")
    },
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


_D_ADAPTATION = (
    "its step size is one number of all parameters, which in the audit's runs does not leave its first value: "
    "they see an element-wise rule"
)
UNDERSTATED: Mapping[str, Understated] = {
    "pytorch_optimizer.AdaGC": Understated(
        "global",
        "it clips by the norm of all gradients in its first 100 steps, and later by that of each parameter; the "
        "norms of the audit's gradients stay below the bound",
    ),
    "pytorch_optimizer.Adai": Understated(
        "global",
        "its momentum depends on the mean second moment of all parameters, which the squares of the audit's gradients "
        "leave at its lower bound, eps = 1e-3",
    ),
    "pytorch_optimizer.DAdaptAdaGrad": Understated("global", _D_ADAPTATION),
    "pytorch_optimizer.DAdaptAdan": Understated("global", _D_ADAPTATION),
    "pytorch_optimizer.DAdaptLion": Understated("global", _D_ADAPTATION),
    "pytorch_optimizer.SGDP": Understated(
        "matrix",
        "it projects matrices that are nearly orthogonal to their gradients, and no 1-D slices: of the audit's few "
        "are, so that the difference stays within rounding",
    ),
    "pytorch_optimizer.ScalableShampoo": Understated(
        "matrix", "it computes its preconditioners every 1,000 steps; the audit's runs are shorter"
    ),
}
"""Optimizer → what the audit does not show. A "safe" where its parameters are dealt out says nothing."""

_EMO = "audited without the loss: a closure, which engines do not pass, would scale its updates by the loss's trend"
REMARKS: Mapping[str, str] = {
    "lion": "its matrices take Lion and all other parameters AdamW, so that 1-D pieces of matrices take another rule",
    "pytorch_optimizer.APOLLO": "it draws its projections at random, and a compiled step may draw other ones",
    "pytorch_optimizer.DistributedMuon": (
        "it gathers parameters of unequal sizes in one call, which gloo refuses; nothing here was run with NCCL"
    ),
    **{f"pytorch_optimizer.{name}": _EMO for name in ("EmoFact", "EmoLynx", "EmoNavi")},
    "pytorch_optimizer.FlashAdamW": (
        'its moments are quantized in groups of elements, so that other slices are rounded otherwise: "wrong" is '
        "that rounding, 0.5 % of the update of a 48 × 16 matrix after six steps"
    ),
    "pytorch_optimizer.Gravity": (
        "it draws its first velocities in the shape of the parameter: shards and slices draw other ones"
    ),
}
"""Optimizer → what a reader of its row should know."""


EAGER = "heavyball"
"""Package that is audited without its compilation (`benchmarks.audit_catalogue.eager_heavyball`)."""
NOTES: Mapping[str, str] = {
    EAGER: "It compiles its functions with torch.compile. On CPUs that takes minutes per optimizer and engine, so that "
    "these rows are of the same functions without compilation (`heavyball.utils.compile_mode = None`). ADOPT and "
    "AdEMAMix were also audited with it: all verdicts and checks are the same, except that the check *torch.compile*, "
    "which compiles the whole step, then fails."
}
"""Package → how its rows were measured, where that is not plain."""


def audited(target: Target) -> Target:
    """Return what is audited in the place of a listed optimizer: itself, without compilation, or with ranks."""
    package, _, name = target.name.rpartition(".")
    if package == EAGER:
        return Target(f"benchmarks.audit_catalogue.eager_heavyball.{name}")
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
