"""What an optimizer says that it does to a parameter: its class, the settings of the group, DeepSpeed's marks.

A claim is what the update is compared with. Nothing here looks at an update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from harness.verify.watch.recording import Settings

SCALES: dict[str, tuple[str, Callable[[int, int], float]]] = {
    "rows_cols": (
        "√max(1, m/n): Keller Jordan, torch adjust_lr_fn=original, DeepSpeed",
        lambda m, n: math.sqrt(max(1.0, m / n)),
    ),
    "rms_max": (
        "0.2·√max(m, n): Moonlight, torch adjust_lr_fn=match_rms_adamw, dion rms_norm",
        lambda m, n: 0.2 * math.sqrt(max(m, n)),
    ),
    "fans": ("√(m/n): dion spectral_norm", lambda m, n: math.sqrt(m / n)),
    "none": ("1: unscaled", lambda m, n: 1.0),
    "max_dim": ("√max(m, n): Muon's first version", lambda m, n: math.sqrt(max(m, n))),
}
"""Documented factors on the orthogonalized update of an m×n matrix by name: (formula and who uses it, function)."""


_PLAIN: Mapping[str, Any] = {
    "weight_decay_form": "decoupled",
    "weight_norm": "free",
    "state_dtype": "float32",
    "update_rms": None,
    "split_heads": False,
}
"""Options of presets, with the values for which Muon is the textbook's."""


@dataclass(frozen=True)
class Claim:
    """What the group of a parameter announces.

    Attributes:
        kind: "matrix" (orthogonalized as a whole matrix), "adamw", "sgd", "lion", "preset" (one of
            `optimizers.names()`), or "other": a class that says nothing to us.
        who: class that claims it, for people.
        momentum, nesterov: of a matrix rule or SGD; None: not stated.
        scale: key of `SCALES`; None: not stated, any documented factor will do.
        alpha: a further constant factor.
        orthogonalizer: key of `directions.factors`; None: any.
        steps: of Newton–Schulz.
        betas, eps: of AdamW and Lion.
        decay, is_decoupled: weight decay rate, and whether it acts on the weight (None: not stated).
        parts: "parts" or "whole" for fused projections; None: not stated.
        preset, options: for kind "preset".
    """

    kind: str
    who: str
    momentum: float | None = None
    nesterov: bool | None = None
    scale: str | None = None
    alpha: float = 1.0
    orthogonalizer: str | None = None
    steps: int = 5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 0.0
    is_decoupled: bool | None = True
    parts: str | None = None
    preset: str | None = None
    options: Mapping[str, Any] | None = None


def claim_of(optimizer: Any, settings: Settings, parameter: Any, ndim: int, rule: str | None) -> Claim:
    """Return what an optimizer announces for a parameter.

    Args:
        optimizer: the innermost torch optimizer.
        settings: of the parameter's group.
        parameter: may carry DeepSpeed's mark `use_muon`.
        ndim: of the whole parameter.
        rule: a name of `optimizers.names()` that the user gives for hidden matrices, or None.
    """
    who = type(optimizer).__name__
    home = type(optimizer).__module__
    values = settings.values
    algorithm = _algorithm(who, home, values, parameter, ndim)
    if rule is not None and algorithm != "adamw":
        return _of_preset(rule, who, values)
    if algorithm == "preset":
        return _of_preset(str(values.get("preset") or getattr(optimizer, "preset", "")), who, values)
    if algorithm == "matrix":
        return _matrix(who, home, settings)
    return _elementwise(algorithm, who, settings)


def _algorithm(who: str, home: str, values: Mapping[str, Any], parameter: Any, ndim: int) -> str:
    """Return the kind of rule that class and group name."""
    if home.startswith("optimizers."):
        return "adamw" if values.get("rule") == "adamw" else "preset"
    if isinstance(values.get("use_muon"), bool):
        return "matrix" if values["use_muon"] else "adamw"
    if home.startswith("deepspeed.runtime.zero.muon"):
        return "matrix" if getattr(parameter, "use_muon", False) else "adamw"
    if isinstance(values.get("algorithm"), str):
        return {"muon": "matrix", "normuon": "other", "dion": "other"}.get(
            values["algorithm"], str(values["algorithm"])
        )
    name = who.lower()
    if "muon" in name and name not in ("normuon", "adamuon"):
        return "matrix" if ndim >= 2 else "other"
    for kind in ("adamw", "adam", "lion", "sgd"):
        if name in (kind, f"fused{kind}", f"deepspeedcpu{kind}", f"cpu{kind}", f"torch{kind}"):
            return "other" if _variant(values) else kind
    return "other"


def _variant(values: Mapping[str, Any]) -> str:
    """Return a setting that makes Adam or SGD a rule that is not known here, in words; "" for none."""
    if values.get("amsgrad"):
        return " with amsgrad"
    return " with dampening" if values.get("dampening") and values.get("momentum") else ""


def _matrix(who: str, home: str, settings: Settings) -> Claim:
    values = settings.values
    scale: str | None = None
    if home.startswith("torch.optim") or "adjust_lr_fn" in values:
        scale = {None: "rows_cols", "original": "rows_cols", "match_rms_adamw": "rms_max"}.get(
            values.get("adjust_lr_fn")
        )
    elif isinstance(values.get("use_adjusted_lr"), bool):
        scale = "rms_max" if values["use_adjusted_lr"] else "rows_cols"
    elif "adjust_lr" in values:
        scale = {None: "none", "spectral_norm": "fans", "rms_norm": "rms_max"}.get(values["adjust_lr"])
    elif home == "muon" or home.startswith("deepspeed.runtime.zero.muon"):
        scale = "rows_cols"
    nesterov = values.get("nesterov")
    if nesterov is None and (home == "muon" or home.startswith("deepspeed.runtime.zero.muon")):
        nesterov = True
    return Claim(
        "matrix",
        who,
        momentum=settings.number("momentum", "mu", default=None),
        nesterov=nesterov if isinstance(nesterov, bool) else None,
        scale=scale,
        steps=int(settings.number("ns_steps", "backend_steps", default=5) or 5),
        decay=settings.number("weight_decay", "wd", default=0.0) or 0.0,
        is_decoupled=values.get("weight_decouple", True) is not False,
        parts="parts" if values.get("split_qkv") or values.get("num_heads") else None,
    )


def _elementwise(algorithm: str, who: str, settings: Settings) -> Claim:
    values = settings.values
    betas = values.get("betas")
    if not (isinstance(betas, tuple | list) and len(betas) == 2):
        betas = (settings.number("beta1") or 0.9, settings.number("beta2") or 0.999)
    coupled = algorithm in ("adam", "sgd") and not values.get("decoupled_weight_decay", False)
    return Claim(
        "adamw" if algorithm == "adam" else algorithm if algorithm in ("adamw", "sgd", "lion") else "other",
        who + (_variant(values) if algorithm == "other" else ""),
        momentum=settings.number("momentum", default=0.0 if algorithm == "sgd" else None),
        nesterov=bool(values.get("nesterov", False)) if algorithm == "sgd" else None,
        betas=(float(betas[0]), float(betas[1])),
        eps=settings.number("eps", "epsilon", default=1e-8) or 1e-8,
        decay=settings.number("weight_decay", default=0.0) or 0.0,
        is_decoupled=not coupled if algorithm in ("adam", "sgd", "adamw", "lion") else None,
    )


def _of_preset(name: str, who: str, values: Mapping[str, Any]) -> Claim:
    """Return the claim of a preset with the values of the group: in closed form for Muon, for replay otherwise."""
    from optimizers import presets

    options = {**presets.preset(name).options}
    options.update({key: value for key, value in values.items() if key in options})
    # The closed form has no place for the options around a rule, which a replay has.
    plain = all(options.get(key, value) == value for key, value in _PLAIN.items())
    closed = presets.preset(name).rule == "muon" and options["nesterov"] != "stored" and plain
    beta1, beta2 = options.get("betas", (0.9, 0.999))
    orthogonalizer = options.get("orthogonalizer")
    if orthogonalizer not in ("newton_schulz", "polar_express", "cubic", None):
        orthogonalizer = "svd"
    return Claim(
        "matrix" if closed else "adamw" if presets.preset(name).rule == "adamw" else "preset",
        who,
        momentum=options.get("momentum"),
        nesterov=bool(options.get("nesterov")) if "nesterov" in options else None,
        scale=options.get("update_scale") if closed else None,
        alpha=float(options.get("alpha", 1.0)) if closed else 1.0,
        orthogonalizer=orthogonalizer if closed else None,
        steps=int(options.get("orthogonalizer_steps", 5)),
        betas=(float(beta1), float(beta2)),
        eps=float(options.get("eps", 1e-8)),
        decay=float(options.get("weight_decay", 0.0)),
        parts="parts",
        preset=name,
        options=options,
    )
