"""What is audited: an optimizer by import path, factory or preset, and how its parameters are passed to it.

A target is parsed in the command's own process and imported only in a process that can be ended: the code of others may
crash, print, or never return.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from harness.errors import InputError, closest, first_line
from optimizers import presets

if TYPE_CHECKING:
    import torch
    from torch import nn

PACKAGES = ("pytorch_optimizer", "torch.optim")
"""Packages that `--all` names in its help; any package can be named."""

_TARGET = re.compile(r"(?P<path>[\w.:]+)\s*(?P<call>\(.*\))?", re.DOTALL)

FORMS: Mapping[str, str] = {
    "list": "",
    "model": "it takes the model",
    "named": "it takes (name, parameter) pairs",
    "matrices": "it takes 2-D parameters only; the others are frozen",
    "groups": "its groups say use_muon: true for 2-D parameters, false for the others",
}
"""How a constructor takes its parameters → a note for the report. The first one that works is taken."""


class TargetError(Exception):
    """An optimizer that cannot be audited; the message says why, and `fix` what to type.

    Args:
        reason: one sentence, as `InputError` has it: "is not a torch.optim.Optimizer".
        fix: what to type instead.
    """

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason, fix)
        self.reason, self.fix = reason, fix

    def as_input_error(self, target: str) -> InputError:
        """Return the error that the command line prints."""
        return InputError("audit", target, self.reason, fix=self.fix or None)


@dataclass(frozen=True)
class Target:
    """An optimizer to audit, as typed; it can be sent to another process.

    Attributes:
        name: as typed, without the arguments.
        arguments: keyword arguments of its constructor.
        form: one of `FORMS`, once `probe` has found out.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    form: str = "list"

    @property
    def label(self) -> str:
        """Return the name with its arguments, as reports show it."""
        given = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
        return f"{self.name}({given})" if given else self.name

    @property
    def is_preset(self) -> bool:
        """Return True for an optimizer of this project, which knows layouts."""
        return self.name in presets.names()

    def load(self) -> Callable[..., Any]:
        """Import the class or factory.

        Raises:
            TargetError: it cannot be imported, or is neither.
        """
        return _load(self.name)

    def build(self, named: Sequence[tuple[str, nn.Parameter]], model: nn.Module | None = None) -> Any:
        """Build the optimizer over the trainable parameters, in the form that it takes.

        Args:
            named: (name, parameter), whole or as an engine holds them.
            model: that they belong to; None: a module that holds them.

        Raises:
            Exception: whatever the constructor raises.
        """
        if self.is_preset:
            import optimizers

            return optimizers.build(self.name, named, modules=model, **self.arguments)
        first = model if self.form == "model" else self.parameters(named)
        return self.load()(first, **self.arguments)

    def parameters(self, named: Sequence[tuple[str, nn.Parameter]]) -> list[Any]:
        """Return the trainable parameters in the form that the constructor takes: a list, pairs, or groups."""
        trainable = [(name, p) for name, p in named if p.requires_grad]
        if self.form == "named":
            return list(trainable)
        if self.form != "groups":
            return [p for _, p in trainable]
        matrices = [p for _, p in trainable if p.ndim >= 2]
        others = [p for _, p in trainable if p.ndim < 2]
        return [
            {"params": group, "use_muon": is_muon}
            for group, is_muon in ((matrices, True), (others, False))
            if group
        ]

    def freezes(self, parameter: torch.Tensor) -> bool:
        """Return True if the model must freeze a parameter because the optimizer does not take it."""
        return self.form == "matrices" and parameter.ndim != 2


def parse(words: Sequence[str], kwargs: str | None = None) -> list[Target]:
    """Return the targets of a command line; nothing is imported.

    Args:
        words: ``package.Class``, ``file.factory``, a preset; each may end in ``(lr=0.1, betas=(0.9, 0.99))``.
        kwargs: arguments for all of them: ``lr=0.1,betas=(0.9,0.99)`` or a dictionary.

    Raises:
        InputError: none, or one that cannot be read.
    """
    if not words:
        raise InputError(
            "audit",
            "no target",
            "is nothing to audit",
            allowed="package.Class of a torch.optim.Optimizer, a factory, a preset, or --all PACKAGE",
            fix="optbench audit pytorch_optimizer.SOAP",
        )
    shared = _arguments("--kwargs", kwargs) if kwargs else {}
    return [_parsed(word, shared) for word in words]


def _parsed(word: str, shared: Mapping[str, Any]) -> Target:
    match = _TARGET.fullmatch(word.strip())
    if match is None:
        raise InputError(
            "audit",
            word,
            "is not a target",
            allowed="package.Class, or package.Class(lr=0.1)",
            fix="optbench audit 'torch.optim.AdamW(lr=0.001)'",
        )
    name, call = match["path"].replace(":", "."), match["call"]
    if "." not in name and name not in presets.names():
        guess = closest(name.lower(), presets.names())
        raise InputError(
            "audit",
            name,
            "is neither a preset nor an import path",
            allowed=["package.Class", "file.factory", *presets.names()],
            suggestion=guess,
            fix=f"optbench audit torch.optim.{name}",
        )
    own = _arguments(word, call[1:-1]) if call else {}
    return Target(name, {**shared, **own})


def _arguments(key: str, text: str) -> dict[str, Any]:
    """Return the keyword arguments that a text of Python literals holds: ``lr=0.1, betas=(0.9, 0.99)``."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        arguments: dict[str, Any] = {}
        for positional in call.args:
            value = ast.literal_eval(positional)
            if not isinstance(value, dict):
                raise ValueError
            arguments |= value
        for keyword in call.keywords:
            if keyword.arg is None:
                raise ValueError
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
    except (SyntaxError, ValueError, AssertionError, TypeError):
        raise InputError(
            "audit" if key != "--kwargs" else key,
            text,
            "cannot be read",
            allowed="keyword arguments whose values are Python literals",
            fix="--kwargs 'lr=0.1, betas=(0.9, 0.99)'",
        ) from None
    if not all(isinstance(name, str) and name.isidentifier() for name in arguments):
        raise InputError(key, text, "names no arguments", fix="--kwargs 'lr=0.1'")
    return arguments


def members(package: str) -> list[str]:
    """Return the import paths of all optimizers of a package, sorted; imports it.

    A class counts if the package itself defines it and gives it a public name. Its own list of optimizers
    (``OPTIMIZERS`` of pytorch_optimizer) is not asked: it also names classes of other packages.

    Raises:
        TargetError: it cannot be imported, or has none.
    """
    import torch

    try:
        module = import_module(package)
    except Exception as error:
        raise TargetError(f"cannot be imported ({first_line(error)})", f"pip install {package}") from None
    first = package.partition(".")[0]
    classes = {
        value: name
        for name, value in sorted(vars(module).items())
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
        and value.__module__.partition(".")[0] == first
        and not name.startswith("_")
    }
    if not classes:
        raise TargetError("has no torch.optim.Optimizer", "optbench audit --all pytorch_optimizer")
    return sorted(f"{package}.{name}" for name in classes.values())


def version(name: str) -> str:
    """Return the distribution of a target's package and its version; empty: it is not installed as one."""
    first = name.partition(".")[0]
    if first not in presets.names():
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{first} {metadata.version(first)}"
    return ""


def _load(path: str) -> Callable[..., Any]:
    module_name, _, attribute = path.rpartition(".")
    if not module_name:
        raise TargetError("is not an import path", "optbench audit package.Class")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            fix = (
                f"pip install {missing.partition('.')[0]}, or run it where {missing.partition('.')[0]}.py is"
            )
            raise TargetError(f"cannot be imported: there is no module {missing}", fix) from None
        raise TargetError(
            f"crashes on import: it needs the module {missing}", f"pip install {missing}"
        ) from None
    except (Exception, SystemExit) as error:
        raise TargetError(f"crashes on import ({first_line(error)})") from None
    try:
        loaded = getattr(module, attribute)
    except AttributeError:
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        guess = closest(attribute, names)
        fix = f"optbench audit {module_name}.{guess}" if guess else ""
        raise TargetError(f"cannot be imported: {module_name} has no {attribute}", fix) from None
    _check_kind(loaded)
    return loaded


def _check_kind(loaded: Any) -> None:
    import torch

    if isinstance(loaded, type):
        if loaded is torch.optim.Optimizer or not issubclass(loaded, torch.optim.Optimizer):
            raise TargetError(f"is not a torch.optim.Optimizer but the class {loaded.__qualname__}")
    elif not callable(loaded):
        raise TargetError(f"is not a torch.optim.Optimizer but an object of {type(loaded).__name__}")


def probe(
    target: Target, model: Callable[[], nn.Module], loss: Callable[[nn.Module], torch.Tensor]
) -> Target:
    """Build a target and take two steps in this process; return it with the form that worked.

    Args:
        target: as parsed.
        model: returns a new model.
        loss: of a model; each of its parameters gets a gradient.

    Raises:
        TargetError: it is no optimizer, or needs what is not given: arguments, a closure, graphs of gradients.
    """
    if target.is_preset:
        _try(target, model(), loss)
        return target
    loaded = target.load()
    _check_arguments(target, loaded)
    failures: list[TargetError] = []
    for form in _forms(loaded):
        tried = replace(target, form=form)
        try:
            _try(tried, model(), loss)
        except TargetError as error:
            failures.append(error)
        else:
            return tried
    raise failures[0]


def _forms(loaded: Callable[..., Any]) -> list[str]:
    first = next(iter(_parameters(loaded)), "")
    if first == "model":
        return ["model"]
    if first.startswith("named"):
        return ["named"]
    return ["list", "groups", "matrices"]


def _parameters(loaded: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(loaded).parameters
    except (TypeError, ValueError):
        return {}


def _check_arguments(target: Target, loaded: Callable[..., Any]) -> None:
    """Refuse a constructor that needs arguments which are not given, and arguments that it does not have."""
    parameters = list(_parameters(loaded).values())
    needed = [
        p.name
        for p in parameters[1:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    missing = [name for name in needed if name not in target.arguments]
    if missing:
        example = ", ".join(f"{name}=…" for name in missing)
        raise TargetError(
            f"needs the arguments {', '.join(missing)}",
            f"optbench audit '{target.name}({example})', or a factory that passes them",
        )
    if parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        names = [p.name for p in parameters[1:]]
        for name in target.arguments:
            if name not in names:
                guess = closest(name, names) or ", ".join(names)
                raise TargetError(f"has no argument {name}; it has {', '.join(names)}", f"{guess}=…")
    if parameters and parameters[0].name == "optimizer":
        raise TargetError(
            "wraps another optimizer", "a factory: def make(params): return Wrapper(AdamW(params))"
        )


def _try(target: Target, model: nn.Module, loss: Callable[[nn.Module], torch.Tensor]) -> None:
    """Take two steps.

    Raises:
        TargetError: says in whose step, and what to do.
    """
    import torch

    for parameter in model.parameters():
        parameter.requires_grad_(not target.freezes(parameter))
    try:
        optimizer = target.build(list(model.named_parameters()), model)
    except TargetError:
        raise
    except (Exception, SystemExit) as error:
        raise TargetError(f"cannot be constructed ({first_line(error)})") from None
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TargetError(f"makes no torch.optim.Optimizer but an object of {type(optimizer).__name__}")
    try:
        for _ in range(2):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
    except (Exception, SystemExit) as error:
        raise _step_error(optimizer, error) from None


def _step_error(optimizer: Any, error: BaseException) -> TargetError:
    closure = _parameters(optimizer.step).get("closure")
    needs_it = closure is not None and closure.default is closure.empty
    if needs_it or "closure" in str(error).lower():
        return TargetError("needs a closure in step(), which engines do not pass")
    if "does not require grad" in str(error) or "create_graph" in str(error):
        return TargetError("needs gradients that have a graph: backward(create_graph=True)")
    if "sparse" in str(error).lower():
        return TargetError(f"needs sparse gradients ({first_line(error)})")
    return TargetError(f"cannot take a step in one process ({first_line(error)})")
