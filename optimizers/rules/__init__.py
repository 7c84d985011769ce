"""The rules: one a file, each straight-line tensor code over a batch of same-shape matrices."""

from __future__ import annotations

from importlib import import_module

from optimizers.interfaces import Rule, Update
from optimizers.presets import PRESETS, plugin_rule

__all__ = ["Rule", "Update", "load"]


def load(name: str) -> Rule:
    """Return the matrix rule of this name: of a module of this package, or of another package's entry point.

    Raises:
        OptionError: there is none, or it is not what a rule has to be.
    """
    if any(name == preset.rule for preset in PRESETS.values()):
        return import_module(f"optimizers.rules.{name}").RULE
    return plugin_rule(name)
