"""A rule of one's own: 20 lines, found by entry point, routed, batched, probed and resumed like the ones
here."""

from __future__ import annotations

import copy
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimizers
from optimizers import presets

RULE = '''
import torch
from optimizers import Rule, Update


class SignMomentum(Rule):
    """Sign of the momentum (Bernstein et al. 2018, arXiv 1802.04434)."""

    doc = "sign of the momentum"
    source = "arXiv 1802.04434"
    defaults = {"momentum": 0.9, "sharpness": 1.0}

    def state(self, shape, options):
        return {"moment": shape}

    def update(self, b):
        moment = b.blend("moment", b.gradient, b.options["momentum"], 1.0)
        return Update(b.options["alpha"] * torch.sign(moment))
'''


Install = Callable[[str, str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a package with one rule on the path: (name of the rule, class, source)."""

    def put(name: str, kind: str, source: str) -> None:
        (tmp_path / "rule_of_a_test.py").write_text(source)
        meta = tmp_path / "rule_of_a_test-1.0.dist-info"
        meta.mkdir()
        (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: rule_of_a_test\nVersion: 1.0\n")
        (meta / "entry_points.txt").write_text(f"[optbench.optimizers]\n{name} = rule_of_a_test:{kind}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        presets._entry_points.cache_clear()

    yield put
    presets._entry_points.cache_clear()
    presets._PLUGIN_RULES.clear()
    sys.modules.pop("rule_of_a_test", None)


@pytest.fixture
def installed(install: Install) -> None:
    install("sign_momentum", "SignMomentum", RULE)


@pytest.mark.usefixtures("installed")
def test_a_rule_from_another_package() -> None:
    assert "sign_momentum" in optimizers.names()
    assert optimizers.resolve("sign_momentum", {"sharpness": 2.0})["sharpness"] == 2.0
    with pytest.raises(optimizers.OptionError, match="did you mean momentum"):
        optimizers.resolve("sign_momentum", {"momentun": 0.5})
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 4), nn.Linear(4, 6), nn.LayerNorm(6))
    optimizer: Any = optimizers.build(
        "sign_momentum", net.named_parameters(), modules=net, lr=0.125, weight_decay=0.0, momentum=0.5
    )
    assert [r.rule for r in optimizer.routes].count("sign_momentum") == 2
    weight = net.get_parameter("1.weight")
    start = weight.detach().clone()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.observe_moments()
    optimizer.step()
    assert torch.equal(weight.detach(), start - 0.125)
    assert set(optimizer.moment_figures()) == {"1.weight", "2.weight"}
    assert optimizer.state_bytes()["moment"] == 2 * 24 * 4
    twin = copy.deepcopy(optimizer)
    twin.load_state_dict(optimizer.state_dict())


@pytest.mark.usefixtures("installed")
def test_the_rule_file_is_short() -> None:
    assert len([line for line in RULE.splitlines() if line.strip()]) <= 20


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("value", ["hello", True, None, float("nan")])
def test_an_option_that_only_the_rule_has_takes_what_its_default_is(value: object) -> None:
    with pytest.raises(optimizers.OptionError, match=r"^sharpness: .* is not allowed"):
        optimizers.resolve("sign_momentum", {"sharpness": value})
    assert optimizers.resolve("sign_momentum", {"sharpness": 3})["sharpness"] == 3.0


def documented() -> str:
    page = Path(__file__).resolve().parents[2] / "docs" / "optimizers.md"
    (block,) = re.findall(
        r"## A rule of your own\n\n```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
    )
    return block


def test_the_documented_rule_runs_and_its_state_is_not_called_moment(install: Install) -> None:
    install("unit_velocity", "UnitVelocity", documented())
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 4), nn.Linear(4, 6))
    optimizer: Any = optimizers.build("unit_velocity", net.named_parameters(), modules=net, lr=0.1, floor=0.0)
    weight = net.get_parameter("1.weight")
    start = weight.detach().clone()
    for _ in range(2):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.observe_moments()
        optimizer.step()
    # 0.2·√max(m, n) times a matrix of norm one, twice.
    expected = start - 2 * 0.1 * 0.2 * 6**0.5 * torch.ones(4, 6) / 24**0.5
    torch.testing.assert_close(weight.detach(), expected)
    assert set(optimizer.moment_figures()) == {"1.weight", "2.weight"}
    spectra = optimizer.moment_spectra()
    torch.testing.assert_close(
        spectra["1.weight"], torch.linalg.svdvals(optimizer.state[weight]["velocity"]), rtol=1e-4, atol=1e-5
    )
    assert optimizer.state_bytes()["velocity"] == 2 * 24 * 4
    weight.grad = torch.full_like(weight, float("nan"))
    before = optimizer.state[weight]["velocity"].clone()
    with pytest.warns(RuntimeWarning, match="^1.weight: the gradient is not finite"):
        optimizer.step()
    assert torch.equal(before, optimizer.state[weight]["velocity"])
    twin = copy.deepcopy(optimizer)
    twin.load_state_dict(optimizer.state_dict())
    wrong: list[dict[str, Any]] = [
        {"norm": "largst"},
        {"floor": "hello"},
        {"momentum": 2.0},
        {"update_scale": "rms"},
    ]
    for bad in wrong:
        (key,) = bad
        with pytest.raises(optimizers.OptionError, match=f"^{key}: "):
            optimizers.build("unit_velocity", net.named_parameters(), modules=net, **bad)


def test_a_rule_without_a_matrix_in_its_state_has_no_spectra(install: Install) -> None:
    install(
        "plain",
        "Plain",
        HEAD + "class Plain(Rule):\n    def state(self, shape, options):\n        return {}\n" + STEP,
    )
    weight = nn.Parameter(torch.zeros(4, 6))
    optimizer: Any = optimizers.build("plain", [("w", weight)], lr=0.5)
    weight.grad = torch.ones_like(weight)
    optimizer.observe_moments()
    optimizer.step()
    assert torch.equal(weight.detach(), torch.full((4, 6), -0.5))
    assert optimizer.moment_spectra() == {}
    assert optimizer.moment_figures() == {}


HEAD = "import torch\nfrom optimizers import Option, Rule, Update\n"
STATE = "    def state(self, shape, options):\n        return {'velocity': shape}\n"
STEP = "    def update(self, b):\n        return Update(b.gradient)\n"
OLD = "    def step(self, stacks, rows):\n        for s in stacks:\n            yield Update(s.gradient)\n"
BROKEN = {
    "no rule": ("Bad = dict\n", "is not an optimizers.Rule"),
    "raises at import": ("1 / 0\n", "cannot be loaded from .*ZeroDivisionError"),
    "lacks update": ("class Bad(Rule):\n" + STATE, "cannot be loaded .*abstract"),
    "old contract": ("class Bad(Rule):\n" + STATE + OLD, r"defines step\(stacks, rows\).* write update\(self, b\)"),
    "old method": (
        "class Bad(Rule):\n    def row_traffic(self, *_):\n        return 0.0\n" + STATE + STEP,
        "defines row_traffic, which is now called sharded_step_bytes",
    ),
    "other key": (
        "class Bad(Rule):\n" + STATE + STEP.replace("b.gradient", "b.state['moment']"),
        "fails on 4×6 matrices .KeyError: 'moment'",
    ),
    "wrong shape": ("class Bad(Rule):\n" + STATE + STEP.replace("b.gradient", "b.gradient.mT"), r"shape \(2, 6, 4\)"),
    "not finite": ("class Bad(Rule):\n" + STATE + STEP.replace("b.gradient", "b.gradient / 0"), "is not finite"),
    "no update": (
        "class Bad(Rule):\n" + STATE + STEP.replace("Update(b.gradient)", "b.gradient"), "must return an optimizers",
    ),
    "yielded": (
        "class Bad(Rule):\n" + STATE + STEP.replace("return Update", "yield Update"),
        "yields Update.*an Update is returned",
    ),
    "state shape": ("class Bad(Rule):\n" + STATE.replace("shape}", "4}") + STEP, "state velocity the shape 4"),
    "state name": ("class Bad(Rule):\n" + STATE.replace("velocity", "step") + STEP, "calls a state 'step'"),
    "default": ("class Bad(Rule):\n    defaults = {'momentum': 7}\n" + STATE + STEP, "not allowed: momentum: 7"),
    "untyped": ("class Bad(Rule):\n    defaults = {'mode': 'fast'}\n" + STATE + STEP, "own_options"),
    "undeclared": (
        "class Bad(Rule):\n    own_options = (Option('sped', 'float', ''),)\n    defaults = {'speed': 1.0}\n"
        + STATE + STEP,
        "did you mean speed",
    ),
    "row form": ("class Bad(Rule):\n    needs_whole = False\n" + STATE + STEP, "gives no state .*has no row form"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_refused_in_one_sentence(case: str, install: Install) -> None:
    source, reason = BROKEN[case]
    install("bad", "Bad", HEAD + source)
    weight = nn.Parameter(torch.zeros(4, 6))
    with pytest.raises(optimizers.OptionError, match=f"^name: bad .*{reason}") as caught:
        optimizers.build("bad", [("w", weight)], lr=0.1)
    assert "\n" not in str(caught.value)
    with pytest.raises(optimizers.OptionError):
        optimizers.resolve("bad")


def test_a_helper_under_a_former_name_is_the_own_affair_of_a_rule_of_today(install: Install) -> None:
    helper = "    def factors(self):\n        return 1\n"
    method = "    def low_rank_form(self, shape, options):\n        return None\n"
    install("good", "Good", HEAD + "class Good(Rule):\n" + helper + method + STATE + STEP)
    optimizers.build("good", [("w", nn.Parameter(torch.zeros(4, 6)))], lr=0.1)


def test_show_promises_what_train_finds(install: Install) -> None:
    from harness.config import derived_defaults
    from harness.listing import _show_optimizer

    install("unit_velocity", "UnitVelocity", documented())
    (row,) = [r for r in _show_optimizer("unit_velocity")["options"] if r["option"] == "optimizer.lr"]
    assert row["default"] == "none: give optimizer.lr=…"
    assert derived_defaults.default_learning_rate("unit_velocity", 10**6) is None


def test_a_rate_of_the_rule_itself_is_the_default(install: Install) -> None:
    from harness.config import derived_defaults
    from harness.listing import _show_optimizer

    install("unit_velocity", "UnitVelocity", documented().replace('{"momentum"', '{"lr": 0.07, "momentum"'))
    (row,) = [r for r in _show_optimizer("unit_velocity")["options"] if r["option"] == "optimizer.lr"]
    found = derived_defaults.default_learning_rate("unit_velocity", 10**6)
    assert found is not None
    assert (row["default"], found.lr, found.tuned) == (0.07, 0.07, False)
    assert "frobenius" in str(_show_optimizer("unit_velocity")["options"])
