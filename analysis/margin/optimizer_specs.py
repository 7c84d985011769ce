"""The optimizer that a name means in this job, with its options.

Weight decay is 0 unless asked for: with it norms stay bounded and no law for t → ∞ applies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.errors import InputError, closest
from optimizers.options import OptionError
from optimizers.presets import PRESETS, names, resolve

REFERENCES = {
    "gd": "gradient descent",
    "ngd": "normalized gradient descent: steps of equal length",
    "sign": "sign descent: steepest descent in the max norm",
    "spectral": "spectral descent: steepest descent in the spectral norm (Muon without momentum, exact factor)",
    "adam": "Adam as published: betas 0.9, 0.999, eps 1e-8",
}
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer of a comparison.

    Attributes:
        name: as the user gave it.
        preset: of `optimizers`, or None for a reference that has none.
        lr: learning rate; every optimizer has one.
        options: resolved options.
        scale_free: its gradients are those of ln L.
    """

    name: str
    preset: str | None
    lr: float
    options: Mapping[str, Any]
    scale_free: bool

    @property
    def weight_decay(self) -> float:
        """Decoupled weight decay, times lr, before the step."""
        return float(self.options.get("weight_decay") or 0.0)

    @property
    def kind(self) -> str:
        """Name of the reference, or rule of the preset; "plugin" for an optimizer by import path."""
        if self.preset is None:
            return self.name
        return PRESETS[self.preset].rule if self.preset in PRESETS else "plugin"


def resolve_spec(name: str, lr: float, overrides: Mapping[str, Any], grad: str) -> OptimizerSpec:
    """Return the optimizer that a name means, with its options resolved.

    Args:
        name: a reference (`REFERENCES`), "adam", or a preset or plug-in of `optimizers`.
        lr: learning rate.
        overrides: options that differ.
        grad: "raw", "log" (scale-free) or "auto": raw for GD and what has Adam's second moment, which is not
            invariant to scale and caps the growth of margins at -½ ln β₂ a step on scale-free gradients; log
            for the others, whose gradients would underflow.

    Raises:
        InputError: unknown name or option, a wrong value.
    """
    known = [*REFERENCES, *names()]
    if name not in known and "." not in name:
        raise InputError("optimizer", name, "is unknown", allowed=known, suggestion=closest(name, known))
    if name in REFERENCES and name != "adam":
        if overrides:
            key = next(iter(overrides))
            reason = f"is not an option of {name}, which has none but lr"
            raise InputError(f"{name}.{key}", overrides[key], reason)
        return OptimizerSpec(name, None, lr, {}, grad == "log" or (grad == "auto" and name != "gd"))
    if name not in known:
        return OptimizerSpec(name, name, lr, dict(overrides), grad == "log")
    preset = "adamw" if name == "adam" else name
    base = {"weight_decay": 0.0, **(_ADAM if name == "adam" else {})}
    try:
        options = resolve(preset, {**base, **overrides, "lr": lr})
    except OptionError as error:
        raise InputError(
            f"{name}.{error.key}",
            error.value,
            error.reason,
            allowed=error.allowed,
            suggestion=error.suggestion,
        ) from None
    if options.get("orthogonalizer_dtype") not in (None, "float32"):
        options["orthogonalizer_dtype"] = "float32"  # of fp64 weights this means fp64: nothing here is bf16
    adaptive = "betas" in options
    return OptimizerSpec(name, preset, lr, options, grad == "log" or (grad == "auto" and not adaptive))
