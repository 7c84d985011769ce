"""A rule of one's own: 20 lines, found by entry point, routed, batched, probed and resumed like the ones
here."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimizers
from optimizers import presets

RULE = '''
import torch
from optimizers.rules import Rule, Update


class SignMomentum(Rule):
    """Sign of the momentum (Bernstein et al. 2018, arXiv 1802.04434)."""

    doc = "sign of the momentum"
    source = "arXiv 1802.04434"
    defaults = {"momentum": 0.9, "sharpness": 1.0}

    def state(self, shape, options):
        return {"moment": shape}

    def step(self, stacks, rows):
        for s in stacks:
            moment = s.blend("moment", s.gradient, s.options["momentum"], 1.0)
            yield Update(s.options["alpha"] * torch.sign(moment))
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "sign_rule.py").write_text(RULE)
    meta = tmp_path / "sign_rule-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: sign_rule\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text("[optbench.optimizers]\nsign_momentum = sign_rule:SignMomentum\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    presets._entry_points.cache_clear()
    yield
    presets._entry_points.cache_clear()
    sys.modules.pop("sign_rule", None)


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


def test_an_entry_point_that_is_no_rule_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optimizers import rules

    monkeypatch.setattr(rules, "plugin_rule", lambda name: dict)
    with pytest.raises(TypeError, match=r"is no optimizers\.rules\.Rule"):
        rules.load("whatever")
