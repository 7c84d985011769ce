"""The table of growth has a row per preset measured, and says which are missing."""

from __future__ import annotations

from benchmarks.amplification import table


def test_a_partial_table_names_what_is_missing() -> None:
    found = {("adamw", "fp32"): {1: 1.5, 2: 4.0}}
    lines = table(found, 2, [("muon", "fp32")]).splitlines()
    assert lines[0] == "| preset | dtype | after 1 steps | after 2 steps | per step |"
    assert lines[2] == "| adamw | fp32 | 1.5 | 4 | 2 |"
    assert lines[-1] == "Not measured yet: `muon` (fp32)."
    assert "Not measured" not in table(found, 2)
