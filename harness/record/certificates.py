"""Look up which shipped certificate covers a run, and whether the code has changed since. Torch-free."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.config.schema import RunConfig
from optimizers import presets

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

CROSSED = ("sumo", "muon", "adamw")
"""Rules that between them meet every (engine, dtype, accumulation, clipping)."""

_NUMBERS = ("float", "int", "betas")
_FREE = ("rank", "aux_lr", "orthogonalizer_dtype", "rounding", "seed")
"""Options that may differ from the preset's whatever they are: sizes, and what a certificate fixes itself."""


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
        variant: "", "split" (``engine.optimizer_work=split``), "dwh" (the exact factor of CUDA), or both. "gram": the
            factor of CPUs, in the reference of a "dwh" cell.
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
    control: str = ""
    is_peer: bool = False

    def __str__(self) -> str:
        words = [f"{self.rule} × {self.engine} × {self.dtype} × accumulation {self.accumulation}"]
        words.append(f"clipping {self.clipping}")
        extras = [self.variant, self.control, f"{self.world_size} ranks"]
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
        "pairwise": of the rule on this engine and of this setting under another rule) and "current" (false: the
        sources have changed since).
    """
    document = _shipped() if document is None else document
    cell = cell_of(config)
    uncertified: dict[str, Any] = {"cell": _key(cell), "passed": None}
    reason = _uncertifiable(config)
    if reason is not None:
        return {**uncertified, "reason": reason}
    certified = {
        _of(entry): entry
        for entry in document.get("cells", [])
        if not entry["is_control"] and not entry["is_peer"] and entry["world_size"] != 3
    }
    parts = [_key(cell)] if _key(cell) in certified else _pair(cell, certified)
    if not parts:
        return {**uncertified, "reason": "uncertified cell"}
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
    variants = (("split", is_split), ("dwh", _has_the_factor_of_cuda(config)))
    return Cell(
        rule=config.optimizer.target or config.optimizer.name,
        engine=config.engine.name,
        dtype=config.precision,
        accumulation=2 if accumulates else 1,
        clipping="off" if config.max_grad_norm is None else "on",
        world_size=config.world_size,
        variant=", ".join(word for word, applies in variants if applies),
    )


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


def code_sha256(source: str) -> str:
    """Return the hash of a module's syntax tree without docstrings and other string statements."""
    total = hashlib.sha256()
    for part in _canonical(ast.parse(source)):
        total.update(part.encode() + b"\0")
    return total.hexdigest()


def _canonical(node: object) -> Iterator[str]:
    """Yield a syntax tree's node names and values in order, the same under every Python version.

    `ast.dump` is not used: which empty fields it prints, and which fields a node has, differs between versions.
    """
    if isinstance(node, ast.AST):
        yield type(node).__name__
        for field, value in ast.iter_fields(node):
            # Absent and empty fields are left out: newer Pythons add such fields (type_params). `kind` only says
            # whether a string was written with a u prefix.
            if value is not None and value != [] and field not in ("kind", "type_comment", "ctx"):
                yield field
                yield from _canonical(value)
    elif isinstance(node, list):
        for item in node:
            if not _is_string_statement(item):
                yield from _canonical(item)
        yield "]"
    else:
        yield repr(node)


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


def _uncertifiable(config: RunConfig) -> str | None:
    if config.optimizer.target is not None:
        return "an optimizer by import path has no rule to replay"
    preset = presets.preset(config.optimizer.name)
    has_own_cells = ("orthogonalizer",) if _has_the_factor_of_cuda(config) else ()
    changed = [
        key
        for key, value in config.optimizer.options.items()
        if key not in has_own_cells and _is_other(preset.options.get(key), value, key)
    ]
    return f"options that differ from the preset's: {', '.join(changed)}" if changed else None


def _has_the_factor_of_cuda(config: RunConfig) -> bool:
    """Return True if a preset that leaves the exact method to the device runs with that of CUDA."""
    if config.optimizer.target is not None or config.optimizer.options.get("orthogonalizer") != "dwh":
        return False
    return presets.preset(config.optimizer.name).options.get("orthogonalizer") == "auto"


def _is_other(default: Any, value: Any, key: str) -> bool:
    """Return True if an option takes another path through the code than the preset's, not only another number."""
    option = presets.OPTIONS.get(key)
    if key in _FREE or option is None:
        return False
    if (key, default, value) == ("refresh_stagger", "auto", False):
        return False  # what "auto" is for matrices as small as those of the cells
    if option.type in _NUMBERS:
        return (default is None) != (value is None)
    return (list(value) if isinstance(value, tuple) else value) != (
        list(default) if isinstance(default, tuple) else default
    )


def _pair(cell: Cell, certified: Mapping[str, Any]) -> list[str]:
    """Return cells that cover one: its rule on this engine, by variant, and its setting under a rule of `CROSSED`."""
    plain = [_key(Cell(cell.rule, cell.engine, variant=variant)) for variant in cell.variant.split(", ")]
    others = [_key(Cell(rule, cell.engine, cell.dtype, cell.accumulation, cell.clipping)) for rule in CROSSED]
    setting = next((other for other in others if other in certified), None)
    return [*plain, setting] if setting and all(key in certified for key in plain) else []


def _key(cell: Cell) -> str:
    words = [
        cell.rule,
        cell.engine,
        cell.dtype,
        f"accumulation {cell.accumulation}",
        f"clipping {cell.clipping}",
    ]
    return " × ".join(words + ([cell.variant] if cell.variant else []))


def _of(entry: Mapping[str, Any]) -> str:
    keys = ("rule", "engine", "dtype", "accumulation", "clipping")
    return _key(Cell(**{key: entry[key] for key in keys}, variant=entry["variant"]))
