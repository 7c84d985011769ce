"""Which cells are certified: the pairwise grid covers what it claims, words choose what they name."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from harness.config import checks, compose
from harness.errors import InputError
from harness.record.certificates import ADAPTERS, CROSSED, ENGINES, TASKS, Cell
from harness.verify import cells, grid, task_rows
from optimizers import presets

ROOT = Path(__file__).parents[3]
SETTINGS = set(itertools.product(grid.DTYPES, grid.ACCUMULATIONS, grid.CLIPPINGS))


@cache
def bare() -> list[Cell]:
    """Return `grid.pairwise`, which takes a third of a second."""
    return grid.pairwise()


def setting(cell: Cell) -> tuple[str, int, str]:
    return cell.dtype, cell.accumulation, cell.clipping


def own(rule: str) -> list[Cell]:
    """Cells of a rule with its preset's options."""
    return [cell for cell in bare() if cell.rule == rule and not cell.options]


@pytest.mark.parametrize("rule", cells.rules())
def test_every_rule_meets_every_layout_dtype_accumulation_and_clipping(rule: str) -> None:
    assert {(cell.engine, cell.variant) for cell in own(rule)} >= set(grid.PLACES)
    for values in zip(*map(setting, own(rule)), strict=True):
        assert len(set(values)) == 2, values
    if rule in CROSSED:
        assert {cell.engine for cell in own(rule) if cell.is_base} == set(ENGINES)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_every_setting_of_an_engine_is_met(engine: str) -> None:
    here = [cell for cell in bare() if cell.engine == engine and not cell.variant and not cell.options]
    assert {setting(cell) for cell in here} == SETTINGS


def test_every_value_of_an_option_meets_every_layout() -> None:
    """By a preset that has it, or by a cell with that option; `UNCERTIFIED_OPTIONS` are told."""
    met: dict[tuple[str, object], set[tuple[str, str]]] = {}
    for cell in bare():
        options = dict(presets.PRESETS[cell.rule].options) if cell.rule in presets.PRESETS else {}
        options.update(cells.option_values_of(cell.options))
        for key, value in options.items():
            met.setdefault((key, str(value)), set()).add((cell.engine, cell.variant))
    for key, option in presets.OPTIONS.items():
        if key in grid.UNCERTIFIED_OPTIONS:
            continue
        for value in (False, True) if option.type == "bool" else option.choices:
            if (key, value) != ("orthogonalizer", "dwh"):
                assert met[key, str(value)] >= set(grid.PLACES), (key, value)


def test_a_number_that_is_off_everywhere_says_with_which_value_it_is_certified() -> None:
    assert not grid.switched_off(), "give these options a line in grid._SWITCHED_ON"


def test_a_cell_with_options_is_measured_against_one_process_with_them() -> None:
    cell = Cell("sumo", "fsdp2", options="update_scale=none refresh_stagger=true")
    words = cells.overrides(cell, "runs")
    assert words[-2:] == ["optimizer.update_scale=none", "optimizer.refresh_stagger=true"]
    assert cells.reference_of(cell).options == cell.options


def test_uneven_worlds_split_work_and_the_factor_of_cuda_are_among_them() -> None:
    found = bare()
    assert {cell.engine for cell in found if cell.world_size == 3} == {"fsdp2", "zero1", "zero3"}
    assert {cell.engine for cell in found if cell.variant == "split"} == {"ddp", "zero0"}
    on_cuda = {(cell.rule, cell.engine) for cell in found if cell.variant == "dwh"}
    assert on_cuda >= {("sumo", engine) for engine in ENGINES}
    assert {rule for rule, _ in on_cuda} >= {"sumo", "sumo_paper", "muon_svd"}
    assert set(grid.every()) > set(found)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_cells_and_their_references_are_runs_that_can_be_configured(stride: int, tmp_path: Path) -> None:
    """One cell with each option values of each rule, and one with each variant; or a third of these."""
    grid_cells = [cell for cell in bare() if cell.rule != cells.EXAMPLE_RULE]
    chosen = {(cell.rule, cell.options): cell for cell in grid_cells}
    chosen |= {(cell.variant, ""): cell for cell in grid_cells}
    few = list(chosen.values())[::stride]
    for cell in {*few, *map(cells.reference_of, few)}:
        world = str(cell.world_size)
        environ = {"WORLD_SIZE": world, "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": world}
        words = compose.load(cells.overrides(cell, str(tmp_path)))
        config = checks.check(words, devices=0, worker=True, environ=environ if cell.world_size > 1 else {})
        assert (config.optimizer.name, config.engine.name) == (cell.rule, cell.engine)
        changed = cells.option_values_of(cell.options)
        assert {key: config.optimizer.options[key] for key in changed} == changed


def test_the_bare_grid_stays_within_its_time() -> None:
    """15 minutes, of which references, noise floors, controls, peers and starting processes take three: 1.9 s a cell,
    4.7 s in bf16 (2 cores, estimated from measured cells)."""
    found = bare()
    assert sum(4.7 if cell.dtype == "bf16" else 1.9 for cell in found) < 720


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


def test_every_task_and_adapter_meets_every_layout_and_rules_of_every_kind() -> None:
    found = [cell for cell in grid.pairwise() if cells.task_of(cell) or cells.adapter_of(cell)]
    for variant in (*TASKS, *ADAPTERS):
        own = [cell for cell in found if cell.variant == variant]
        assert {cell.engine for cell in own} == {"ddp", "fsdp2", "zero1", "zero2", "zero3"}
        assert {cell.rule for cell in own} == {"adamw", "sumo", "muon", "galore"}
        # A mean over micro-batches of unequal size is what could go wrong.
        assert {cell.accumulation for cell in own} == {2}
        assert {cells.reference_of(cell).variant for cell in own} == {variant}
    chosen = grid.select(["variant=answer", "engine=zero3"])
    assert chosen == [c for c in found if (c.engine, c.variant) == ("zero3", "answer")]


def test_rows_of_a_task_are_the_same_for_every_rank(tmp_path: Path) -> None:
    folders = tmp_path / "a", tmp_path / "b"
    texts = []
    for folder in folders:
        folder.mkdir()
        task_rows.data_words(folder)
        texts.append([file.read_text() for file in sorted(folder.iterdir())])
    assert texts[0] == texts[1]
    train, validation = ([json.loads(line) for line in text.splitlines()] for text in texts[0])
    assert (len(train), len(validation)) == (task_rows.TRAIN, task_rows.VALIDATION)
    assert {row["label"] for row in train} == set(task_rows.LABELS)
    assert {len(row["answer"].split()) for row in train} == {1, 2, 3, 4}


def test_words_choose_what_they_name() -> None:
    found = grid.select(["rule=sumo,muon", "engine=fsdp2"])
    assert {(cell.rule, cell.engine) for cell in found} == {("sumo", "fsdp2"), ("muon", "fsdp2")}
    # What is named is taken whole, also where the pairwise grid has none of it.
    assert {
        setting(cell) for cell in grid.select(["rule=galore", "engine=ddp", "dtype=bf16"]) if not cell.variant
    } == {s for s in SETTINGS if s[0] == "bf16"}
    staggered = grid.select(["option=refresh_stagger"])
    assert staggered
    assert all("refresh_stagger=true" in cell.options for cell in staggered)
    assert grid.select([]) == bare()
    assert grid.select([], full=True) == grid.every()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["rule=sumoo"], "certify rule: sumoo is wrong; did you mean sumo?"),
        (["ruel=sumo"], "certify: ruel=sumo chooses no cells"),
        (["option=stagger"], "certify option: stagger is wrong; did you mean refresh_stagger?"),
        (["sumo"], "certify: sumo chooses no cells"),
        (["engine=single", "world_size=2"], "certify: engine=single world_size=2 leaves no cell"),
    ],
)
def test_words_that_choose_nothing(words: list[str], line: str) -> None:
    with pytest.raises(InputError) as caught:
        grid.select(words)
    assert str(caught.value).startswith(line)
    assert "fix: " in str(caught.value)


@pytest.mark.parametrize("rule", ["sumo", "galore", "muon", "adamw"])
@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_cell_is_a_run_that_composes(rule: str, engine: str, tmp_path: Path) -> None:
    from harness.config import checks, compose

    cell = Cell(rule, engine, "bf16", 2, "off", ENGINES[engine])
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
