"""A class that is imported outside its package has a name of its own in the whole project."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("optimizers", "harness", "analysis")


def shared_names(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Return class name → modules that define it, if several do and one of them is imported from another package.

    Args:
        sources: dotted name of a module (packages end with ``.__init__``) → its text.
    """
    definitions: dict[str, list[str]] = {}
    imports: set[tuple[str, str]] = set()
    for module, text in sources.items():
        tree = ast.parse(text)
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                definitions.setdefault(node.name, []).append(module)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and _package(node.module) != _package(module):
                imports |= {(node.module, alias.name) for alias in node.names}
    return {
        name: modules
        for name, modules in definitions.items()
        if len(modules) > 1 and any((module, name) in imports for module in modules)
    }


def _package(module: str) -> str:
    return module.rpartition(".")[0]


def test_classes_imported_across_packages_have_unique_names() -> None:
    sources = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text()
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }
    assert shared_names(sources) == {}


def test_control_two_classes_of_one_name() -> None:
    one, two = "class Row: ...\n", "class Row: ...\nclass _Own: ...\n"
    near, far = "from a.one import Row\n", "def f():\n    from a.one import Row\n"
    assert shared_names({"a.one": one, "b.two": two, "c.three": far}) == {"Row": ["a.one", "b.two"]}
    # Used in its own package only; one class of the name; a private class.
    assert shared_names({"a.one": one, "b.two": two, "a.three": near}) == {}
    assert shared_names({"a.one": one, "c.three": far}) == {}
    assert (
        shared_names({"a.one": two, "b.two": "class _Own: ...\n", "c.three": "from a.one import _Own\n"})
        == {}
    )
