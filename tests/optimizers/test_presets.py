"""Presets: torch-free, complete, and strict about what they are told."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from optimizers.options import OptionError, declared, option
from optimizers.presets import OPTIONS, PRESETS, names, rank_limit_check, resolve
from optimizers.rules.parts.subspace_shapes import default_rank


def test_importing_them_does_not_import_torch() -> None:
    code = (
        "import sys, optimizers, optimizers.presets; optimizers.resolve('sumo', {'rank': 4});"
        "optimizers.names();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_preset_of_the_table_is_there() -> None:
    assert set(names()) >= {
        "sumo", "sumo_paper", "sumo_official", "sumo_ns5", "muon", "muon_moonlight", "muon_svd",
        "muon_polar_express", "galore", "galore_muon", "adamw",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_option_of_a_preset_is_documented_and_its_value_allowed(name: str) -> None:
    values = resolve(name)
    assert set(values) <= set(OPTIONS)
    for key, value in values.items():
        assert OPTIONS[key].check(value) == value
    assert PRESETS[name].doc
    assert PRESETS[name].source


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sumo_paper", {"side": "short", "basis": "randomized", "transport": True, "nesterov": False}),
        (
            "sumo_official",
            {"side": "long", "refresh_offset": 1, "nesterov": "stored", "alpha": 4.0, "aux_lr": 1e-5},
        ),
        ("sumo_official", {"aux_scheduled": False, "weight_decay": 0.01, "decay_order": "after"}),
        (
            "muon",
            {
                "momentum_form": "ema",
                "nesterov": True,
                "update_scale": "rows_cols",
                "orthogonalizer_steps": 5,
            },
        ),
        ("muon_moonlight", {"momentum_form": "sum", "update_scale": "rms_max", "weight_decay": 0.1}),
        ("galore", {"alpha": 0.25, "eps": 1e-6, "betas": (0.9, 0.999), "side": "long", "basis": "svd"}),
        ("galore_muon", {"residual_scale": 0.0, "update_scale": "rms_max", "transport": False}),
        ("adamw", {"betas": (0.9, 0.95), "weight_decay": 0.1}),
    ],
)
def test_values_of_the_published_variants(name: str, expected: dict[str, Any]) -> None:
    values = resolve(name)
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "overrides", "key", "suggestion"),
    [
        ("sumoo", {}, "name", "sumo"),
        ("sumo", {"rnk": 4}, "rnk", "rank"),
        ("muon", {"rank": 4}, "rank", None),
        ("sumo", {"side": "shrt"}, "side", "short"),
        ("sumo", {"rank": 0}, "rank", None),
        ("sumo", {"rank": 2.5}, "rank", None),
        ("sumo", {"rank": "4"}, "rank", None),
        ("sumo", {"rank": True}, "rank", None),
        ("sumo", {"transport": "yes"}, "transport", None),
        ("sumo", {"transport": 1}, "transport", None),
        ("sumo", {"momentum": 1.0}, "momentum", None),
        ("sumo", {"lr": float("nan")}, "lr", None),
        ("sumo", {"lr": -1.0}, "lr", None),
        ("sumo", {"nesterov": 1}, "nesterov", None),
        ("sumo", {"orthogonalizer": "newtonschulz"}, "orthogonalizer", "newton_schulz"),
        ("galore", {"betas": [0.9]}, "betas", None),
        ("galore", {"betas": (0.9, 1.0)}, "betas", None),
        ("galore", {"betas": 3}, "betas", None),
        ("sumo", {"refresh_interval": 0}, "refresh_interval", None),
    ],
)  # fmt: skip
def test_bad_input_names_key_and_remedy(
    name: str, overrides: dict[str, Any], key: str, suggestion: str | None
) -> None:
    with pytest.raises(OptionError) as caught:
        resolve(name, overrides)
    assert caught.value.key == key
    if suggestion:
        assert caught.value.suggestion == suggestion
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)


def test_options_that_exclude_each_other() -> None:
    bad = {"norm_growth_limit": 1.1, "norm_growth_target": "residual", "residual_scale": 0.0}
    with pytest.raises(OptionError, match="limits nothing"):
        resolve("sumo", bad)


def test_values_as_yaml_gives_them_become_canonical() -> None:
    values = resolve("galore", {"betas": [0.8, 0.9], "rank": 4, "lr": 1, "seed": 3})
    assert values["betas"] == (0.8, 0.9)
    assert isinstance(values["lr"], float)
    assert resolve("sumo", {"rank": None, "aux_lr": None})["rank"] is None


def test_the_rank_check_names_the_matrix() -> None:
    with pytest.raises(OptionError) as caught:
        rank_limit_check(resolve("sumo", {"rank": 65}), [("a", (100, 128)), ("k_proj", (64, 128))])
    assert "k_proj (64×128)" in str(caught.value)
    assert caught.value.suggestion == "64"
    rank_limit_check(resolve("sumo", {"rank": 64}), [("a", (100, 128)), ("k_proj", (64, 128))])
    rank_limit_check(resolve("muon"), [("a", (1, 2))])


def test_default_rank() -> None:
    assert (default_rank(512, 1376), default_rank(3, 100)) == (128, 1)


def test_a_dataclass_declares_options_by_its_annotations() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Options:
        size: int | None = option(None, "a size", minimum=1)
        kind: Literal["a", "b"] = option("a", "a kind")
        pair: tuple[float, float] = option((0.9, 0.95), "decay rates")

    found = declared(Options)
    assert (found["size"].type, found["size"].optional, found["size"].minimum) == ("int", True, 1)
    assert (found["kind"].type, found["kind"].choices) == ("str", ("a", "b"))
    assert found["pair"].type == "betas"
    with pytest.raises(OptionError, match="a whole number >= 1"):
        found["size"].check(0)


def test_every_preset_keeps_to_the_options_of_its_rule() -> None:
    """Presets of one rule have the same options; those that rules share mean the same (`_collect` refuses others)."""
    by_rule: dict[str, set[frozenset[str]]] = {}
    for preset in PRESETS.values():
        by_rule.setdefault(preset.rule, set()).add(frozenset(preset.options))
    assert all(len(sets) == 1 for sets in by_rule.values())
