"""The script behind docs/polar.md runs, keeps the prose around its tables, and measures what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks.polar import BEGIN, END, NO_CUT, QUICK, errors, main


def test_quick_run_rewrites_only_the_tables(tmp_path: Path) -> None:
    page = tmp_path / "polar.md"
    page.write_text(f"# Title\n\n{BEGIN}\nold numbers\n{END}\n\nLast words.\n")
    main(["--quick", "--out", str(tmp_path)])
    text = page.read_text()
    assert text.startswith("# Title")
    assert text.endswith("Last words.\n")
    assert "old numbers" not in text
    assert "| gram |" in text
    assert (tmp_path / "img" / "polar.png").read_bytes()[:4] == b"\x89PNG"


def test_the_errors_rank_as_theory_says() -> None:
    rows = errors(QUICK, NO_CUT)[8, 24]
    # κ = 1e8 without a cut: QR-SVD in fp64 loses 1e8 of 2e-16, the fp32 SVD loses everything.
    assert rows["qr_svd (fp64)"][-1] < 1e-6
    assert rows["gram"][-1] < 1e-6
    assert rows["svd (fp32)"][-1] > 1e-3
    # κ = 1: all singular values go to the same point of the quintic's map, which is not 1.
    assert rows["newton_schulz 5"][0] > 0.03
