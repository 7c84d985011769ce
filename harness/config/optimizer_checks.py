"""Resolve and check the optimizer section: options of a preset, learning rate, optimizers by import path. No torch.

The module of an import path must be installed or in the working folder, and hold the class.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from harness.config import derived_defaults
from harness.config.model_facts import ModelFacts, parameter_count
from harness.config.schema import RunConfig
from harness.config.typed_keys import format_value
from harness.errors import InputError, closest

KEY = "optimizer.target"
_DISTRIBUTIONS = {"pytorch_optimizer": "pytorch-optimizer", "galore_torch": "galore-torch"}
"""Module → name on the package index, of the packages that the documentation names. No other name is ever advised: it
could be a stranger's."""


def resolved_section(config: RunConfig, shapes: ModelFacts) -> dict[str, Any]:
    """Resolve the optimizer section: every option of the preset, the learning rate and its source.

    Raises:
        InputError: an unknown option, a rank above a side of a matrix, no default learning rate, or an import path
            that cannot be imported.
    """
    from optimizers.options import OptionError
    from optimizers.presets import rank_limit_check, resolve

    requested = config.optimizer
    section: dict[str, Any] = {"name": requested.name, "target": requested.target}
    if requested.target is not None:
        check_target(requested.target)
        options = requested.options
    else:
        try:
            options = resolve(requested.name, requested.options)
            _check_logit_clipping(config, options, shapes)
            shapes = shapes.for_rule(options)
            rank_limit_check(options, (shapes.matrices or {}).items())
        except OptionError as error:
            raise _option_error(error, requested.name) from None
        options.pop("lr", None)
        if "refresh_stagger" in options:
            options["refresh_stagger"] = stagger(options["refresh_stagger"], shapes)
        # Runs of several seeds must differ in the optimizer's random choices too (sketches, rounding).
        if "seed" in options and "seed" not in requested.options:
            options["seed"] = config.seed
    section |= _learning_rate(config)
    options |= _aux_learning_rate(config, section, options)
    return section | {key: list(v) if isinstance(v, tuple) else v for key, v in options.items()}


def _check_logit_clipping(config: RunConfig, options: Mapping[str, Any], shapes: ModelFacts) -> None:
    """Refuse QK-clip where it would clip by padding, or scale projections that it does not find.

    Raises:
        InputError: naming the threshold.
    """
    threshold = options.get("qk_clip_threshold")
    if threshold is None:
        return
    ruled = shapes.for_rule(options).matrices or {}
    projections = [name for name in shapes.matrices or {} if ".q_proj." in name or ".k_proj." in name]
    if config.task.name != "pretrain":
        # Rows are as long as the longest of their micro-batch, and logits of padding count: the cut would decide.
        reason = f"is for rows of one length, and those of task={config.task.name} are padded"
    elif config.model.adapter is not None:
        reason = "scales query and key projections, which are frozen next to an adapter"
    elif left_out := next((name for name in projections if name not in ruled), None):
        reason = f"scales query and key projections, and optimizer.matrix_modules leaves out {left_out}"
    else:
        return
    raise InputError("optimizer.qk_clip_threshold", threshold, reason, fix="optimizer.qk_clip_threshold=null")


def on_cuda(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved optimizer section with the exact method that CUDA takes for "auto" written out.

    The method belongs to the identity of a run, which is read from its configuration on any machine. "auto" remains on
    CPUs: it means the method of CPUs there.
    """
    resolved = dict(section)
    if section["target"] is None and section.get("orthogonalizer") == "auto":
        resolved["orthogonalizer"] = "dwh"
    return resolved


def stagger(value: bool | str, shapes: ModelFacts) -> bool | str:
    """Return `optimizer.refresh_stagger` with "auto" replaced by False where the model has no large matrix."""
    from optimizers.refresh_schedule import resolved_stagger

    # Of a family whose matrices are not known, the hidden size is the short side of most of them.
    hidden = shapes.hidden_size or 0
    return resolved_stagger(value, (shapes.matrices or {"": (hidden, hidden)}).values())


def default_rate(config: RunConfig) -> derived_defaults.LearningRate | None:
    """Return the default learning rate of the run's preset at its model size; None if there is none."""
    size, starts_from_weights = parameter_count(config.model), config.model.path is not None
    return derived_defaults.default_learning_rate(
        config.optimizer.name, size, from_weights=starts_from_weights, task=config.task.name
    )


def check_target(target: str, folder: Path | None = None) -> None:
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


def _learning_rate(config: RunConfig) -> dict[str, Any]:
    requested = config.optimizer
    if requested.lr is not None:
        is_own = requested.lr_source not in (None, "given")
        source = requested.lr_source if is_own else "given"
        return {"lr": requested.lr, "lr_source": source, "lr_tuned": requested.lr_tuned if is_own else True}
    default = None
    if requested.target is None:
        default = default_rate(config)
    if default is None:
        name = requested.target or requested.name
        reason = f"means the default, and there is no default for {name}"
        raise InputError("optimizer.lr", "null", reason, allowed="a number > 0", fix="optimizer.lr=0.001")
    return {"lr": default.lr, "lr_source": default.source, "lr_tuned": default.tuned}


def _aux_learning_rate(
    config: RunConfig, section: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, float]:
    """Return the AdamW learning rate that belongs to a default matrix rate; none where either was given."""
    requested = config.optimizer
    if section["lr_source"] == "given" or "aux_lr" not in options or "aux_lr" in requested.options:
        return {}
    default = default_rate(config)
    return {"aux_lr": default.aux_lr} if default is not None and default.aux_lr is not None else {}


def _option_error(error: Any, name: str) -> InputError:
    """Translate an `optimizers.options.OptionError` to an error of the command line."""
    from optimizers.presets import OPTIONS, PRESETS

    is_unknown_option = name in PRESETS and error.key not in PRESETS[name].options and error.key != "name"
    suggestion = error.suggestion
    if is_unknown_option and suggestion:
        suggestion = f"optimizer.{suggestion}"
    owners = [preset.name for preset in PRESETS.values() if error.key in preset.options]
    if error.key == "name":
        fix = f"optimizer={error.suggestion or 'adamw'}"
    elif is_unknown_option and error.key in OPTIONS:
        suggestion = None
        fix = f"leave it out, or choose one of optimizer={', '.join(owners)}"
    elif is_unknown_option:
        fix = f"{suggestion}={format_value(error.value)}" if suggestion else f"remove optimizer.{error.key}"
    else:
        fallback = error.suggestion or format_value(
            PRESETS[name].options[error.key] if name in PRESETS else None
        )
        fix = f"optimizer.{error.key}={fallback}"
    return InputError(
        f"optimizer.{error.key}",
        format_value(error.value),
        error.reason,
        allowed=error.allowed,
        suggestion=suggestion,
        fix=fix,
    )
