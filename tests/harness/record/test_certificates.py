"""A run is told what is known of its cell: exactly, by pairs, or that nothing is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.config import checks, compose
from harness.config.schema import RunConfig
from harness.record import certificates
from harness.record.certificates import Cell
from harness.verify import cells, grid
from harness.verify.verdict import Result
from tests.harness.running import small, write_documents


def config(tmp_path: Path, *words: str) -> RunConfig:
    return checks.check(compose.load([*words, f"runs_dir={tmp_path}"]), environ={}, devices=0)


def document(*results: Result) -> dict[str, Any]:
    entries = json.loads(json.dumps([result.as_dict() for result in results]))
    return {"sources_sha256": certificates.sources_sha256(), "cells": entries}


def green(cell: Cell, error: float = 1e-6) -> Result:
    return Result(cell, True, (), {"replay_error": error})


def test_an_exact_cell(tmp_path: Path) -> None:
    run = config(tmp_path, "optimizer=galore", "engine=fsdp2", "world_size=4", "optimizer.rank=8")
    found = certificates.of_run(run, document(green(Cell("galore", "fsdp2"), 2e-6)))
    assert (found["passed"], found["coverage"], found["replay_error"], found["current"]) == (
        True,
        "exact",
        2e-6,
        True,
    )
    assert certificates.warning(found) is None


def test_the_factor_of_cuda_has_cells_of_its_own(tmp_path: Path) -> None:
    run = config(tmp_path, "optimizer=sumo", "optimizer.orthogonalizer=dwh", "engine=fsdp2", "world_size=2")
    by_cpu, by_cuda = green(Cell("sumo", "fsdp2")), green(Cell("sumo", "fsdp2", variant="dwh"), 2e-6)
    assert certificates.of_run(run, document(by_cpu))["passed"] is None
    found = certificates.of_run(run, document(by_cpu, by_cuda))
    assert (found["passed"], found["coverage"], found["replay_error"]) == (True, "exact", 2e-6)
    # A preset that names another method has no such cell.
    other = config(tmp_path, "optimizer=muon", "optimizer.orthogonalizer=dwh")
    assert "orthogonalizer" in certificates.of_run(other, document(by_cuda))["reason"]


def test_split_work_and_the_factor_of_cuda_need_both_cells(tmp_path: Path) -> None:
    words = ("optimizer=sumo", "optimizer.orthogonalizer=dwh", "engine=ddp", "world_size=2")
    run = config(tmp_path, *words, "engine.optimizer_work=split")
    setting = green(Cell("sumo", "ddp"))
    split, by_cuda = (
        green(Cell("sumo", "ddp", variant="split")),
        green(Cell("sumo", "ddp", variant="dwh"), 3e-6),
    )
    assert certificates.of_run(run, document(setting, split))["passed"] is None
    found = certificates.of_run(run, document(setting, split, by_cuda))
    assert (found["passed"], found["coverage"], found["replay_error"]) == (True, "pairwise", 3e-6)


def test_a_pair_of_cells(tmp_path: Path) -> None:
    run = config(
        tmp_path,
        "optimizer=galore",
        "engine=ddp",
        "world_size=2",
        "precision=bf16",
        "micro_batch_size=2",
        "batch_size=8",
    )
    plain, other = green(Cell("galore", "ddp"), 1e-6), green(Cell("muon", "ddp", "bf16", 2), 3e-6)
    found = certificates.of_run(run, document(plain, other))
    assert (found["passed"], found["coverage"], found["replay_error"]) == (True, "pairwise", 3e-6)
    # One of the two is not enough, and a red one is told.
    assert certificates.of_run(run, document(plain))["passed"] is None
    failed = certificates.of_run(run, document(plain, Result(other.cell, False, ("why",))))
    assert failed["passed"] is False
    assert "failed" in str(certificates.warning(failed))


def test_a_rule_is_covered_on_the_engines_of_a_class_of_layouts(tmp_path: Path) -> None:
    run = config(tmp_path, "optimizer=galore", "engine=zero0", "world_size=2")
    setting = green(Cell("muon", "zero0"))
    assert (
        certificates.of_run(run, document(setting, green(Cell("galore", "ddp"), 2e-6)))["replay_error"]
        == 2e-6
    )
    found = certificates.of_run(run, document(setting, green(Cell("galore", "fsdp2"))))
    assert found["reason"] == "uncertified: galore × replicated"


def test_an_option_needs_a_cell_that_has_it_in_this_class_of_layouts(tmp_path: Path) -> None:
    run = config(tmp_path, "optimizer=sumo", "engine=fsdp2", "world_size=2", "optimizer.update_scale=none")
    plain = green(Cell("sumo", "fsdp2"))
    elsewhere = green(Cell("muon", "ddp", options="update_scale=none"))
    assert certificates.of_run(run, document(plain, elsewhere))["reason"] == (
        "uncertified: update_scale=none × sharded"
    )
    having = green(Cell("muon", "fsdp2", options="orthogonalizer=cubic update_scale=none"), 3e-6)
    found = certificates.of_run(run, document(plain, having))
    assert (found["passed"], found["coverage"], found["replay_error"]) == (True, "pairwise", 3e-6)
    # Also a preset that has the value covers it.
    long = config(tmp_path, "optimizer=sumo", "engine=fsdp2", "world_size=2", "optimizer.side=long")
    assert certificates.of_run(long, document(plain, green(Cell("galore", "fsdp2"))))["passed"]


def test_large_matrices_need_a_cell_whose_refreshes_are_spread(tmp_path: Path) -> None:
    plain = green(Cell("sumo", "single", world_size=1))
    small_model = config(tmp_path, "optimizer=sumo", "world_size=1")
    assert certificates.of_run(small_model, document(plain))["coverage"] == "exact"
    large = config(tmp_path, "optimizer=sumo", "world_size=1", "model=llama_1b")
    assert "refresh_stagger=true" in certificates.of_run(large, document(plain))["reason"]
    staggered = green(Cell("galore", "ddp", options="refresh_stagger=true"))
    assert certificates.of_run(large, document(plain, staggered))["passed"]


def test_a_task_needs_a_cell_of_its_own_in_its_class_of_layouts(tmp_path: Path) -> None:
    task = ("task=classify", "task.text=[text]", "task.label=label", "data=jsonl", "data.files=[rows.jsonl]")
    run = config(
        tmp_path, "optimizer=sumo", "engine=zero0", "world_size=2", *task, "data.validation_files=[v.jsonl]"
    )
    plain = green(Cell("sumo", "ddp")), green(Cell("muon", "zero0"))
    assert certificates.of_run(run, document(*plain))["reason"] == "uncertified: classify × replicated"
    elsewhere, other = Cell("sumo", "fsdp2", variant="classify"), Cell("sumo", "ddp", variant="answer")
    found = certificates.of_run(run, document(*plain, green(elsewhere), green(other)))
    assert found["reason"] == "uncertified: classify × replicated"
    found = certificates.of_run(run, document(*plain, green(Cell("adamw", "ddp", variant="classify"), 3e-6)))
    assert (found["passed"], found["coverage"], found["replay_error"]) == (True, "pairwise", 3e-6)


def test_an_adapter_needs_a_cell_of_its_own_in_its_class_of_layouts(tmp_path: Path) -> None:
    run = config(tmp_path, "optimizer=sumo", "engine=zero0", "world_size=2", "model.adapter=lora")
    plain = green(Cell("sumo", "ddp")), green(Cell("muon", "zero0"))
    assert certificates.of_run(run, document(*plain))["reason"] == "uncertified: lora × replicated"
    found = certificates.of_run(run, document(*plain, green(Cell("adamw", "ddp", variant="lora"), 3e-6)))
    assert (found["passed"], found["coverage"], found["replay_error"]) == (True, "pairwise", 3e-6)


def test_a_value_that_no_cell_has_is_not_covered(tmp_path: Path) -> None:
    cell = green(Cell("soap", "single", world_size=1))
    words = ("optimizer=soap", "world_size=1")
    assert "gram_dtype=float32" in certificates.of_run(config(tmp_path, *words), document(cell))["reason"]
    wide = config(tmp_path, *words, "optimizer.gram_dtype=float64")
    assert certificates.of_run(wide, document(cell))["coverage"] == "exact"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["optimizer.target=torch.optim.SGD", "optimizer.lr=0.1"], "import path"),
        (["optimizer=sumo", "optimizer.side=long"], "side"),
        (["optimizer=sumo", "precision=bf16_pure"], "uncertified"),
    ],
)
def test_what_has_no_certificate(words: list[str], reason: str, tmp_path: Path) -> None:
    found = certificates.of_run(
        config(tmp_path, *words, "world_size=1"), document(green(Cell("sumo", "single")))
    )
    assert found["passed"] is None
    assert reason in found["reason"]
    assert reason in str(certificates.warning(found))


def test_numbers_are_no_other_path(tmp_path: Path) -> None:
    words = ["optimizer.rank=4", "optimizer.momentum=0.9", "optimizer.refresh_interval=50", "seed=3"]
    run = config(tmp_path, "optimizer=sumo", "world_size=1", *words)
    assert certificates.of_run(run, document(green(Cell("sumo", "single", world_size=1))))["passed"]


def test_controls_and_peers_certify_nothing(tmp_path: Path) -> None:
    run = config(tmp_path, "optimizer=muon", "engine=ddp", "world_size=2")
    for cell in (Cell("muon", "ddp", control="clipping forgotten"), Cell("muon", "ddp", is_peer=True)):
        assert certificates.of_run(run, document(green(cell)))["passed"] is None


def test_other_sources_are_said(tmp_path: Path) -> None:
    run = config(tmp_path, "optimizer=muon", "engine=ddp", "world_size=2")
    old = {**document(green(Cell("muon", "ddp"))), "sources_sha256": "0" * 64}
    assert certificates.of_run(run, old)["current"] is False


SOURCE = '''
"""A module."""
LIMIT = 3
"""What the limit is."""


def step(x: float) -> float:
    """Return the step."""
    # The reason.
    return x * f"{LIMIT}".count("3")
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""A module."""\n', ""),
        ('"""What the limit is."""', '"""Another sentence."""'),
        ("# The reason.", "# A better reason,\n    # on two lines."),
        ("return x * f", "return (\n        x * f"),
    ],
    ids=["module docstring", "attribute docstring", "comment", "layout"],
)
def test_prose_and_layout_do_not_change_the_hash_of_the_code(old: str, new: str) -> None:
    changed = SOURCE.replace(old, new)
    if "(\n" in new:
        changed = changed.rstrip() + "\n    )\n"
    assert changed != SOURCE
    assert certificates.code_sha256(changed) == certificates.code_sha256(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LIMIT = 3", "LIMIT = 4"),
        ("LIMIT = 3", "LIMIT = 3.0"),
        ("x * f", "x + f"),
        ('count("3")', 'count("4")'),
        ("def step(x: float)", "def step(y: float)"),
        ('f"{LIMIT}"', 'f"{LIMIT!r}"'),
        ("    return x", "    x = -x\n    return x"),
    ],
)
def test_a_change_of_the_code_changes_its_hash(old: str, new: str) -> None:
    changed = SOURCE.replace(old, new)
    assert changed != SOURCE
    assert certificates.code_sha256(changed) != certificates.code_sha256(SOURCE)


def test_what_is_shipped_is_green_and_complete() -> None:
    shipped = json.loads(certificates.SHIPPED.read_text())
    ours = [entry for entry in shipped["cells"] if not entry["is_control"] and not entry["is_peer"]]
    shown = {(e["rule"], e["engine"], e["variant"], e.get("options", "")) for e in ours}
    assert shown >= {(c.rule, c.engine, c.variant, c.options) for c in grid.pairwise()}
    assert all(entry["passed"] for entry in ours)
    controls = [entry for entry in shipped["cells"] if entry["is_control"]]
    assert {entry["control"] for entry in controls} == set(cells.CONTROLS)
    assert not any(entry["passed"] for entry in controls)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "galore", "sumo"])
def test_the_quickstart_is_certified(optimizer: str, tmp_path: Path) -> None:
    run = config(tmp_path, "experiment=quickstart", f"optimizer={optimizer}")
    assert certificates.warning(certificates.of_run(run)) is None


def test_a_run_records_its_certificate_and_says_when_it_has_none(tmp_path: Path) -> None:
    from harness.preparation import prepare
    from harness.run import execute

    words = small(
        write_documents(tmp_path), tmp_path, "optimizer=sumo", "optimizer.rank=8", "precision=bf16_pure"
    )
    prepared = prepare(words, say=lambda text: None, worker=True)
    assert execute(prepared) == "finished"
    recorded = json.loads((prepared.folder / "environment.json").read_text())["certificate"]
    assert recorded["passed"] is None
    assert recorded["reason"] == "uncertified: single × bf16_pure × 1 × on"
    said = json.loads((prepared.folder / "summary.json").read_text())["warnings"]
    assert certificates.warning(recorded) in said
    assert f"warning: {certificates.warning(recorded)}" in (prepared.folder / "log.txt").read_text()
