"""The run that certifies a cell, and the cells of defects and of other implementations.

`harness.verify.grid` chooses the cells of optbench's rules. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.record.certificates import ADAPTERS, CERTIFIED_VALUES, TASKS, Cell
from harness.verify import task_rows
from optimizers import presets

EXAMPLE_RULE = "unit_momentum"
"""The plug-in rule that is certified like the built-in rules: `harness.verify.example_rule`, by its entry point."""

STEPS = 6
REFRESH_INTERVAL = 3
REFERENCE_STEPS = 4
MAX_NORM = 0.3
"""Bites in every step: the raw norms are 0.48 and more."""
RAISED_CUT = 0.1
"""Cut of the factor in "dwh" cells, relative to σ1, so that a part of each moment is dropped. A lower one would show
the rounding of fp32 moments, eps32/cut over the gap between singular values, and not errors."""

# Between the uneven sizes below and 2, 3 and 4 processes every layout shows its edges: short last shards (173
# rows), a row broken between the two halves of ZeRO-1 (115.5 rows), matrices of which a rank holds nothing. No
# matrix is square and attention is far from uniform, so that moments are of full rank (κ below 1,000): with the
# usual initialization they are not, and the exact polar factor turns fp32 rounding into percents, in one process as
# in many, which would hide an engine's error.
_MODEL = (
    "model=llama_tiny",
    "model.config.hidden_size=64",
    "model.config.intermediate_size=173",
    "model.config.num_hidden_layers=3",
    "model.config.num_attention_heads=4",
    "model.config.num_key_value_heads=2",
    "model.config.head_dim=24",
    "model.config.initializer_range=0.1",
)
_PRETRAIN = ("data=kjv", "eval.tokens=64")
_RUN = (
    f"steps={STEPS}",
    "batch_size=24",
    "seq_len=32",
    "schedule.warmup=0",
    "moments.every=null",
    "eval.every=null",
    "wandb.mode=disabled",
)
# Updates about as large as the weights (standard deviation 0.1; norms start at 1), so that the grid of fp32
# weights costs a replay no more than the arithmetic does. 0.05 suits a rule whose elements move by 0.1 to 1 of `lr`;
# one with smaller updates gets its rate here (its replay error is above the bound otherwise).
_LR = {
    "adamw": 0.05,
    "galore": 0.1,
    "fira": 0.1,
    "apollo": 0.1,
    "apollo_mini": 0.01,
    "subtrack": 0.1,
    "muon": 0.1,
    "muon_svd": 0.1,
    "muon_polar_express": 0.1,
}
_OTHER_LR, _AUX_LR = 0.05, 0.05
_FULL_RANK_PROBABILITY = 0.5
"""So that both kinds of period of GUM occur in a few steps."""

_BATCH = 24
_POLYNOMIAL = ("newton_schulz", "cubic", "polar_express")


def rules() -> list[str]:
    """Return every rule that can be certified: the presets, installed plug-in rules, and the example rule."""
    return [*presets.names(), *([EXAMPLE_RULE] if EXAMPLE_RULE not in presets.names() else [])]


def controls() -> list[Cell]:
    """Return the cells of `harness.verify.controls`, whose defects must show."""
    return [replace(cell, control=name) for name, (cell, _) in CONTROLS.items()]


CONTROLS: Mapping[str, tuple[Cell, str]] = {
    "shard-local Newton–Schulz": (Cell("muon", "fsdp2"), "each rank orthogonalizes the rows that it holds"),
    "clipping after orthogonalization": (
        Cell("muon", "ddp"),
        "the update is clipped instead of the gradient",
    ),
    "micro-batch momentum": (
        Cell("muon", "ddp", accumulation=2),
        "momentum and Newton–Schulz run once per micro-batch",
    ),
    "no matrix routed": (Cell("muon", "fsdp2"), "AdamW steps everything under Muon's name"),
    "unsynchronized basis, shards": (
        Cell("sumo", "fsdp2"),
        "each rank sketches its rows with its own test matrix",
    ),
    "unsynchronized basis, replicas": (Cell("sumo", "ddp"), "each replica computes its own basis"),
    "smooth cut": (
        Cell("sumo", "fsdp2", variant="dwh"),
        "the factor of CUDA keeps directions just below the cut",
    ),
    "clipping forgotten": (Cell("muon", "ddp"), "gradients arrive unclipped"),
    "gradients halved": (Cell("sumo", "fsdp2", clipping="off"), "gradients are averaged once too often"),
}
"""Name of a defect → the cell in which it must be detected, and what is wrong. The last two pass wrong gradients to
the optimizer, which a replay cannot detect."""


def peers() -> list[Cell]:
    """Return the cells of other implementations of Muon (`harness.verify.peers`), measured like ours."""
    selected = [
        Cell("torch.optim.Muon", "fsdp2"),
        *(Cell("DeepSpeed Muon", f"zero{stage}", clipping="off") for stage in (1, 2, 3)),
        Cell("DeepSpeed Muon", "zero1", variant="default clipping"),
        Cell("DeepSpeed Muon", "zero3", accumulation=2, clipping="off"),
    ]
    return [replace(cell, is_peer=True) for cell in selected]


def reference_of(cell: Cell) -> Cell:
    """Return the cell that the end-to-end error is measured against: one fp32 process; for a peer, with our Muon.

    For the exact factor of CUDA it has that of CPUs, at the same cut.
    """
    learned = ", ".join(filter(None, (task_of(cell), adapter_of(cell))))
    variant = "gram" if cell.variant == "dwh" else learned
    return Cell(
        _rule(cell),
        "single",
        clipping=cell.clipping,
        world_size=1,
        variant=variant,
        options=cell.options,
        is_peer=cell.is_peer,
    )


def task_of(cell: Cell) -> str:
    """Return what a cell learns besides next tokens: "classify" or "answer"; empty: it pretrains."""
    return next((word for word in cell.variant.split(", ") if word in TASKS), "")


def adapter_of(cell: Cell) -> str:
    """Return the adapter that is trained in place of the weights; empty: none."""
    return next((word for word in cell.variant.split(", ") if word in ADAPTERS), "")


def raises_cut(cell: Cell) -> bool:
    """Return True if a cell is run and replayed with `harness.verify.cut`."""
    return cell.variant in ("dwh", "gram")


def _rule(cell: Cell) -> str:
    return "muon" if cell.is_peer else cell.rule


def orthogonalizes(cell: Cell) -> bool:
    """Return True if the rule applies an orthogonal factor, at the cell's options."""
    return cell.rule in presets.PRESETS and "orthogonalizer" in _options(cell)


def _options(cell: Cell) -> Mapping[str, Any]:
    """Return the options of a cell's preset with the cell's own values.

    Which options there are depends on those values: ``inner=sign`` has no orthogonalizer.
    """
    rule = _rule(cell)
    if not cell.options:
        return presets.preset(rule).options
    return presets.resolve(rule, option_values_of(cell.options))


def takes_any_exact_factor(rule: str) -> bool:
    """Return True if the rule's exact factor is the one of the device."""
    return rule in presets.PRESETS and presets.PRESETS[rule].options.get("orthogonalizer") == "auto"


def is_rounded(rule: str) -> bool:
    """Return True if the rule iterates in bf16 on devices that are fast at it; certificates use fp32 instead."""
    options = presets.PRESETS[rule].options if rule in presets.PRESETS else {}
    return options.get("orthogonalizer_dtype") == "auto" and options["orthogonalizer"] in _POLYNOMIAL


def option_values_of(words: str) -> dict[str, Any]:
    """Return option → value of ``key=value`` words that are separated by spaces."""
    return {key: _parsed(key, value) for key, _, value in (word.partition("=") for word in words.split())}


def _parsed(key: str, value: str) -> Any:
    option = presets.OPTIONS[key]
    if option.type in ("int", "float"):
        return float(value)
    by_word = {"true": True, "false": False, **{str(choice): choice for choice in option.choices}}
    return by_word.get(value, value)


def overrides(cell: Cell, runs_dir: str, orthogonalizer_dtype: str = "float32") -> list[str]:
    """Return the configuration of a cell's run, as ``key=value`` overrides.

    Args:
        cell: which.
        runs_dir: a writable folder; only the rows of a task are written there.
        orthogonalizer_dtype: of polynomial orthogonalizers.
    """
    rule = _rule(cell)
    options = _options(cell)
    # DeepSpeed keeps a learning rate of its own, which our schedule does not reach.
    words = ["schedule=constant"] if cell.is_peer else []
    task = task_of(cell)
    words += [
        *_MODEL,
        *_RUN,
        *((*task_rows.data_words(Path(runs_dir)), *task_rows.task_words(task)) if task else _PRETRAIN),
        f"runs_dir={runs_dir}",
        f"micro_batch_size={_BATCH // (cell.world_size * cell.accumulation)}",
        f"engine={cell.engine}",
        f"world_size={cell.world_size}",
        f"precision={cell.dtype}",
        f"max_grad_norm={MAX_NORM if cell.clipping == 'on' else 'null'}",
        f"optimizer={rule}",
        f"optimizer.lr={_LR.get(rule, _OTHER_LR)}",
    ]
    if adapter_of(cell):
        # B starts as zero, so the first gradients are small: with this factor clipping bites in all of them.
        words += [f"model.adapter={adapter_of(cell)}", "model.lora.rank=8", "model.lora.alpha=128"]
    if cell.variant == "dwh":
        words.append("optimizer.orthogonalizer=dwh")
    if cell.engine == "hsdp":
        words.append("engine.replicas=2")
    if cell.variant == "columns":
        words.append("engine.shard_axis=1")
    if cell.engine in ("ddp", "zero0"):
        words.append(f"engine.optimizer_work={'split' if cell.variant == 'split' else 'replicated'}")
    for option, value in (
        ("aux_lr", _AUX_LR),
        ("refresh_interval", REFRESH_INTERVAL),
        ("orthogonalizer_dtype", orthogonalizer_dtype),
        *CERTIFIED_VALUES.items(),
        ("full_rank_probability", _FULL_RANK_PROBABILITY),
    ):
        # Presets that renew their subspace in every step do it here, too.
        if option in options and (option != "refresh_interval" or options[option] > 1):
            words.append(f"optimizer.{option}={value}")
    return [*words, *(f"optimizer.{word}" for word in cell.options.split())]
