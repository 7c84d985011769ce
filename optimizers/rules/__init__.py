"""The rules, one a file: formula, update, state, options and presets. `optimizers.presets` finds them here.

A module of this package defines ``PRESETS``, and ``RULE`` unless it is elementwise. Importing it must not import torch;
what a rule computes with comes from `optimizers.rules.parts`, which resolves its names when they are first used.
"""
