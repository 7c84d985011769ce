"""The rules: one a file, each straight-line tensor code over stacks of same-shape matrices."""

from __future__ import annotations

from importlib import import_module

from optimizers.presets import PRESETS, plugin_rule
from optimizers.rules.rule import Rule, Update

__all__ = ["Rule", "Update", "load"]


def load(name: str) -> Rule:
    """The matrix rule of this name: a module of this package, or the entry point of another.

    Raises:
        OptionError: there is none, or it is not what a rule has to be.
    """
    if any(name == preset.rule for preset in PRESETS.values()):
        return import_module(f"optimizers.rules.{name}").RULE
    return plugin_rule(name)
