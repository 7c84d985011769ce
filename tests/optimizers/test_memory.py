"""What a step holds in memory: the state as the formulas say, no transient larger than a few stacks."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

import optimizers
from benchmarks.memory import allocation_peak, highest, largest_stack, main, measure
from benchmarks.step_time import llama_60m

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the profiler sees its own thread only
    yield
    torch.set_num_threads(before)


def test_highest_is_the_largest_running_sum() -> None:
    assert highest([3, 4, -4, 2, -5, 6]) == 7
    assert highest([-5, 3]) == 0
    assert highest([]) == 0


def test_the_peak_of_known_allocations() -> None:
    def call() -> torch.Tensor:
        first = torch.empty(MIB, dtype=torch.uint8)
        second = torch.empty(2 * MIB, dtype=torch.uint8)
        del first
        third = torch.empty(MIB // 2, dtype=torch.uint8)
        del second
        return third

    assert allocation_peak(call, CPU) == 3 * MIB


def test_allocations_inside_of_an_operator_count() -> None:
    wide = torch.randn(4, 64, 256)
    inside = allocation_peak(lambda: optimizers.polar(wide, "gram"), CPU)
    assert inside > 2 * wide.numel() * 8  # at least the fp64 copy and the fp64 factor


def test_memory_that_was_there_before_does_not_count() -> None:
    kept = [torch.zeros(MIB)]
    assert allocation_peak(lambda: kept.clear(), CPU) == 0


@pytest.mark.parametrize("preset", list(optimizers.PRESETS))
def test_the_state_follows_its_formula(preset: str) -> None:
    shapes, r = llama_60m(1, 32, 48), 8
    per_matrix = {
        "sumo": lambda m, n: r * (m + n),
        "muon": lambda m, n: m * n,
        "galore": lambda m, n: r * min(m, n) + 2 * r * max(m, n),
        "fira": lambda m, n: r * min(m, n) + 2 * r * max(m, n),
        "subtrack": lambda m, n: r * min(m, n) + 2 * r * max(m, n),
        "apollo": lambda m, n: r * min(m, n) + 2 * r * max(m, n),
        "ldadam": lambda m, n: r * min(m, n) + 2 * r * max(m, n) + m * n,
        "dct": lambda m, n: r + 2 * r * max(m, n),
        "gum": lambda m, n: r * min(m, n) + m * n,
        "adamw": lambda m, n: 2 * m * n,
        "lion": lambda m, n: m * n,
        "normuon": lambda m, n: m * n + max(m, n),
        "adamuon": lambda m, n: 2 * m * n,
        "dion2": lambda m, n: m * n,
        "soap": lambda m, n: 2 * m * n + 2 * m * m + 2 * n * n,
    }
    family = "sumo" if preset == "galore_muon" else preset.split("_")[0]
    numbers = sum(per_matrix[family](m, n) for m, n in shapes)
    # One norm per matrix where the preset limits its growth.
    if optimizers.resolve(preset).get("norm_growth_limit") is not None:
        numbers += len(shapes)
    assert measure(preset, shapes, r, CPU)["state"] == 4 * numbers


def test_transients_do_not_grow_with_the_number_of_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import memory
    from optimizers.layouts import batches

    limit = {"cpu": 4 * 32 * 32 * 4, "cuda": 0}  # four square matrices in a stack
    monkeypatch.setattr(batches, "BATCH_BYTES", limit)
    monkeypatch.setattr(memory, "BATCH_BYTES", limit)
    few, many = llama_60m(2, 32, 48), llama_60m(6, 32, 48)
    assert largest_stack(few, CPU) == largest_stack(many, CPU) == limit["cpu"]
    for preset in ("sumo", "muon", "galore"):
        small, large = measure(preset, few, 8, CPU), measure(preset, many, 8, CPU)
        assert large["state"] == 3 * small["state"]
        for kind in ("ordinary", "refresh"):
            if small[kind] is not None:
                # Bookkeeping of some bytes per matrix remains: a spectrum of 8 fp32 numbers, counters, flags.
                assert large[kind] <= 1.05 * small[kind] + 48 * (len(many) - len(few)), (preset, kind)
    # Negative control: one stack for all of a shape grows with the model.
    monkeypatch.setattr(batches, "BATCH_BYTES", {"cpu": 1 << 30, "cuda": 0})
    whole = measure("sumo", many, 8, CPU)["ordinary"]
    assert whole > 2.5 * measure("sumo", few, 8, CPU)["ordinary"]


def test_a_subspace_step_holds_at_most_a_quarter_more_than_one_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import memory
    from optimizers.layouts import batches

    limit = {"cpu": 8 * 128 * 128 * 4, "cuda": 0}
    monkeypatch.setattr(batches, "BATCH_BYTES", limit)
    monkeypatch.setattr(memory, "BATCH_BYTES", limit)
    shapes = llama_60m(2, 128, 344)
    stack = largest_stack(shapes, CPU)
    # Rank a quarter of the short side: Ĝ is a quarter of a stack, its fp64 copy for the Gram a half.
    for preset in ("sumo", "galore"):
        assert measure(preset, shapes, 32, CPU)["ordinary"] <= 1.25 * stack, preset
    # Negative control: a full rank does not fit.
    assert measure("sumo", shapes, 128, CPU)["ordinary"] > 1.25 * stack


def test_quick_mode(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["presets"]) == set(optimizers.PRESETS)
    for preset, found in document["presets"].items():
        assert (found["refresh"] is None) == ("refresh_interval" not in optimizers.resolve(preset)), preset
        assert found["state"] > 0
    assert main(["--quick", "--only", "sumo,adamw"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["sumo", "adamw"]
