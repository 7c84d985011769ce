"""Which cells are certified: a choice in which all pairs of values meet, and every combination for `--full`.

A new preset gets its cells by being listed (`cells.rules`), a new option that is a word or a switch by being declared.
Only a number that is off in all presets needs a line in `_SWITCHED_ON`. Nothing here imports torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from harness.errors import InputError, closest
from harness.record.certificates import (
    ADAPTERS,
    CROSSED,
    ENGINES,
    TASKS,
    UNCERTIFIED_OPTIONS,
    Cell,
    option_word,
)
from harness.verify.cells import option_values_of, rules, takes_any_exact_factor
from optimizers import presets
from optimizers.options import OptionError

DTYPES = ("fp32", "bf16")
ACCUMULATIONS = (1, 2)
CLIPPINGS = ("off", "on")

PLACES = (
    ("ddp", ""),
    ("fsdp2", ""),
    ("fsdp2", "columns"),
    ("hsdp", ""),
    ("zero1", ""),
    ("zero2", ""),
    ("zero3", ""),
)
"""(engine, variant) of each class of layouts, in which every rule and every option value is certified."""

_PLAIN = ("fp32", 1, "on")
# One of them in each place of a rule: its pairs with dtype, accumulation and clipping. bf16 comes once, in turn with
# each accumulation and clipping, because a CPU without bf16 units takes three times as long for it.
_PATTERN: tuple[tuple[str, int, str] | None, ...] = (
    _PLAIN,
    ("fp32", 2, "off"),
    None,
    ("fp32", 1, "off"),
    ("fp32", 2, "on"),
    _PLAIN,
    _PLAIN,
)

_SWITCHED_ON: Mapping[str, str] = {
    "norm_growth_limit": "1.01",
    "refresh_threshold": "0.5",
    "update_rms": "0.2",
}
"""Number that is off (null) in every preset → the value with which it is certified. Sizes that are null for another
reason (`rank`, `aux_lr`) are in `certificates.UNCERTIFIED_OPTIONS`."""

_REQUIRED: Mapping[str, str] = {
    "norm_growth_target": "norm_growth_limit=1.01",
    "weight_decay_form": "weight_decay=0.5",
}
"""Option that does nothing without another one → that one."""

_ALONE = ("state_dtype=bfloat16",)
"""Option values that share no cell, because they have a bound of their own (`harness.verify.verdict`)."""

_RULES_PER_OPTION = 3
_WORDS_PER_CELL = 4
"""Option values that share a cell, so that options cost a fraction of the time. A red cell names all of them."""


def pairwise() -> list[Cell]:
    """Return the cells of a bare `optbench certify`.

    In them meet: every rule and every place of `PLACES`; every rule and every dtype, accumulation and clipping; every
    engine and every (dtype, accumulation, clipping) under some rule; every option value and every place under some rule
    that takes it; the rules of `CROSSED` and every engine, in the plainest setting; every task and every layout.
    """
    selected = {Cell(rule, engine, world_size=world) for rule in CROSSED for engine, world in ENGINES.items()}
    for number, rule in enumerate(rule for rule in rules() if rule not in CROSSED):
        selected |= set(_places(rule, number))
    selected |= {_cell(rule, engine, variant, _PLAIN) for rule in CROSSED for engine, variant in PLACES}
    selected |= set(_missing_settings(selected))
    return sorted({*selected, *_edges(), *_option_cells(), *_task_cells()})


def every() -> list[Cell]:
    """Return all combinations of rule, engine, dtype, accumulation and clipping, and of option values and places."""
    selected = {
        Cell(rule, engine, *setting, ENGINES[engine])
        for rule in rules()
        for engine, setting in itertools.product(ENGINES, _settings())
    }
    selected |= {_cell(rule, *place, setting=_PLAIN) for rule in rules() for place in PLACES}
    selected |= {
        replace(_cell(rule, *place, setting=_PLAIN), options=words)
        for words in option_values()
        for rule in _takers(words)
        for place in PLACES
    }
    return sorted({*selected, *pairwise(), *_on_cuda(all_rules=True)})


def _settings() -> list[tuple[str, int, str]]:
    return list(itertools.product(DTYPES, ACCUMULATIONS, CLIPPINGS))


def _cell(rule: str, engine: str, variant: str, setting: tuple[str, int, str]) -> Cell:
    return Cell(rule, engine, *setting, ENGINES[engine], variant)


def _places(rule: str, number: int) -> Iterator[Cell]:
    """Yield one cell of a rule in each place; ``number`` moves the settings on from rule to rule."""
    rounded = [setting for setting in _settings() if setting[0] == "bf16"]
    for position, (engine, variant) in enumerate(PLACES):
        setting = _PATTERN[(position + number) % len(_PATTERN)]
        yield _cell(rule, engine, variant, setting or rounded[number // len(_PATTERN) % len(rounded)])


def _missing_settings(selected: Iterable[Cell]) -> Iterator[Cell]:
    """Yield the settings of each engine that no cell has, under the rules of `CROSSED` in turn."""
    # Another cut of the matrices (a variant) is another way through the engine.
    met = {(c.engine, c.dtype, c.accumulation, c.clipping) for c in selected if not c.variant}
    turn = itertools.cycle(CROSSED)
    for engine in ENGINES:
        for setting in _settings():
            if (engine, *setting) not in met:
                yield Cell(next(turn), engine, *setting, ENGINES[engine])


def _edges() -> list[Cell]:
    """Return cells of three processes, over which nothing divides evenly, of replicas that share the work, and of rules
    that leave the exact factor to the device with that of CUDA, which is certified at a raised cut."""
    uneven = [
        Cell(rule, engine, world_size=3)
        for rule in ("sumo", "muon")
        for engine in ("fsdp2", "zero1", "zero3")
    ]
    split = [
        Cell(rule, engine, variant="split")
        for rule in ("sumo", "galore", "muon")
        for engine in ("ddp", "zero0")
    ]
    return [*uneven, *split, *_on_cuda(all_rules=False)]


def _task_cells() -> Iterator[Cell]:
    """Yield cells in which every task and adapter meets every class of layouts, and every rule of `_TASK_RULES`.

    They accumulate: the loss of a task is a mean over examples or tokens of which ranks and micro-batches have
    unequal numbers.
    """
    for shift, variant in enumerate((*TASKS, *ADAPTERS)):
        for number, engine in enumerate(("ddp", "fsdp2", "zero1", "zero2", "zero3")):
            rule = _TASK_RULES[(number + shift) % len(_TASK_RULES)]
            yield Cell(rule, engine, accumulation=2, variant=variant)


def _on_cuda(all_rules: bool) -> Iterator[Cell]:
    """Yield the cells with the exact factor of CUDA: sumo and one other rule in turn on every engine, or all rules."""
    others = [rule for rule in rules() if takes_any_exact_factor(rule) and rule != "sumo"]
    for number, (engine, world) in enumerate(ENGINES.items()):
        in_turn = others if all_rules else others[number % len(others) :][:1]
        yield from (Cell(rule, engine, variant="dwh", world_size=world) for rule in ("sumo", *in_turn))


@lru_cache(maxsize=1)
def option_values() -> tuple[str, ...]:
    """Return the option values that no preset has, as ``key=value``, with what they require before them."""
    words = []
    for key, option in presets.OPTIONS.items():
        if key in UNCERTIFIED_OPTIONS:
            continue
        choices = (False, True) if option.type == "bool" else option.choices
        known = [preset.options[key] for preset in presets.PRESETS.values() if key in preset.options]
        # `1 == True` in Python.
        words += [
            option_word(key, value) for value in choices if not any(value is k or value == k for k in known)
        ]
        if key in _SWITCHED_ON:
            words.append(f"{key}={_SWITCHED_ON[key]}")
    words.remove("orthogonalizer=dwh")  # has cells of its own, at a raised cut
    return tuple(" ".join(filter(None, (_REQUIRED.get(word.partition("=")[0]), word))) for word in words)


def switched_off() -> set[str]:
    """Return the numbers that are null in every preset that has them: they need a line in `_SWITCHED_ON`."""
    off = set()
    for key, option in presets.OPTIONS.items():
        values = [preset.options[key] for preset in presets.PRESETS.values() if key in preset.options]
        if key not in UNCERTIFIED_OPTIONS and option.optional and all(value is None for value in values):
            off.add(key)
    return off - set(_SWITCHED_ON)


def _takers(words: str) -> list[str]:
    """Return the presets that accept ``key=value`` words, and that they change."""
    return [rule for rule in presets.PRESETS if _accepts(rule, words)]


def _accepts(rule: str, words: str) -> bool:
    preset = presets.PRESETS[rule]
    try:
        values = option_values_of(words)
        presets.resolve(rule, values)
    except OptionError:
        return False
    return any(preset.options[key] != value for key, value in values.items())


def _option_cells() -> Iterator[Cell]:
    """Yield cells in which every option value meets every place, several values of different options in each cell."""
    for number, (engine, variant) in enumerate(PLACES):
        left = list(option_values())
        while left:
            # Not always the same rule; few of them, because each rule with options needs a reference of one process.
            takers = sorted(_takers(left[0]), key=lambda rule: rule not in CROSSED)[:_RULES_PER_OPTION]
            rule = takers[number % len(takers)] if takers else ""
            words = [left.pop(0)]
            for other in left.copy() if takers else ():
                if len(words) < _WORDS_PER_CELL and _is_compatible(rule, words, other):
                    words.append(other)
                    left.remove(other)
            if takers:
                yield replace(
                    _cell(rule, engine, variant, _PLAIN),
                    options=" ".join(dict.fromkeys(" ".join(words).split())),
                )


def _is_compatible(rule: str, words: Sequence[str], other: str) -> bool:
    """Return True if a rule takes one more option value besides others, and none of their options comes twice."""
    if not set(_ALONE).isdisjoint((*words, other)):
        return False
    keys = [word.partition("=")[0] for word in " ".join((*words, other)).split()]
    return len(keys) == len(set(keys)) and _accepts(rule, other) and _accepts(rule, " ".join((*words, other)))


_TASK_RULES = ("adamw", "sumo", "muon", "galore")

_CHOICES: Mapping[str, Sequence[str]] = {
    "engine": tuple(ENGINES),
    "dtype": DTYPES,
    "accumulation": tuple(map(str, ACCUMULATIONS)),
    "clipping": CLIPPINGS,
    "world_size": ("1", "2", "3", "4"),
    "variant": ("split", "dwh", "columns", *TASKS, *ADAPTERS),
}


def select(words: Iterable[str], full: bool = False) -> list[Cell]:
    """Return the cells that ``key=value,value`` arguments select.

    What is named is taken whole: with dtype, accumulation or clipping named, out of `every` cell, else out of the
    `pairwise` ones.

    Args:
        words: of the command line; none: all. ``option=KEY``: cells in which that option is not the preset's.
        full: out of `every` cell in any case.

    Raises:
        InputError: a key or value that there is not, or nothing is left.
    """
    values_by_key: dict[str, list[str]] = {}
    choices = {"rule": rules(), **_CHOICES, "option": _option_names()}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in choices:
            guess = closest(key, choices)
            fix = (
                f"optbench certify {guess}={value or choices[guess][0]}"
                if guess
                else "optbench certify rule=sumo"
            )
            raise InputError(
                "certify", word, "chooses no cells", allowed=[f"{k}=…" for k in choices], fix=fix
            )
        for one in value.split(","):
            if one not in choices[key]:
                guess = closest(one, choices[key]) or choices[key][0]
                raise InputError(f"certify {key}", one, allowed=choices[key], fix=f"{key}={guess}")
        values_by_key[key] = value.split(",")
    finer = full or any(key in values_by_key for key in ("dtype", "accumulation", "clipping"))
    selected = [cell for cell in (every() if finer else pairwise()) if _matches(cell, values_by_key)]
    if not selected:
        selection = " ".join(words)
        raise InputError(
            "certify", selection, "leaves no cell", allowed="combinations that exist", fix="drop one of them"
        )
    return selected


def _option_names() -> list[str]:
    return sorted({word.partition("=")[0] for words in option_values() for word in words.split()})


def _matches(cell: Cell, values_by_key: Mapping[str, Sequence[str]]) -> bool:
    own = {word.partition("=")[0] for word in cell.options.split()}
    return all(
        not own.isdisjoint(values) if key == "option" else str(getattr(cell, key)) in values
        for key, values in values_by_key.items()
    )
