"""Imports go down only: no cycles between packages, and in harness from floor to floor."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("optimizers", "harness", "analysis")
FLOORS: tuple[tuple[str, ...], ...] = (
    ("audit", "cli", "train"),
    ("clean", "completion", "doctor", "export", "listing"),
    ("jobs", "plan", "verify"),
    ("worker",),
    ("run",),
    ("recorder",),
    ("summary", "optimizer"),
    ("preparation",),
    ("tasks",),
    ("engines", "probes", "checkpoint", "record", "data", "model"),
    ("loop",),
    ("protocols", "profiling", "schedule", "tracked_optimizer", "devices", "memory_phases"),
    ("command_help", "command_line"),
    ("commands", "console", "output"),
    ("config", "process"),
    ("files",),
    ("errors", "redaction", "visible", "import_path", "device_specs", "gpu_facts", "memory_snapshot"),
)
"""Modules and packages of harness, from the highest floor to the lowest; an import leads to a lower floor."""

ONE_NODE = {"optimizers.rule": "optimizers.interfaces"}
"""The contract of rules and layouts is one idea in two files, so that a rule's options are read without torch."""

Graph = dict[str, dict[str, str]]
"""Package → imported package → one place of the import, ``file:line``."""


def import_graph(root: Path, packages: tuple[str, ...] = PACKAGES) -> Graph:
    """Return which packages import which, function-level and type-checking imports included.

    A node is a top-level package's module (``harness.loop``) or sub-package (``harness.engines``).
    """
    modules = {_module(path, root): path for name in packages for path in sorted((root / name).rglob("*.py"))}
    graph: Graph = {}
    for module, path in modules.items():
        source = _node(module)
        graph.setdefault(source, {})
        for target, line in _imports(path, modules):
            if _node(target) != source:
                graph[source].setdefault(_node(target), f"{path.relative_to(root)}:{line}")
    return graph


def _module(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _node(module: str) -> str:
    node = ".".join(module.split(".")[:2])
    return ONE_NODE.get(node, node)


def _imports(path: Path, modules: Mapping[str, Path]) -> Iterator[tuple[str, int]]:
    """Yield (imported module, line) of the imports of known modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                target = name if name in modules else node.module
                if target in modules:
                    yield target, node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in modules:
                    yield alias.name, node.lineno


def cycles(graph: Graph) -> list[frozenset[str]]:
    """Return the sets of packages that import each other, directly or through others."""
    reachable = {node: _reachable(graph, node) for node in graph}
    found = {
        frozenset({node, *(other for other in reachable[node] if node in reachable.get(other, ()))})
        for node in graph
    }
    return sorted((cycle for cycle in found if len(cycle) > 1), key=sorted)


def _reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += graph.get(node, ())
    return seen


@pytest.fixture(scope="module")
def graph() -> Graph:
    return import_graph(ROOT)


def test_packages_do_not_import_each_other_in_a_circle(graph: Graph) -> None:
    for cycle in cycles(graph):
        edges = [f"{a} → {b} ({graph[a][b]})" for a in sorted(cycle) for b in sorted(cycle & graph[a].keys())]
        pytest.fail("\n".join(edges))


def test_upper_packages_are_not_imported_by_lower_ones(graph: Graph) -> None:
    for source, targets in graph.items():
        for target, place in targets.items():
            lower, upper = (PACKAGES.index(name.split(".")[0]) for name in (source, target))
            assert upper <= lower, f"{place} imports {target}"


def test_imports_of_harness_lead_to_a_lower_floor(graph: Graph) -> None:
    floor_of = {f"harness.{name}": number for number, names in enumerate(FLOORS) for name in names}
    nodes = {node for node in graph if node.startswith("harness.")}
    assert nodes == floor_of.keys(), "FLOORS lists every module and package of harness once"
    upward = [
        f"{place}: {source} → {target}"
        for source in sorted(nodes)
        for target, place in graph[source].items()
        if target in nodes and floor_of[target] <= floor_of[source]
    ]
    assert not upward, "\n".join(upward)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from harness.b import B", [frozenset({"harness.a", "harness.b"})]),
        ("def f():\n    from harness import b", [frozenset({"harness.a", "harness.b"})]),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import harness.b",
            [frozenset({"harness.a", "harness.b"})],
        ),
        ("import json", []),
    ],
)
def test_control_a_cycle_is_found_wherever_the_import_is(
    text: str, expected: list[frozenset[str]], tmp_path: Path
) -> None:
    (tmp_path / "harness" / "b").mkdir(parents=True)
    (tmp_path / "harness" / "__init__.py").touch()
    (tmp_path / "harness" / "a.py").write_text(text)
    (tmp_path / "harness" / "b" / "__init__.py").write_text("from harness.b.inner import B")
    (tmp_path / "harness" / "b" / "inner.py").write_text("from harness.c import C")
    (tmp_path / "harness" / "c.py").write_text("import harness.a")
    found = cycles(import_graph(tmp_path, ("harness",)))
    assert [cycle - {"harness.c"} for cycle in found] == expected
