"""`optbench list` and `optbench show NAME`: what can be named, and what it means. Torch is not imported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from harness import command_line
from harness.commands import COMMANDS
from harness.config import cluster, derived_defaults, sources
from harness.config.compose import load
from harness.config.model_facts import facts, parameter_count
from harness.config.schema import ModelConfig, run_keys
from harness.config.typed_keys import Key, format_value
from harness.console import for_tables
from harness.errors import InputError, closest
from harness.output import json_document

_KINDS = {
    "models": "model",
    "optimizers": "optimizer",
    "engines": "engine",
    "data": "data",
    "tasks": "task",
    "schedules": "schedule",
    "experiments": "experiment",
    "clusters": "cluster",
}


def list_command(argv: Sequence[str]) -> int:
    """List everything that a group takes: `optbench list [--json]`.

    Raises:
        InputError: any other argument.
    """
    arguments = command_line.parse("list", argv)
    if arguments.rest:
        first = arguments.rest[0]
        raise InputError("list", first, "is not expected", allowed="--json", fix=f"optbench show {first}")
    tables = {kind: [_ROWS[kind](name) for name in sources.options(group)] for kind, group in _KINDS.items()}
    if arguments.options.json:
        print(json_document(**tables))
        return 0
    console = for_tables()
    for kind, rows in tables.items():
        _print_rows(console, f"{kind} ({_KINDS[kind]}=NAME)", rows)
    console.print("optbench show NAME: options, defaults, allowed values, source")
    return 0


def names() -> list[str]:
    """Return the names that `optbench show` takes."""
    with_keys = [name for name, command in COMMANDS.items() if command.takes_keys]
    return [*_kinds(), *with_keys]


def show_command(argv: Sequence[str]) -> int:
    """Show one model, optimizer, engine, data set, schedule, experiment, cluster or command.

    Raises:
        InputError: no name, several names, or an unknown name.
    """
    arguments = command_line.parse("show", argv)
    kinds, choices = _kinds(), names()
    if len(arguments.rest) != 1:
        value = " ".join(arguments.rest) or "no name"
        raise InputError("show", value, "is not one name", allowed=choices, fix="optbench show sumo")
    name = arguments.rest[0].partition("=")[2] or arguments.rest[0]
    if name not in choices:
        guess = closest(name, choices)
        raise InputError(
            "show", name, "is not known", allowed=choices, fix=f"optbench show {guess or 'sumo'}"
        )
    shown = _SHOW[kinds[name]](name) if name in kinds else _show_keys()
    if arguments.options.json:
        print(json_document(name=name, kind=kinds.get(name, "command"), **shown))
        return 0
    console = for_tables()
    for label, value in shown.items():
        if not isinstance(value, list):
            console.print(Text(label, style="bold"), Text(_cell(value)), highlight=False)
    for label, value in shown.items():
        if isinstance(value, list) and value:
            _print_rows(console, label.replace("_", " "), value)
    return 0


def _kinds() -> dict[str, str]:
    """Map each name to its kind; where two kinds share a name, the first kind of `_KINDS` wins."""
    return {name: kind for kind, group in reversed(_KINDS.items()) for name in sources.options(group)}


def keys_text() -> str:
    """Return every key of a run, one a line: name, default, allowed values, meaning (for `optbench train --help`)."""
    lines = ["groups (a file of configs/GROUP; your own ./configs is searched first):"]
    for group in sources.GROUPS:
        lines.append(f"  {group}={' '.join(sources.options_of_runs(group))}")
    sections: dict[str, list[Key]] = {}
    for key in run_keys().values():
        sections.setdefault(key.name.rpartition(".")[0], []).append(key)
    for section, members in sorted(sections.items(), key=lambda item: item[0] != ""):
        lines += [
            "",
            f"keys of {section} (default; allowed; meaning):"
            if section
            else "keys (default; allowed; meaning):",
        ]
        for key in members:
            allowed = key.allowed if isinstance(key.allowed, str) else ", ".join(key.allowed)
            lines.append(f"  {key.name}={format_value(key.default)}  ({allowed})  {key.doc}".rstrip())
        if section == "optimizer":
            lines.append("  optimizer.OPTION=…  options of an optimizer: optbench show NAME")
    return "\n".join(lines)


def _model_row(name: str) -> dict[str, Any]:
    model = _model(name)
    exact = facts(model).parameters
    return {
        "name": name,
        "parameters": exact if exact is not None else parameter_count(model),
        "exact": exact is not None,
        "family": model.model_type,
        "about": _comment("model", name),
    }


def _optimizer_row(name: str) -> dict[str, Any]:
    from optimizers.presets import PRESETS

    preset = PRESETS.get(name)
    if preset is None:
        return {"name": name, "rule": "plug-in", "about": "rule of an installed package", "source": ""}
    return {"name": name, "rule": preset.rule, "about": preset.doc, "source": preset.source}


def _file_row(group: str) -> Callable[[str], dict[str, Any]]:
    if group == "experiment":
        return lambda name: {
            "name": name,
            "for": f"optbench {sources.command_of(name)}",
            "about": _comment(group, name),
        }
    return lambda name: {"name": name, "about": _comment(group, name)}


_ROWS: dict[str, Callable[[str], dict[str, Any]]] = {
    "models": _model_row,
    "optimizers": _optimizer_row,
    **{kind: _file_row(group) for kind, group in _KINDS.items() if kind not in ("models", "optimizers")},
}


def _show_optimizer(name: str) -> dict[str, Any]:
    from optimizers.composition import composition, difference
    from optimizers.presets import options_of, preset

    chosen, meanings = preset(name), options_of(name)
    options = []
    for option, default in chosen.options.items():
        known = meanings.get(option)
        options.append(
            {
                "option": f"optimizer.{option}",
                "default": _default_rate(name) if option == "lr" else _plain(default),
                "allowed": ", ".join(known.allowed) if known else "",
                "meaning": known.doc if known else "",
            }
        )
    rates = [
        {
            "smallest_model": int(row.smallest),
            "largest_model": int(row.largest),
            "lr": row.lr,
            "tuned": row.tuned,
            "source": row.source,
        }
        for row in derived_defaults.LEARNING_RATES.get(name, ())
    ]
    return {
        "about": chosen.doc,
        "source": chosen.source,
        "rule": chosen.rule,
        "composition": composition(name),
        "nearest": difference(name),
        "learning_rates": rates,
        "options": options,
    }


def _default_rate(name: str) -> str | float:
    """Return the learning rate that `train` uses without optimizer.lr."""
    if name in derived_defaults.LEARNING_RATES:
        return "by model size"
    rate = derived_defaults.rule_rate(name)
    return "none: give optimizer.lr=…" if rate is None else rate


def _model(name: str) -> ModelConfig:
    """Read a model from its file; compose it only where the file builds on others, which takes a tenth of a second."""
    path = sources.find("model", name)
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path else None
    if not isinstance(content, dict) or "defaults" in content:
        return load([f"model={name}"]).model
    try:
        return ModelConfig.model_validate(content)
    except ValidationError:
        return load([f"model={name}"]).model


def _show_model(name: str) -> dict[str, Any]:
    model = _model(name)
    row = _model_row(name)
    shapes = facts(model)
    return {
        "about": row["about"],
        "family": model.model_type,
        "parameters": row["parameters"],
        "exact": row["exact"],
        "matrices": [
            {"matrix": path, "rows": rows, "columns": columns, "layers": shapes.layers}
            for path, (rows, columns) in (shapes.matrices or {}).items()
        ],
        "configuration": [
            {"option": f"model.config.{key}", "value": value} for key, value in model.config.items()
        ],
        "options": [
            row for row in _group_keys("model") if row["option"] not in ("model.name", "model.config")
        ],
    }


def _show_file(group: str) -> Callable[[str], dict[str, Any]]:
    def show(name: str) -> dict[str, Any]:
        path = sources.find(group, name)
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path else {}
        return {"about": _comment(group, name), "sets": content or {}, "options": _group_keys(group)}

    return show


_SHOW: dict[str, Callable[[str], dict[str, Any]]] = {
    "models": _show_model,
    "optimizers": _show_optimizer,
    **{kind: _show_file(group) for kind, group in _KINDS.items() if kind not in ("models", "optimizers")},
}


def _show_keys() -> dict[str, Any]:
    return {"about": "every key of a run", "options": _group_keys(None)}


def _group_keys(group: str | None) -> list[dict[str, Any]]:
    rows = []
    known = cluster.known() if group == cluster.GROUP else run_keys()
    for key in known.values():
        if group is None or key.name.startswith(f"{group}."):
            allowed = key.allowed if isinstance(key.allowed, str) else ", ".join(key.allowed)
            rows.append(
                {"option": key.name, "default": _plain(key.default), "allowed": allowed, "meaning": key.doc}
            )
    return rows


def _comment(group: str, name: str) -> str:
    """Return the leading comment of a configuration file, without Hydra's directives."""
    path: Path | None = sources.find(group, name)
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path else []:
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):
            lines.append(line.lstrip("# ").strip())
    return " ".join(lines)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, (list, dict)):
        return format_value(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


_TEXT_COLUMNS = 40
"""Columns that the last cell of a row needs at least; narrower, a table is printed as a list."""


def _print_rows(console: Console, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print a table, or on a narrow terminal a list with each row's text below its name."""
    columns = list(rows[0]) if rows else []
    others = sum(max(len(column), *(len(_cell(row[column])) for row in rows)) + 3 for column in columns[:-1])
    if not columns or console.width - others >= min(_TEXT_COLUMNS, _longest(rows, columns[-1])):
        console.print(_table(title, rows))
        return
    console.print(Text(f"{title}\n"))
    for row in rows:
        name, *middle, text = columns
        facts = ", ".join(
            f"{column} {_cell(row[column])}" for column in middle if row[column] not in (None, "")
        )
        console.print(Text(_cell(row[name]), style="bold"))
        for line in (facts, _cell(row[text])):
            if line:
                console.print(Padding(Text(line), (0, 0, 0, 4)))
    console.print()


def _longest(rows: Sequence[dict[str, Any]], column: str) -> int:
    return max(len(column), *(len(_cell(row[column])) for row in rows))


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE, highlight=False)
    for column in rows[0] if rows else ():
        right = any(isinstance(row[column], int) and not isinstance(row[column], bool) for row in rows)
        table.add_column(column, justify="right" if right else "left", no_wrap=column in ("name", "option"))
    for row in rows:
        # As Text: a bracket in a cell is a bracket, not markup.
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    return table
