"""An optimizer by import path: its module must be installed or in the working folder, and hold the class. No torch."""

from __future__ import annotations

import ast
import importlib.util
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from harness.errors import InputError, closest

KEY = "optimizer.target"
_DISTRIBUTIONS = {"pytorch_optimizer": "pytorch-optimizer", "galore_torch": "galore-torch"}
"""Module → name on the package index, of the packages that the documentation names. No other name is ever advised: it
could be a stranger's."""


def check(target: str, folder: Path | None = None) -> None:
    """Refuse an import path that no training process could import.

    Nothing is imported: the code of a module runs in the training processes only.

    Args:
        target: module path and class, e.g. ``pytorch_optimizer.SOAP``.
        folder: where modules are looked for after the installed ones; None: the working folder.

    Raises:
        InputError: no import path, a module that is nowhere, or a file that does not parse or lacks the class.
    """
    if "." not in target or not all(part.isidentifier() for part in target.split(".")):
        raise InputError(KEY, target, allowed="an import path, package.Class", fix=f"{KEY}=torch.optim.SGD")
    module, _, name = target.rpartition(".")
    spec = _find(module.partition(".")[0], folder or Path.cwd())
    if spec is None:
        raise _not_found(target, module, folder or Path.cwd())
    file = _file_of(module, spec)
    if file is not None:
        _check_file(target, name, file)


def _find(package: str, folder: Path) -> ModuleSpec | None:
    """Find the installed module of this name, else the one in the folder."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError, AttributeError):
        spec = None
    return spec or PathFinder.find_spec(package, [str(folder)])


def _file_of(module: str, spec: ModuleSpec) -> Path | None:
    """Return the source of a user's module; None for installed packages, which may create classes dynamically."""
    if spec.origin is None or not spec.origin.endswith(".py") or "site-packages" in spec.origin:
        return None
    if Path(spec.origin).is_relative_to(Path(ast.__file__).parent) or module.split(".")[0] == "torch":
        return None
    if "." not in module:
        return Path(spec.origin)
    *inside, last = module.split(".")[1:]
    place = Path(spec.origin).parent.joinpath(*inside)
    return next(
        (path for path in (place / f"{last}.py", place / last / "__init__.py") if path.is_file()), None
    )


def _check_file(target: str, name: str, file: Path) -> None:
    try:
        body = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        where = f"{file}, line {line}," if line else f"{file}"
        raise InputError(
            KEY, target, f"is in {where} which does not parse ({error})", fix=f"correct {file}"
        ) from None
    names: set[str] = set()
    for statement in body:
        if isinstance(statement, ast.ClassDef):
            names.add(statement.name)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in statement.names}
        elif not isinstance(statement, ast.Expr):
            return  # assignments, conditions: the class may come from anywhere
    if name in names or "*" in names:
        return
    classes = [statement.name for statement in body if isinstance(statement, ast.ClassDef)]
    guess = closest(name, classes) or (classes[0] if len(classes) == 1 else None)
    module = target.rpartition(".")[0]
    fix = f"optimizer={module}.{guess}" if guess else f"add a torch.optim.Optimizer {name} to {file}"
    reason = f"names the class {name}, which {file} does not hold"
    raise InputError(KEY, target, reason, allowed=classes, suggestion=guess, fix=fix)


def _not_found(target: str, module: str, folder: Path) -> InputError:
    package = module.partition(".")[0]
    reason = (
        f"names the module {package}, which is not installed, and the working folder {folder} holds neither "
        f"{package}.py nor {package}/"
    )
    here = sorted({path.stem for path in folder.glob("*.py") if path.stem.isidentifier()})
    if guess := closest(package, here):
        meant = ".".join([guess, *target.split(".")[1:]])
        return InputError(KEY, target, reason, suggestion=meant, fix=f"optimizer={meant}")
    if package in _DISTRIBUTIONS:
        return InputError(KEY, target, reason, fix=f"pip install {_DISTRIBUTIONS[package]}")
    fix = f"start in the folder that holds {package}.py, or add that folder to PYTHONPATH"
    return InputError(KEY, target, reason, fix=fix)
