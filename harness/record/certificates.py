"""Look up which shipped certificate covers a run, and whether the code has changed since. Torch-free."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.config.schema import RunConfig
from optimizers import presets
from optimizers.refresh_schedule import STAGGERED_SIDE

SHIPPED = Path(__file__).with_name("certificates.json")
"""Written by `make certify`."""

_SOURCES = (
    "optimizers",
    "harness/engines",
    "harness/loop.py",
    "harness/protocols.py",
    "harness/devices.py",
    "harness/optimizer.py",
    "harness/tracked_optimizer.py",
    "harness/data/micro_batches.py",
    "harness/model/attention.py",
    "harness/model/linear_loss.py",
    "harness/model/loss.py",
    "harness/tasks/answer.py",
    "harness/tasks/classification.py",
    "harness/tasks/samples.py",
)
"""Files and folders that a certificate covers."""

ENGINES: Mapping[str, int] = {
    "single": 1,
    "ddp": 2,
    "fsdp2": 2,
    "hsdp": 4,
    "zero0": 2,
    "zero1": 2,
    "zero2": 2,
    "zero3": 2,
}
"""Engine → processes of its cells."""

LAYOUTS: Mapping[str, str] = {
    "single": "replicated",
    "ddp": "replicated",
    "zero0": "replicated",
    "fsdp2": "sharded",
    "hsdp": "sharded, replicated",
    **{f"zero{stage}": f"partitioned {stage}" for stage in (1, 2, 3)},
}
"""Engine → class of its layout: a rule that is certified on one engine of a class is certified on the others."""

CROSSED = ("sumo", "muon", "adamw")
"""Rules that are certified on every engine in the plainest setting."""

TASKS = ("classify", "answer")
"""Tasks other than pretraining: variants of cells."""

ADAPTERS = ("lora",)
"""Adapters, which are trained in place of the weights: variants of cells."""

_NUMBERS = ("float", "int", "betas")
UNCERTIFIED_OPTIONS = (
    *("rank", "max_side", "aux_lr", "orthogonalizer_dtype", "gram_dtype", "rounding", "seed"),
    *("average_decay", "matrix_modules"),
)
"""Options that may differ from the preset's: sizes, what a certificate fixes itself, what changes no weight, and which
weights take the rule and which AdamW: cells hold some of both."""

CERTIFIED_VALUES: Mapping[str, str] = {"gram_dtype": "float64"}
"""Options that every cell sets because the preset's value is not reproducible; runs with another are not covered."""


@dataclass(frozen=True, order=True)
class Cell:
    """One combination that is certified by a run.

    Attributes:
        rule: preset, plug-in rule, or the name of a peer.
        engine: as in ``engine=``.
        dtype: "fp32", or "bf16" (mixed precision over fp32 weights).
        accumulation: micro-batches per process and step.
        clipping: "on": `MAX_NORM` bites in every step; "off".
        world_size: processes.
        variant: "", "split" (``engine.optimizer_work=split``), "dwh" (the exact factor of CUDA), "columns" (sharded
            along axis 1), a task other than pretraining, an adapter, or several, separated by ", ". "gram": the factor
            of CPUs, in the reference of a "dwh" cell.
        options: optimizer options that differ from the preset's, ``key=value`` separated by spaces, in order.
        control: name of the defect that is put in (`harness.verify.controls`); "": none.
        is_peer: another implementation, shown next to ours and never counted.
    """

    rule: str
    engine: str
    dtype: str = "fp32"
    accumulation: int = 1
    clipping: str = "on"
    world_size: int = 2
    variant: str = ""
    options: str = ""
    control: str = ""
    is_peer: bool = False

    def __str__(self) -> str:
        words = [f"{self.rule} × {self.engine} × {self.dtype} × accumulation {self.accumulation}"]
        words.append(f"clipping {self.clipping}")
        extras = [self.variant, self.options, self.control, f"{self.world_size} ranks"]
        return " × ".join(words) + f" ({', '.join(word for word in extras if word)})"

    @property
    def is_base(self) -> bool:
        """True for the cell of its (rule, engine) in the plainest setting."""
        return self == Cell(self.rule, self.engine, world_size=ENGINES.get(self.engine, 2))

    def as_dict(self) -> dict[str, Any]:
        """Return the cell as it is in the JSON document."""
        return {**asdict(self), "is_control": bool(self.control)}


def of_run(config: RunConfig, document: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the certificate of a run's cell, for its record.

    Args:
        config: checked.
        document: certificates.json; None: the shipped one.

    Returns:
        "passed" (None: the cell has none, and "reason" says why), "cell", "replay_error", "coverage" ("exact";
        "pairwise": by the cells under "by", of the rule in this class of layouts, of this setting of the engine, and of
        each variant and option) and "current" (false: the sources have changed since).
    """
    document = _shipped() if document is None else document
    cell = cell_of(config)
    uncertified: dict[str, Any] = {"cell": _key(cell), "passed": None}
    if config.optimizer.target is not None:
        return {**uncertified, "reason": "an optimizer by import path has no rule to replay"}
    certified = {
        _key(known): entry
        for entry in document.get("cells", [])
        if not entry["is_control"] and not entry["is_peer"] and (known := _of(entry)).world_size != 3
    }
    parts, missing = ([_key(cell)], []) if _key(cell) in certified else _cover(cell, certified)
    if missing:
        return {**uncertified, "reason": "uncertified: " + ", ".join(missing)}
    entries = [certified[part] for part in parts]
    return {
        "cell": _key(cell),
        "passed": all(entry["passed"] for entry in entries),
        "replay_error": max(
            (e["replay_error"] for e in entries if e["replay_error"] is not None), default=None
        ),
        "coverage": "exact" if len(parts) == 1 else "pairwise",
        "by": parts,
        "current": document.get("sources_sha256") == _imported_sources_sha256(),
    }


def warning(certificate: Mapping[str, Any]) -> str | None:
    """Return what a reader of the run must know; None where it is certified."""
    if certificate["passed"]:
        return None
    if certificate["passed"] is None:
        return f"no certificate for {certificate['cell']}: {certificate['reason']}"
    return f"{certificate['cell']} failed its certificate"


def cell_of(config: RunConfig) -> Cell:
    """Return the cell of a checked run; world size and rank are not part of its key."""
    assert config.world_size is not None
    assert config.micro_batch_size is not None
    # Certificates tell accumulation from none, not how much of it.
    accumulates = config.batch_size > config.world_size * config.micro_batch_size
    is_split = config.engine.optimizer_work == "split"
    variants = (
        ("split", is_split),
        ("dwh", _has_the_factor_of_cuda(config)),
        ("columns", config.engine.shard_axis == 1),
        (config.task.name, config.task.name != "pretrain"),
        (config.model.adapter or "", config.model.adapter is not None),
    )
    return Cell(
        rule=config.optimizer.target or config.optimizer.name,
        engine=config.engine.name,
        dtype=config.precision,
        accumulation=2 if accumulates else 1,
        clipping="off" if config.max_grad_norm is None else "on",
        world_size=config.world_size,
        variant=", ".join(word for word, applies in variants if applies),
        options=" ".join(_changed_options(config)),
    )


def option_word(key: str, value: Any) -> str:
    """Return an option as ``key=value``, as the command line takes it."""
    if isinstance(value, bool) or value is None:
        return f"{key}={json.dumps(value)}"
    return f"{key}={value}"


def sources_sha256() -> str:
    """Return the hash of the code that a certificate covers, without its comments, docstrings and layout.

    A corrected sentence must not cost eight minutes of certification, so the hash is taken of the syntax trees.
    """
    total = hashlib.sha256()
    # Paths belong to the hash: a module under another name is another import.
    for name in _SOURCES:
        place = _package(name.partition("/")[0]).parent / name
        for path in [place] if place.suffix else sorted(place.rglob("*.py")):
            relative = path.relative_to(place.parent).as_posix()
            total.update(f"{relative}\0{code_sha256(path.read_text(encoding='utf-8'))}\0".encode())
    return total.hexdigest()


@lru_cache(maxsize=1024)
def code_sha256(source: str) -> str:
    """Return the hash of a module's syntax tree without docstrings and other string statements; remembered by text."""
    parts: list[str] = []
    _add_canonical(ast.parse(source), parts)
    return hashlib.sha256("".join(f"{part}\0" for part in parts).encode()).hexdigest()


def _add_canonical(node: object, parts: list[str]) -> None:
    """Append a syntax tree's node names and values in order, the same under every Python version.

    `ast.dump` is not used: which empty fields it prints, and which fields a node has, differs between versions.
    Every run waits for this, so it appends to one list: generators that delegate to each other take twice as long.
    """
    if isinstance(node, ast.AST):
        parts.append(type(node).__name__)
        for field in node._fields:
            # Absent and empty fields are left out: newer Pythons add such fields (type_params). `kind` only says
            # whether a string was written with a u prefix.
            value = getattr(node, field, None)
            if value is not None and value != [] and field not in ("kind", "type_comment", "ctx"):
                parts.append(field)
                _add_canonical(value, parts)
    elif isinstance(node, list):
        for item in node:
            if not _is_string_statement(item):
                _add_canonical(item, parts)
        parts.append("]")
    else:
        parts.append(repr(node))


def _is_string_statement(node: object) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@lru_cache(maxsize=1)
def _imported_sources_sha256() -> str:
    # Read once: the code of a running process does not change, and `certify` asks `sources_sha256` afresh.
    return sources_sha256()


@lru_cache(maxsize=1)
def _shipped() -> Mapping[str, Any]:
    return json.loads(SHIPPED.read_text(encoding="utf-8")) if SHIPPED.exists() else {}


def _changed_options(config: RunConfig) -> list[str]:
    """Return the options of a run that differ from its preset's in more than a number, and a refresh that is spread."""
    if config.optimizer.target is not None:
        return []
    preset = presets.preset(config.optimizer.name)
    has_own_cells = ("orthogonalizer",) if _has_the_factor_of_cuda(config) else ()
    options = config.optimizer.options
    words = [
        option_word(key, value)
        for key, value in options.items()
        if key not in has_own_cells and _is_other(preset.options.get(key), value, key)
    ]
    words += [
        option_word(key, options[key])
        for key, value in CERTIFIED_VALUES.items()
        if options.get(key, value) != value
    ]
    # "auto" is no other path for matrices as small as those of the cells.
    if options.get("refresh_stagger") == "auto" and _has_large_matrices(config):
        words.append(option_word("refresh_stagger", True))
    return sorted(set(words))


def _has_large_matrices(config: RunConfig) -> bool:
    width = config.model.config.get("hidden_size")
    return isinstance(width, int) and width >= STAGGERED_SIDE


def _has_the_factor_of_cuda(config: RunConfig) -> bool:
    """Return True if a preset that leaves the exact method to the device runs with that of CUDA."""
    if config.optimizer.target is not None or config.optimizer.options.get("orthogonalizer") != "dwh":
        return False
    return presets.preset(config.optimizer.name).options.get("orthogonalizer") == "auto"


def _is_other(default: Any, value: Any, key: str) -> bool:
    """Return True if an option takes another path through the code than the preset's, not only another number."""
    option = presets.OPTIONS.get(key)
    if key in UNCERTIFIED_OPTIONS or option is None:
        return False
    if (key, default, value) == ("refresh_stagger", "auto", False):
        return False  # what "auto" is for matrices as small as those of the cells
    if option.type in _NUMBERS:
        return (default is None) != (value is None)
    return (list(value) if isinstance(value, tuple) else value) != (
        list(default) if isinstance(default, tuple) else default
    )


def _cover(cell: Cell, certified: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the keys of cells that cover one together, and what none covers.

    Needed are: its rule in its class of layouts; its setting of the engine, under any rule; each of its variants on the
    engine; its task, its adapter and each of its options, in the class of layouts, also where a preset has that value.
    """
    known = {key: _of(entry) for key, entry in certified.items()}
    setting = (cell.engine, cell.dtype, cell.accumulation, cell.clipping)
    needed: list[tuple[str, Callable[[Cell], bool]]] = [
        (
            f"{cell.rule} × {LAYOUTS[cell.engine]}",
            lambda c: c.rule == cell.rule and not c.options and c.variant in ("", "columns"),
        ),
        (" × ".join(map(str, setting)), lambda c: (c.engine, c.dtype, c.accumulation, c.clipping) == setting),
    ]
    for variant in filter(None, cell.variant.split(", ")):
        if variant in (*TASKS, *ADAPTERS):
            # A task changes the loss, an adapter the weights: what a layout receives alike on all engines of its class.
            needed.append((f"{variant} × {LAYOUTS[cell.engine]}", lambda c, v=variant: c.variant == v))
            continue
        needed.append(
            (f"{variant} × {cell.engine}", lambda c, v=variant: (c.engine, c.variant) == (cell.engine, v))
        )
    for word in cell.options.split():
        needed.append((f"{word} × {LAYOUTS[cell.engine]}", lambda c, w=word: _has_option(c, w)))
    parts, missing = [], []
    for what, covers in needed:
        found = [
            key
            for key, other in known.items()
            if LAYOUTS.get(other.engine) == LAYOUTS[cell.engine] and covers(other)
        ]
        # The nearest one: of this rule, engine and setting where there is one.
        near = max(found, key=lambda key: _likeness(known[key], cell), default=None)
        (parts.append(near) if near else missing.append(what))
    return list(dict.fromkeys(parts)), missing


def _has_option(cell: Cell, word: str) -> bool:
    """Return True if a cell ran with an option, its own or its preset's; of a number it counts that there is one."""
    key, _, value = word.partition("=")
    if key in CERTIFIED_VALUES:
        return value == CERTIFIED_VALUES[key]
    option = presets.OPTIONS.get(key)
    own = {name: text for name, _, text in (part.partition("=") for part in cell.options.split())}
    if key in own:
        found: str | None = own[key]
    else:
        preset = presets.PRESETS.get(cell.rule)
        found = (
            option_word(key, preset.options[key]).partition("=")[2]
            if preset and key in preset.options
            else None
        )
    if option is not None and option.type in _NUMBERS:
        return found is not None and (found == "null") == (value == "null")
    return found == value


def _likeness(known: Cell, cell: Cell) -> tuple[bool, ...]:
    return (
        known.engine == cell.engine,
        known.rule == cell.rule,
        not known.variant and not known.options,
        (known.dtype, known.accumulation, known.clipping) == (cell.dtype, cell.accumulation, cell.clipping),
        known.rule in CROSSED,
    )


def _key(cell: Cell) -> str:
    words = [
        cell.rule,
        cell.engine,
        cell.dtype,
        f"accumulation {cell.accumulation}",
        f"clipping {cell.clipping}",
    ]
    return " × ".join([*words, *filter(None, (cell.variant, cell.options))])


def _of(entry: Mapping[str, Any]) -> Cell:
    keys = ("rule", "engine", "dtype", "accumulation", "clipping", "world_size", "variant")
    return Cell(**{key: entry[key] for key in keys}, options=entry.get("options", ""))
