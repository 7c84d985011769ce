"""What a preset is made of, in one line, and which other preset is nearest to it. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optimizers.options import option_word
from optimizers.presets import PRESETS, preset
from optimizers.rule_options import NEUTRAL

_MISSING = object()
_EXACT = ("auto", "svd", "qr_svd", "gram", "dwh")
_NOT_THE_RULE = ("lr", "seed", "rounding")
"""Options that say how a rule is run; those of the AdamW next to it (`aux_…`) do not count either."""


def composition(name: str) -> str:
    """Return the parts of a preset, e.g. "basis randomized (refresh 200) · inner orthogonalize(exact) · residual sgd".

    Args:
        name: a preset, or a rule of another package.
    """
    chosen = preset(name)
    return " · ".join(_parts(chosen.rule, chosen.options))


def _parts(rule: str, options: Mapping[str, Any]) -> list[str]:
    whole = "whole matrix" if "alpha" in options else "every parameter"  # AdamW is no matrix rule
    parts = [_basis(options) if "basis" in options else whole]
    parts.append(f"inner {_inner(rule, options)}")
    if "residual" in options:
        parts += _outside(options)
    if options.get("update_scale", "none") != "none":
        parts.append(f"scale {options['update_scale']}")
    if options.get("alpha", 1.0) != 1.0:
        parts.append(f"alpha {options['alpha']:.4g}")
    # What any preset takes, where this one has it set.
    parts += [
        f"{key} {option_word(options[key])}"
        for key in NEUTRAL
        if options.get(key, NEUTRAL[key]) != NEUTRAL[key]
    ]
    return parts


def _basis(options: Mapping[str, Any]) -> str:
    interval = options["refresh_interval"]
    when = "every step" if interval == 1 else f"refresh {interval}"
    carried = {False: "", True: ", moment carried over"}.get(
        options["transport"], ", both moments carried over"
    )
    return f"basis {options['basis']} ({when}{carried})"


def _inner(rule: str, options: Mapping[str, Any]) -> str:
    method = options.get("orthogonalizer")
    if method is None:
        return options.get("inner", rule)
    is_exact = method in _EXACT
    detail = "exact" if is_exact else f"{method}, {options['orthogonalizer_steps']} steps"
    inner = options.get("inner", "orthogonalize" if rule == "muon" else rule)
    return f"{inner}({detail})"


def _outside(options: Mapping[str, Any]) -> list[str]:
    """Return what becomes of the gradient outside the subspace."""
    residual, scaling = options["residual"], options["gradient_scaling"]
    if residual == "sgd" and options["residual_scale"] != 1.0:
        residual = f"sgd × {options['residual_scale']:g}"
    if residual == "unbiased":
        residual = f"unbiased (full rank with probability {options['full_rank_probability']:g})"
    parts = [f"residual {residual}" if scaling == "none" else f"whole gradient, scaled by {scaling}"]
    if options["error_feedback"]:
        parts.append(f"error feedback {options['error_feedback']}")
    if options["norm_growth_limit"] is not None:
        parts.append(f"growth of the {options['norm_growth_target']} ≤ {options['norm_growth_limit']:g}")
    return parts


def nearest(name: str) -> tuple[str, dict[str, tuple[Any, Any]]]:
    """Return the preset that differs in the fewest options, and these: option → (here, there), None where it has none.

    Args:
        name: a preset, or a rule of another package.
    """
    own = _of_the_rule(preset(name).options)
    others = {
        other: _differences(own, _of_the_rule(PRESETS[other].options)) for other in PRESETS if other != name
    }
    best = min(others, key=lambda other: len(others[other]))
    return best, others[best]


def difference(name: str) -> str:
    """Return how a preset differs from its nearest one, in one line."""
    other, values = nearest(name)
    changes = [f"{key}={_word(here)} (there {_word(there)})" for key, (here, there) in values.items()]
    return f"{other}, but " + ", ".join(changes) if changes else f"the same rule as {other}"


def _of_the_rule(options: Mapping[str, Any]) -> dict[str, Any]:
    idle: set[str] = set(_NOT_THE_RULE)
    if options.get("norm_growth_limit") is None:
        idle.add("norm_growth_target")
    if options.get("residual") == "drop":
        idle.add("residual_scale")
    if options.get("orthogonalizer") in _EXACT:
        idle |= {"orthogonalizer_steps", "orthogonalizer_dtype"}
    return {
        key: value
        for key, value in options.items()
        if key not in idle and not key.startswith("aux_") and value != NEUTRAL.get(key, _MISSING)
    }


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = dict.fromkeys((*a, *b))
    return {
        k: (a.get(k, _MISSING), b.get(k, _MISSING)) for k in keys if a.get(k, _MISSING) != b.get(k, _MISSING)
    }


def _word(value: Any) -> str:
    return "–" if value is _MISSING else option_word(value)
