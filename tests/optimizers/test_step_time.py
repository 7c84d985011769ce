"""The step-time benchmark runs, with every peer; how fast is for its own report."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import rooflines
from benchmarks.step_time import TARGETS, contestants, main
from optimizers.linalg.newton_schulz import newton_schulz


def test_quick_mode_measures_every_contestant(capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("galore_torch", "muon", "pytorch_optimizer"):
        if package != "galore_torch":  # its __init__ wants bitsandbytes
            pytest.importorskip(package)
    assert main(["--quick", "--threads", "1", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["ms_per_step"]
    assert set(measured) == {c.name for c in contestants(8)}
    assert all(value > 0 for value in measured.values())
    # apollo-torch is not among the packages of development: its licence is not a free one.
    assert {name for a, b, _ in TARGETS for name in (a, b) if not name.startswith("apollo-torch")} <= set(
        measured
    )


def test_a_profile_names_operators_and_refuses_strangers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--threads", "1", "--profile", "ours: sumo"]) == 0
    assert "aten::_linalg_eigh" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--quick", "--profile", "ours: nothing"])
    assert "ours: sumo" in capsys.readouterr().err


def test_rooflines_run_and_the_gram_form_is_the_iteration(capsys: pytest.CaptureFixture[str]) -> None:
    assert rooflines.main(["--quick", "--threads", "1", "--rounds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    assert len(found) == 3
    # Same polynomial: in fp64 only rounding is left of the difference; a plan of four iterations is another one.
    matrix = torch.randn(24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = newton_schulz(matrix, dtype=torch.float64)
    for plan in ((2, 2, 1), (2, 3), (5,)):
        torch.testing.assert_close(rooflines.gram_form(matrix, plan, torch.float64), exact, rtol=0, atol=1e-9)
    assert (rooflines.gram_form(matrix, (2, 2), torch.float64) - exact).norm() > 0.1
