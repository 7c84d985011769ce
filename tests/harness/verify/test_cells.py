"""Which cells are certified: the pairwise grid covers what it claims, words choose what they name."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import InputError
from harness.record.certificates import Cell
from harness.verify import cells

ROOT = Path(__file__).parents[3]
SETTINGS = set(itertools.product(cells.DTYPES, cells.ACCUMULATIONS, cells.CLIPPINGS))


def setting(cell: Cell) -> tuple[str, int, str]:
    return cell.dtype, cell.accumulation, cell.clipping


def test_every_rule_on_every_engine() -> None:
    found = {(cell.rule, cell.engine) for cell in cells.pairwise()}
    assert found >= set(itertools.product(cells.rules(), cells.ENGINES))
    assert {"sumo", "sumo_official", "galore", "muon", "adamw", cells.EXAMPLE_RULE} <= set(cells.rules())


@pytest.mark.parametrize("engine", list(cells.ENGINES))
def test_every_setting_of_an_engine_and_every_pair_under_each_rule(engine: str) -> None:
    here = [cell for cell in cells.pairwise() if cell.engine == engine and cell.rule in cells.CROSSED]
    assert {setting(cell) for cell in here} == SETTINGS
    for rule in cells.CROSSED:
        met = {setting(cell) for cell in here if cell.rule == rule}
        for first, second in itertools.combinations(range(3), 2):
            wanted = {(s[first], s[second]) for s in SETTINGS}
            assert {(s[first], s[second]) for s in met} == wanted, rule


def test_uneven_worlds_and_split_work_are_among_them() -> None:
    found = cells.pairwise()
    assert {cell.engine for cell in found if cell.world_size == 3} == {"fsdp2", "zero1", "zero3"}
    assert {cell.engine for cell in found if cell.variant == "split"} == {"ddp", "zero0"}
    assert {(cell.rule, cell.engine) for cell in found if cell.variant == "dwh"} == {
        (rule, engine) for rule in ("sumo", "sumo_paper", "muon_svd") for engine in cells.ENGINES
    }
    assert set(cells.every()) > set(found)
    assert len(set(found)) == len(found)


def test_the_factor_of_cuda_is_measured_against_that_of_cpus() -> None:
    cell = Cell("sumo", "fsdp2", variant="dwh")
    assert "optimizer.orthogonalizer=dwh" in cells.overrides(cell, "runs")
    reference = cells.reference_of(cell)
    assert (reference.engine, reference.variant) == ("single", "gram")
    assert not any(
        word.startswith("optimizer.orthogonalizer=") for word in cells.overrides(reference, "runs")
    )
    assert cells.raises_cut(cell)
    assert cells.raises_cut(reference)
    assert not cells.raises_cut(Cell("sumo", "fsdp2"))


def test_words_choose_what_they_name() -> None:
    found = cells.select(["rule=sumo,muon", "engine=fsdp2"])
    assert {(cell.rule, cell.engine) for cell in found} == {("sumo", "fsdp2"), ("muon", "fsdp2")}
    # What is named is taken whole, also where the pairwise grid has none of it.
    assert {
        setting(cell)
        for cell in cells.select(["rule=galore", "engine=ddp", "dtype=bf16"])
        if not cell.variant
    } == {s for s in SETTINGS if s[0] == "bf16"}
    assert cells.select([]) == cells.pairwise()
    assert cells.select([], full=True) == cells.every()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["rule=sumoo"], "certify rule: sumoo is wrong; did you mean sumo?"),
        (["ruel=sumo"], "certify: ruel=sumo chooses no cells"),
        (["sumo"], "certify: sumo chooses no cells"),
        (["engine=single", "world_size=2"], "certify: engine=single world_size=2 leaves no cell"),
    ],
)
def test_words_that_choose_nothing(words: list[str], line: str) -> None:
    with pytest.raises(InputError) as caught:
        cells.select(words)
    assert str(caught.value).startswith(line)
    assert "fix: " in str(caught.value)


@pytest.mark.parametrize("rule", ["sumo", "galore", "muon", "adamw"])
@pytest.mark.parametrize("engine", list(cells.ENGINES))
def test_a_cell_is_a_run_that_composes(rule: str, engine: str, tmp_path: Path) -> None:
    from harness.config import checks, compose

    cell = Cell(rule, engine, "bf16", 2, "off", cells.ENGINES[engine])
    config = checks.check(compose.load(cells.overrides(cell, str(tmp_path))), environ={}, devices=0)
    assert config.engine.name == engine
    assert config.precision == "bf16"
    assert config.max_grad_norm is None
    assert config.micro_batch_size is not None
    assert config.batch_size == 2 * config.micro_batch_size * cell.world_size
    # Two refreshes within the run.
    assert cells.STEPS == 2 * cells.REFRESH_INTERVAL


def test_choosing_cells_imports_no_torch() -> None:
    probe = (
        "import sys; from harness.cli import main; code = main(['certify', 'rule=sumoo']);"
        "from harness.record import certificates; from harness.verify import command;"
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "2 False"
