"""Tables of values in an experiment: which row applies, what decides over it, and what a wrong table says."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config.compose import load
from harness.config.value_tables import merge_rows
from harness.errors import InputError

EXPERIMENT = """# @package _global_
defaults:
  - override /optimizer: galore
data: {name: rte}
batch_size: 8
by:
  data.name:
    rte: {steps: 7}
    cola: {steps: 9, batch_size: 32}
  optimizer.name:
    galore:
      optimizer: {rank: 4}
      by:
        optimizer.rank:
          4: {optimizer: {alpha: 4.0}}
          8: {optimizer: {alpha: 2.0}}
    else: {}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "configs" / "experiment").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "experiment" / "mine.yaml").write_text(EXPERIMENT, encoding="utf-8")
    return tmp_path


@pytest.mark.usefixtures("home")
def test_rows_apply_by_the_value_of_their_key() -> None:
    config = load(["experiment=mine"])
    assert (config.steps, config.batch_size) == (7, 8)
    assert config.optimizer.options == {"rank": 4, "alpha": 4.0}
    config = load(["experiment=mine", "data.name=cola", "optimizer.rank=8"])
    assert (config.steps, config.batch_size) == (9, 32)
    assert config.optimizer.options == {"rank": 8, "alpha": 2.0}


@pytest.mark.usefixtures("home")
def test_the_command_line_decides_over_the_row() -> None:
    config = load(["experiment=mine", "data.name=cola", "batch_size=2", "optimizer.alpha=1"])
    assert (config.steps, config.batch_size) == (9, 2)
    assert config.optimizer.options == {"rank": 4, "alpha": 1.0}


def test_a_file_adds_to_the_rows_of_another_one_and_takes_some_away(home: Path) -> None:
    more = "# @package _global_\ndefaults: [mine]\nby:\n  data.name: {rte: {batch_size: 64}, cola: null}\n"
    (home / "configs" / "experiment" / "more.yaml").write_text(more, encoding="utf-8")
    config = load(["experiment=more"])
    assert (config.steps, config.batch_size) == (7, 64)
    with pytest.raises(InputError, match=r"data\.name: cola has no row in .*more\.yaml; allowed: rte;"):
        load(["experiment=more", "data.name=cola"])


@pytest.mark.usefixtures("home")
def test_a_row_of_another_optimizer_does_not_apply() -> None:
    assert load(["experiment=mine", "optimizer=adamw"]).optimizer.options == {}


def test_a_file_of_the_run_chooses_the_row(home: Path) -> None:
    (home / "run.yaml").write_text("experiment: mine\ndata: {name: cola}\nsteps: 3\n", encoding="utf-8")
    config = load(["run.yaml"])
    assert (config.steps, config.batch_size) == (3, 32)


@pytest.mark.usefixtures("home")
def test_a_value_without_a_row_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.name: qnli has no row in .*mine\.yaml.*rte, cola"):
        load(["experiment=mine", "data.name=qnli"])


@pytest.mark.parametrize("table", ["text", {"steps": []}, {"steps": {}}, {"steps": {"7": 3}}])
def test_what_is_not_a_table_is_refused(table: object) -> None:
    with pytest.raises(InputError, match="is not a table of values"):
        merge_rows({"by": table, "steps": 7}, {}, Path("mine.yaml"))


def test_tables_without_end_are_refused() -> None:
    inside: dict[str, object] = {}
    inside |= {"by": {"steps": {"7": inside}}}
    with pytest.raises(InputError, match="four deep at most"):
        merge_rows({**inside, "steps": 7}, {}, Path("mine.yaml"))
