"""The step-time benchmark runs, with every peer; how fast is for its own report."""

from __future__ import annotations

import json

import pytest

from benchmarks.step_time import TARGETS, contestants, main


def test_quick_mode_measures_every_contestant(capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("galore_torch", "muon", "pytorch_optimizer"):
        if package != "galore_torch":  # its __init__ wants bitsandbytes
            pytest.importorskip(package)
    assert main(["--quick", "--threads", "1", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["ms_per_step"]
    assert set(measured) == {c.name for c in contestants(8)}
    assert all(value > 0 for value in measured.values())
    assert {name for a, b, _ in TARGETS for name in (a, b)} <= set(measured)
