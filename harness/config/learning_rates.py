"""Default peak learning rates: per optimizer and model size, each with its source.

A row holds for the sizes between its two bounds; outside of all rows the nearest one is taken, with a
warning. `tuned` is true where the source searched over learning rates at that size.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Row(NamedTuple):
    """A learning rate that somebody used or measured.

    Attributes:
        smallest, largest: parameters of the models it holds for, inclusive.
        lr: peak learning rate.
        source: paper, script or measurement.
        tuned: the source searched for it at these sizes.
        aux_lr: peak learning rate of the AdamW beside a matrix rule; None: the preset's own.
    """

    smallest: float
    largest: float
    lr: float
    source: str
    tuned: bool = False
    aux_lr: float | None = None


class LearningRate(NamedTuple):
    """A default. `warning` is None where a row covers the size."""

    lr: float
    source: str
    tuned: bool
    warning: str | None
    aux_lr: float | None = None


_GALORE = "GaLore (arXiv 2403.03507), scripts/benchmark_c4"
_CONDA = "baseline of Conda's C4 scripts (github.com/jie040109/Conda), GaLore protocol"
_JORDAN = "Jordan et al. 2024 (kellerjordan.github.io/posts/muon), used at 124M"
_MATCHED = (
    "AdamW's value: update_scale=rms_max gives updates of AdamW's size (arXiv 2502.16982); "
    "SUMO's paper states none"
)

_TINY = "tuned at 1.8M, 150 steps of 2,048 tokens (docs/benchmarks.md)"

TABLE: dict[str, tuple[Row, ...]] = {
    "adamw": (
        Row(1e6, 4e6, 4e-3, _TINY, tuned=True),
        Row(50e6, 1.5e9, 1e-3, _CONDA),
        Row(6e9, 8e9, 3e-4, "LLaMA (arXiv 2302.13971), Table 2, 7B"),
    ),
    "galore": (
        Row(1e6, 4e6, 5e-3, _TINY, tuned=True, aux_lr=1.6e-2),
        Row(50e6, 1.5e9, 1e-2, f"{_GALORE}, 60M to 1B", tuned=True),
        Row(6e9, 8e9, 5e-3, f"{_GALORE}/llama_7b.sh"),
    ),
    "muon": (
        Row(1e6, 4e6, 2e-2, _TINY, tuned=True, aux_lr=1.6e-2),
        Row(100e6, 150e6, 2e-2, _JORDAN, tuned=True),
    ),
    "muon_svd": (Row(100e6, 150e6, 2e-2, f"as muon: {_JORDAN}"),),
    "muon_polar_express": (Row(100e6, 150e6, 2e-2, f"as muon: {_JORDAN}"),),
    "muon_moonlight": (Row(50e6, 1.5e9, 1e-3, _CONDA),),
    "sumo": (
        Row(1e6, 4e6, 4e-3, _TINY, tuned=True, aux_lr=1.6e-2),
        Row(50e6, 1.5e9, 1e-3, _MATCHED),
    ),
    "sumo_paper": (Row(50e6, 1.5e9, 1e-3, _MATCHED),),
    "sumo_ns5": (Row(50e6, 1.5e9, 1e-3, _MATCHED),),
    "sumo_official": (Row(50e6, 1.5e9, 1e-3, "default of SUMO's public code (sumo_optimizer.py)"),),
    "galore_muon": (Row(50e6, 1.5e9, 1e-3, _MATCHED),),
}


def default(optimizer: str, parameters: int, *, from_weights: bool = False) -> LearningRate | None:
    """Return the default peak learning rate of a preset.

    Args:
        optimizer: preset name.
        parameters: number of parameters of the model.
        from_weights: the run starts from trained weights (`model.path`), at which no row was tuned.

    Returns:
        None where the table knows nothing of this optimizer, and it is no rule of a package with an lr of its own.
    """
    rows = TABLE.get(optimizer)
    if not rows:
        lr = rule_rate(optimizer)
        return None if lr is None else LearningRate(lr, f"default of the rule {optimizer}", False, None)
    row = min(rows, key=lambda row: _distance(row, parameters))
    is_covered = _distance(row, parameters) == 0
    warnings = []
    if not is_covered:
        size = f"{parameters / 1e6:.3g}M"
        warnings.append(
            f"optimizer.lr: no default for {optimizer} at {size} parameters; {row.lr:g} is the nearest "
            f"({row.source}); give optimizer.lr=… for a fair comparison"
        )
    if from_weights:
        warnings.append(
            f"optimizer.lr: {row.lr:g} is a rate for random weights, and this run starts from trained weights, "
            f"which usually want a smaller one; give optimizer.lr=… (docs/model_path.md)"
        )
    is_tuned = row.tuned and is_covered and not from_weights
    # A source that says "tuned" at another size, or from other weights, must not read as if it were about this run.
    limits = [*(["nearest size"] if not is_covered else []), *(["random weights"] if from_weights else [])]
    source = f"{', '.join(limits)}: {row.source}" if limits else row.source
    return LearningRate(row.lr, source, is_tuned, "; ".join(warnings) or None, row.aux_lr)


def rule_rate(optimizer: str) -> float | None:
    """Return the learning rate that a rule of an installed package names itself; None: it names none."""
    from optimizers.presets import PRESETS, names, plugin_rule

    if optimizer in PRESETS or optimizer not in names():
        return None
    return plugin_rule(optimizer).defaults.get("lr")


def _distance(row: Row, parameters: int) -> float:
    """How far outside of a row a size is, as the logarithm of a factor; 0 inside."""
    size = max(parameters, 1)
    return max(0.0, math.log(row.smallest / size), math.log(size / row.largest))
