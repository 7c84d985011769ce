"""Split what a user passes (parameters, names, groups) into param groups that each follow one rule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from optimizers.linalg.robust import iteration_dtype
from optimizers.module_patterns import matches
from optimizers.options import OptionError
from optimizers.presets import PRESETS, rank_limit_check, resolve
from optimizers.refresh_schedule import resolved_stagger
from optimizers.routing import NOT_CHOSEN, Modules, Route, route
from optimizers.step_units import RuleGroup

# Options of the matrix preset that belong to the AdamW group next to it, and their names there.
_AUX = {
    "aux_lr": "lr",
    "aux_weight_decay": "weight_decay",
    "aux_betas": "betas",
    "aux_eps": "eps",
    "aux_scheduled": "scheduled",
    **{key: key for key in ("rounding", "seed", "weight_decay_form", "average_decay", "state_dtype")},
}
# Group keys that are not options.
_PLAIN_KEYS = {"params", "param_names", "rule", "scheduled", "initial_lr"}


def named(params: Any, start: int = 0) -> tuple[list[tuple[str, Tensor]], bool]:
    """Return (name, parameter) pairs of a group's "params", and True if the user gave the names.

    Raises:
        TypeError: an entry is neither a tensor nor a (name, tensor) pair, or some have names and some not.
    """
    entries = [params] if isinstance(params, Tensor) else list(params)
    pairs = [entry for entry in entries if isinstance(entry, tuple)]
    if pairs and len(pairs) != len(entries):
        raise TypeError("either all parameters of a group have names or none")
    result = []
    for i, entry in enumerate(entries):
        name, parameter = entry if isinstance(entry, tuple) else (f"param{start + i}", entry)
        if not isinstance(parameter, Tensor):
            raise TypeError(f"expected a parameter or (name, parameter), got {type(parameter).__name__}")
        result.append((str(name), parameter))
    return result, bool(pairs)


def listed(params: Iterable[Any]) -> list[Any]:
    """Return the user's parameters or groups as a list, with generators read once."""
    return [
        {**entry, "params": entry["params"] if isinstance(entry["params"], Tensor) else list(entry["params"])}
        if isinstance(entry, Mapping) and "params" in entry
        else entry
        for entry in params
    ]


def named_tensors(params: Sequence[Any]) -> list[tuple[str, Tensor]]:
    """Return (name, parameter) of everything that is trained, from parameters, pairs, or groups of them."""
    pairs: list[tuple[str, Tensor]] = []
    for entry in params:
        inner = entry.get("params", []) if isinstance(entry, Mapping) else [entry]
        pairs += named(inner, start=len(pairs))[0]
    return [(name, parameter) for name, parameter in pairs if parameter.requires_grad]


def prepare(
    preset_name: str,
    base: Mapping[str, Any],
    user_group: Mapping[str, Any],
    pairs: Sequence[tuple[str, Tensor]],
    is_named: bool,
    modules: Modules | None,
) -> list[RuleGroup]:
    """Split one user group by rule: matrices first, then what AdamW takes.

    Args:
        preset_name: of the optimizer.
        base: the optimizer's resolved options.
        user_group: options that differ in this group; "rule": "adamw" sends all of it to AdamW, whose options
            then go by their own names ("lr", "betas" …); "scheduled": false makes it keep its learning rate
            under a scheduler.
        pairs: (name, parameter) of the group.
        is_named: the names were given by the user.
        modules: a model or its named modules.

    Raises:
        OptionError: unknown option, bad value, or a rank larger than a side of one of the matrices.
        TypeError: a parameter that is sparse or complex.
    """
    overrides = {key: value for key, value in user_group.items() if key not in _PLAIN_KEYS}
    forced = user_group.get("rule") == "adamw"
    if forced:
        own_names = {name: key for key, name in _AUX.items() if key in base}
        overrides = {own_names.get(key, key): value for key, value in overrides.items()}
    options = resolve(preset_name, overrides, base)
    for name, parameter in pairs:
        if not parameter.is_floating_point() or parameter.is_sparse:
            raise TypeError(f"{name}: only dense real floating-point parameters can be optimized")
    rule = "adamw" if forced else rule_name(preset_name)
    by_head = bool(options.get("split_heads"))
    routes = route(
        pairs,
        rule,
        modules,
        plain=not is_named and modules is None,
        by_head=by_head,
        chosen=options.get("matrix_modules"),
    )
    by_name = dict(pairs)
    if rule != "adamw":
        trained = [r for r in routes if r.rule == rule and by_name[r.name].requires_grad]
        rank_limit_check(options, [(block.name, block.shape) for r in trained for block in r.blocks])
    extra = {"initial_lr": user_group["initial_lr"]} if "initial_lr" in user_group else {}
    prepared = []
    for kind, kept_routes, values in _parts(rule, routes, options, forced):
        scheduled = bool(user_group.get("scheduled", True))
        # It has chosen; the group holds what it chose.
        values.pop("matrix_modules", None)
        if kind == "adamw" and values.pop("scheduled", True) is False:
            scheduled = False
        if "refresh_stagger" in values:
            shapes = [block.shape for r in kept_routes for block in r.blocks]
            values["refresh_stagger"] = resolved_stagger(values["refresh_stagger"], shapes)
        members = [(r.name, by_name[r.name]) if is_named else by_name[r.name] for r in kept_routes]
        group = {"params": members, "rule": kind, "scheduled": scheduled, **values, **extra}
        group["fixed_lr"] = group["lr"]
        # Schedulers write into a tensor: each group, and what it keeps, needs one of its own.
        group = {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()}
        if group.get("orthogonalizer_dtype") == "auto":
            group["orthogonalizer_dtype"] = iteration_dtype(by_name[kept_routes[0].name].device)
        parameters = [by_name[r.name] for r in kept_routes]
        frozen = {i for i, parameter in enumerate(parameters) if not parameter.requires_grad}
        prepared.append(RuleGroup(group, parameters, kept_routes, frozen))
    return prepared


def _parts(
    rule: str, routes: Sequence[Route], options: Mapping[str, Any], forced: bool
) -> Iterator[tuple[str, list[Route], dict[str, Any]]]:
    """Yield the rule, the parameters and the options of each group that is not empty, hidden matrices first.

    The preset adamw is one group, or two with an `aux_lr` of its own.
    """

    def is_hidden(found: Route) -> bool:
        if rule != "adamw":
            return found.rule == rule
        return not forced and (options["aux_lr"] is None or bool(found.blocks))

    hidden = [r for r in routes if is_hidden(r)]
    others = [r for r in routes if not is_hidden(r)]
    if hidden:
        yield rule, hidden, matrix_options(options)
    if others:
        yield "adamw", others, adamw_options(options)


def rule_name(preset_name: str) -> str:
    """Return the name of a preset's matrix rule; that of a plug-in is its entry point's."""
    return PRESETS[preset_name].rule if preset_name in PRESETS else preset_name


def matrix_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the hidden matrices' group: all but those of the AdamW next to it."""
    values = {key: value for key, value in options.items() if not key.startswith("aux_")}
    # AdamW's own group says what the one next to a matrix rule may choose.
    return values if "aux_betas" in options else {**values, "eps_form": "corrected"}


def adamw_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the AdamW group next to the hidden matrices; with the preset adamw, all but its rate."""
    lr = options["lr"] if options["aux_lr"] is None else options["aux_lr"]
    if "aux_betas" not in options:
        return {**matrix_options(options), "lr": lr}
    # The public SUMO and GaLore codes add eps before bias correction; it is part of what their presets
    # reproduce.
    return {
        **{name: options[key] for key, name in _AUX.items()},
        "lr": lr,
        "eps_form": options["aux_eps_form"],
    }


def require_matrices(preset_name: str, routes: Iterable[Route], options: Mapping[str, Any]) -> None:
    """Refuse an optimizer whose matrix rule has nothing to do, or that finds no heads to split.

    Raises:
        OptionError: the preset has a matrix rule and no parameter takes it, `split_heads` changes nothing, or a pattern
            of `matrix_modules` names no hidden matrix.
    """
    routes = list(routes)
    if (patterns := options.get("matrix_modules")) is not None:
        _check_used(patterns, (r.name for r in routes if r.rule != "adamw" or r.reason == NOT_CHOSEN))
    if options.get("split_heads") and not any(
        "split into heads" in r.reason for r in routes if len(r.blocks) > 1
    ):
        raise OptionError(
            "split_heads",
            "true",
            "finds no projection to Q, K or V whose heads are known",
            ("false", "true for a model of transformers, with modules=model"),
        )
    if rule_name(preset_name) == "adamw" or any(r.rule != "adamw" for r in routes):
        return
    reasons = ", ".join(sorted({r.reason for r in routes}))
    raise OptionError(
        "name",
        preset_name,
        f"finds no hidden matrix among {len(routes)} parameters ({reasons})",
        ("a model with 2-D hidden weights", "adamw"),
    )


def _check_used(patterns: Iterable[str], names: Iterable[str]) -> None:
    """Refuse a pattern that names no hidden matrix: it is a misspelling, or of another model.

    Args:
        patterns: of `matrix_modules`.
        names: of all hidden matrices.

    Raises:
        OptionError: naming the pattern and the last components that the names of hidden matrices have.
    """
    names = list(names)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            # "default" is the only adapter's name.
            parts = [[part for part in name.split(".")[:-1] if part != "default"] for name in names]
            known = list(dict.fromkeys(".".join(part[-1:]) for part in parts if part))
            raise OptionError(
                "matrix_modules", pattern, "is in the name of no hidden matrix", known or ("null",)
            )
