"""Every optimizer by name, with its option values: presets of `optimizers.rules`, and rules of other packages.

`resolve` merges overrides into a preset and checks names, types and ranges. docs/optimizers.md has the mathematics and
says which published variant each preset computes. Nothing here imports torch, except where it says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from optimizers.options import Option, OptionError, closest, declared
from optimizers.rule_options import NEUTRAL, CommonOptions, MatrixOptions, Preset, check_common

if TYPE_CHECKING:
    from optimizers.rule import Rule

ENTRY_POINTS = "optbench.optimizers"

PLUGIN_COMMON = MatrixOptions().values
"""What the rule of another package takes besides its own options."""

PRESETS: dict[str, Preset] = {}
OPTIONS: dict[str, Option] = {}
"""Every option of the rules here, with one meaning in each rule that has it."""

_MODULES: dict[str, Any] = {}
"""Rule → its module in `optimizers.rules`."""
_CLASSES: dict[str, type[CommonOptions]] = {}
"""Rule → the dataclass of its options."""
_PLUGIN_RULES: dict[Any, Rule] = {}
"""Entry point → its rule, once it is checked."""


def _collect() -> None:
    """Enter the presets and options of all modules of `optimizers.rules`."""
    # From the end of the alphabet, so that lists for people begin with SUMO and end with AdamW.
    package = import_module("optimizers.rules")
    for info in sorted(iter_modules(package.__path__), key=lambda info: info.name, reverse=True):
        # `parts` is a package, and what rules are built of.
        if info.ispkg:
            continue
        module = _MODULES[info.name] = import_module(f"{package.__name__}.{info.name}")
        PRESETS.update({preset.name: preset for preset in module.PRESETS})
        for value in vars(module).values():
            is_own = isinstance(value, type) and value.__module__ == module.__name__
            if is_own and issubclass(value, CommonOptions):
                _CLASSES[info.name] = value
                for name, option in declared(value).items():
                    if OPTIONS.setdefault(name, option) != option:
                        raise TypeError(f"{value.__name__}.{name}: has another meaning than in other rules")


_collect()


@lru_cache(maxsize=1)
def _entry_points() -> Mapping[str, Any]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def names() -> list[str]:
    """Return every name that `optimizers.build` takes: the presets, then rules that other packages bring.

    Plug-in rules are only listed here, not imported.
    """
    return [*PRESETS, *(name for name in _entry_points() if name not in PRESETS)]


def preset(name: str) -> Preset:
    """Return the preset of this name. A plug-in rule is imported (with torch) to learn its options.

    Raises:
        OptionError: no preset or plug-in has this name.
    """
    if name in PRESETS:
        return PRESETS[name]
    rule = plugin_rule(name)
    return Preset(name, name, MappingProxyType({**PLUGIN_COMMON, **rule.defaults}), rule.doc, rule.source)


def load_rule(name: str) -> Rule:
    """Return the matrix rule of this name (imports torch for that of another package).

    Raises:
        OptionError: there is none, or it is not what a rule has to be.
    """
    return _MODULES[name].RULE if name in _MODULES else plugin_rule(name)


def plugin_rule(name: str) -> Rule:
    """Load the rule of another package by its entry point, and check it (imports torch).

    Raises:
        OptionError: no entry point has this name, or what it loads is not what a rule has to be.
    """
    if name not in _entry_points():
        raise OptionError("name", name, "is not an optimizer", names(), closest(name, names()))
    point = _entry_points()[name]
    if point not in _PLUGIN_RULES:
        from optimizers.rule_checks import checked

        _PLUGIN_RULES[point] = checked(name, point, OPTIONS, PLUGIN_COMMON)
    return _PLUGIN_RULES[point]


def options_of(name: str) -> Mapping[str, Option]:
    """Return what the options of a preset mean and allow: `OPTIONS`, and those of a rule of another package.

    Raises:
        OptionError: no preset or rule has this name.
    """
    if name in PRESETS:
        return OPTIONS
    from optimizers.rule_checks import own_options

    return {**OPTIONS, **own_options(name, plugin_rule(name), OPTIONS)}


def resolve(
    name: str, overrides: Mapping[str, Any] = MappingProxyType({}), start: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the full option values of a preset with some of them replaced.

    Args:
        name: a preset of `names()`.
        overrides: option → value; numbers, booleans, words and pairs as YAML or Python give them.
        start: values that were resolved before, which take the place of the preset's.

    Returns:
        Every option that the preset's rule has with these values.

    Raises:
        OptionError: unknown name, an option that this rule does not have (with these values), a wrong type or value,
            or values that exclude each other.
    """
    base = preset(name)
    kind = _CLASSES.get(base.rule)
    values, known = {**base.options, **(start or {})}, options_of(name)
    # With its defaults where another value of some other option, e.g. inner=adam, gives an option its meaning.
    everything = {**(kind.defaults() if kind else {}), **values}
    for key, value in overrides.items():
        if key not in everything:
            raise OptionError(
                key, value, f"is not an option of {name}", sorted(values), closest(key, list(values))
            )
        everything[key] = known[key].check(value)
    if kind is None:
        check_common(base.rule, everything)
        return everything
    everything = kind.settled(everything, overrides)
    kept = kind.active(everything)
    for key in overrides:
        if key not in kept:
            raise OptionError(
                key,
                overrides[key],
                f"is not an option of {name} as it is set",
                sorted(kept),
                closest(key, kept),
            )
    values = {key: value for key, value in everything.items() if key in kept}
    check_common(base.rule, values)
    kind.check(values)
    return values


def identifying_options(name: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that make a run with this preset another run: not those that came later and change nothing.

    Args:
        name: of the preset, or of an optimizer that has none.
        options: resolved.
    """
    neutral = {key: (value,) for key, value in NEUTRAL.items()}
    later = {**neutral, **(PRESETS[name].later if name in PRESETS else {})}
    return {key: value for key, value in options.items() if key not in later or value not in later[key]}


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
