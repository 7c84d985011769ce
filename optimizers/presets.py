"""Every preset's option values: the truth. YAML files only name them. Nothing here imports torch.

A preset is a rule with a value for each of the rule's options (`optimizers.options` says what each means);
`resolve` merges overrides into it and checks names, types and ranges. docs/optimizers.md has the mathematics
and says which published variant each preset computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from optimizers.options import OPTIONS, Option, OptionError, closest

__all__ = [
    "ENTRY_POINTS",
    "OPTIONS",
    "PRESETS",
    "Option",
    "OptionError",
    "Preset",
    "default_rank",
    "names",
    "preset",
    "rank_limit_check",
    "resolve",
]

ENTRY_POINTS = "optbench.optimizers"


@dataclass(frozen=True)
class Preset:
    """A rule with a value for each of its options.

    Attributes:
        name: what a user writes.
        rule: module of `optimizers.rules` that computes it, or the name of an entry point.
        options: the full option values (read-only).
        doc: one line.
        source: paper and, where it differs, code.
    """

    name: str
    rule: str
    options: Mapping[str, Any]
    doc: str
    source: str


PRESETS: dict[str, Preset] = {}


def _define(name: str, rule: str, doc: str, source: str, base: str | None = None, **options: Any) -> None:
    """Enter a preset: the options of `base` with these replaced."""
    start = dict(PRESETS[base].options) if base else {}
    PRESETS[name] = Preset(name, rule, MappingProxyType({**start, **options}), doc, source)


_AUX: dict[str, Any] = {
    "aux_lr": None,
    "aux_scheduled": True,
    "aux_betas": (0.9, 0.95),
    "aux_eps": 1e-8,
    "aux_eps_form": "corrected",
    "aux_weight_decay": 0.0,
    "rounding": "nearest",
    "seed": 0,
}
PLUGIN_COMMON: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.0, "alpha": 1.0, **_AUX}
_SUBSPACE: dict[str, Any] = {
    "rank": None,
    "refresh_interval": 200,
    "refresh_offset": 0,
    "refresh_stagger": False,
}

_define(
    "sumo_paper",
    "sumo",
    "SUMO as Algorithm 1 and the text have it: short side, transport, exact polar factor, residual",
    "Refael et al. 2025, arXiv 2505.24749, Algorithm 1",
    **_SUBSPACE,
    **_AUX,
    lr=1e-3,
    weight_decay=0.0,
    decay_order="before",
    momentum=0.95,
    momentum_form="sum",
    nesterov=False,
    side="short",
    basis="randomized",
    transport=True,
    refresh_threshold=None,
    orthogonalizer="auto",
    orthogonalizer_steps=5,
    orthogonalizer_dtype="float32",
    update_scale="rms_max",
    residual_scale=1.0,
    alpha=1.0,
    norm_growth_limit=None,
    norm_growth_target="factor",
)
_define(
    "sumo",
    "sumo",
    "SUMO, our recommended settings (now those of sumo_paper)",
    "Refael et al. 2025, arXiv 2505.24749; differences from sumo_paper: docs/optimizers.md",
    base="sumo_paper",
)
_define(
    "sumo_official",
    "sumo",
    "SUMO as the public code behaves: long side, full SVD, no transport, stored Nesterov, alpha 4",
    "public code of arXiv 2505.24749 (sumo_optimizer.py), read through a fork",
    base="sumo_paper",
    side="long",
    basis="svd",
    refresh_offset=1,
    transport=False,
    nesterov="stored",
    orthogonalizer="svd",
    alpha=4.0,
    weight_decay=0.01,
    decay_order="after",
    aux_lr=1e-5,
    aux_scheduled=False,
    aux_betas=(0.9, 0.999),
    aux_eps=1e-6,
    aux_eps_form="raw",
)
_define(
    "sumo_ns5",
    "sumo",
    "sumo_paper with five Newton–Schulz steps instead of the exact polar factor",
    "Refael et al. 2025, arXiv 2505.24749, §4 (SUMO-NS5)",
    base="sumo_paper",
    orthogonalizer="newton_schulz",
)
_define(
    "muon",
    "muon",
    "Muon: five Newton–Schulz steps on the Nesterov momentum of the whole matrix",
    "Jordan et al. 2024, kellerjordan.github.io/posts/muon",
    **{**_AUX, "aux_lr": 3e-4, "aux_eps": 1e-10},
    lr=0.02,
    weight_decay=0.0,
    momentum=0.95,
    momentum_form="ema",
    nesterov=True,
    orthogonalizer="newton_schulz",
    orthogonalizer_steps=5,
    orthogonalizer_dtype="auto",
    update_scale="rows_cols",
    alpha=1.0,
)
_define(
    "muon_moonlight",
    "muon",
    "Muon with the update scaled to AdamW's size, so that both share one learning rate",
    "Liu et al. 2025, arXiv 2502.16982 (Moonlight)",
    base="muon",
    lr=1e-3,
    weight_decay=0.1,
    momentum_form="sum",
    update_scale="rms_max",
    aux_lr=None,
    aux_eps=1e-8,
    aux_weight_decay=0.1,
)
_define(
    "muon_svd",
    "muon",
    "Muon with the exact polar factor",
    "Jordan et al. 2024 with an exact factor",
    base="muon",
    orthogonalizer="auto",
)
_define(
    "muon_polar_express",
    "muon",
    "Muon with the Polar Express iteration",
    "Amsel et al. 2025, arXiv 2505.16932 (Polar Express)",
    base="muon",
    orthogonalizer="polar_express",
)
_define(
    "galore",
    "galore",
    "GaLore: Adam in the gradient's leading subspace",
    "Zhao et al. 2024, arXiv 2403.03507; code galore-torch 1.0",
    **_SUBSPACE,
    **{**_AUX, "aux_betas": (0.9, 0.999), "aux_eps": 1e-6, "aux_eps_form": "raw"},
    lr=0.01,
    weight_decay=0.0,
    decay_order="before",
    betas=(0.9, 0.999),
    eps=1e-6,
    eps_form="raw",
    side="long",
    basis="svd",
    transport=False,
    alpha=0.25,
)
_define(
    "galore_muon",
    "sumo",
    "Muon in GaLore's subspace: SUMO without exact factor, transport and residual",
    "the ablation between GaLore (arXiv 2403.03507) and SUMO (arXiv 2505.24749)",
    base="sumo_paper",
    side="long",
    basis="svd",
    transport=False,
    momentum_form="ema",
    nesterov=True,
    orthogonalizer="newton_schulz",
    orthogonalizer_dtype="auto",
    residual_scale=0.0,
)
_define(
    "adamw",
    "adamw",
    "AdamW on every parameter (torch's fused kernel)",
    "Loshchilov & Hutter 2019, arXiv 1711.05101",
    lr=1e-3,
    weight_decay=0.1,
    betas=(0.9, 0.95),
    eps=1e-8,
    rounding="nearest",
    seed=0,
)


@lru_cache(maxsize=1)
def _entry_points() -> Mapping[str, Any]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def names() -> list[str]:
    """Every name that `optimizers.build` takes: the presets, then rules that other packages bring.

    Plug-in rules are only listed here, not imported.
    """
    return [*PRESETS, *(name for name in _entry_points() if name not in PRESETS)]


def preset(name: str) -> Preset:
    """The preset of this name. A plug-in rule is imported (with torch) to learn its options.

    Raises:
        OptionError: no preset or plug-in has this name.
    """
    if name in PRESETS:
        return PRESETS[name]
    if name in _entry_points():
        rule = plugin_rule(name)
        return Preset(name, name, MappingProxyType({**PLUGIN_COMMON, **rule.defaults}), rule.doc, rule.source)
    raise OptionError("name", name, "is not an optimizer", names(), closest(name, names()))


def plugin_rule(name: str) -> Any:
    """Load the rule of another package by its entry point, and check it (imports torch).

    Raises:
        OptionError: no entry point has this name, or what it loads is not what a rule has to be.
    """
    if name not in _entry_points():
        raise OptionError("name", name, "is not an optimizer", names(), closest(name, names()))
    point = _entry_points()[name]
    if point not in _RULES:
        from optimizers.rule_checks import checked

        _RULES[point] = checked(name, point)
    return _RULES[point]


_RULES: dict[Any, Any] = {}
"""Entry point → its rule, once it is checked."""


def options_of(name: str) -> Mapping[str, Option]:
    """Return what the options of a preset mean and allow: `OPTIONS`, and those of a rule of another package.

    Raises:
        OptionError: no preset or rule has this name.
    """
    if name in PRESETS:
        return OPTIONS
    from optimizers.rule_checks import own_options

    return {**OPTIONS, **own_options(name, plugin_rule(name))}


def resolve(name: str, overrides: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Full option values of a preset with some of them replaced.

    Args:
        name: a preset of `names()`.
        overrides: option → value; numbers, booleans, words and pairs as YAML or Python give them.

    Returns:
        Every option of the preset's rule with its value, in the preset's order.

    Raises:
        OptionError: unknown name, an option that this rule does not have, a wrong type or value, or values
            that exclude each other.
    """
    values = dict(preset(name).options)
    known = options_of(name)
    for key, value in overrides.items():
        if key not in values:
            raise OptionError(
                key, value, f"is not an option of {name}", sorted(values), closest(key, list(values))
            )
        values[key] = known[key].check(value)
    limits_residual = (
        values.get("norm_growth_limit") is not None and values["norm_growth_target"] == "residual"
    )
    if limits_residual and values["residual_scale"] == 0:
        raise OptionError("norm_growth_target", "residual", "limits nothing where residual_scale is 0")
    return values


def default_rank(rows: int, columns: int) -> int:
    """Rank where `rank` is null: a quarter of the short side (GaLore's choice at most sizes), at least 1."""
    return max(1, min(rows, columns) // 4)


def rank_limit_check(options: Mapping[str, Any], shapes: Iterable[tuple[str, tuple[int, int]]]) -> None:
    """Refuse a rank larger than a side of a matrix that takes the rule. Torch-free, from shapes alone.

    Args:
        options: resolved options; without a rank (Muon, AdamW, or null) nothing is checked.
        shapes: (name, (rows, columns)) of the matrices that would take the matrix rule.

    Raises:
        OptionError: naming the first matrix whose short side is smaller than the rank, and the largest rank
            that all matrices allow.
    """
    rank = options.get("rank")
    if rank is None:
        return
    sides = [(name, shape) for name, shape in shapes]
    limit = min((min(shape) for _, shape in sides), default=rank)
    for name, (rows, columns) in sides:
        if rank > min(rows, columns):
            raise OptionError(
                "rank",
                rank,
                f"is larger than a side of {name} ({rows}×{columns})",
                (f"1 to {limit}", "null (a quarter of each matrix's short side)"),
                str(limit),
            )
