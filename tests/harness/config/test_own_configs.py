"""A user's own ./configs: searched first, and every mistake in it is an error that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config.compose import load
from harness.config.sources import find, options, package_root, search_path
from harness.errors import InputError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "configs"


def write(home: Path, name: str, content: str) -> Path:
    path = home / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def test_own_files_come_first_and_ours_stay(home: Path) -> None:
    write(home, "model/llama_tiny.yaml", "name: mine\nconfig: {hidden_size: 64}\n")
    assert load([]).model.config == {"hidden_size": 64}
    assert load(["model=llama_60m"]).model.config["hidden_size"] == 512
    assert options("engine")[:3] == ["auto", "ddp", "fsdp2"]


def test_a_configs_folder_of_another_program_is_left_alone(home: Path) -> None:
    write(home, "nginx/model.yaml", "a: 1\n")
    assert search_path() == [package_root()]
    assert load([]).model.name == "llama_tiny"


def test_own_defaults(home: Path) -> None:
    write(home, "optbench.yaml", "defaults:\n  - /optbench_base\n  - _self_\nsteps: 7\n")
    write(home, "optbench_base.yaml", (package_root() / "optbench.yaml").read_text(encoding="utf-8"))
    write(home, "experiment/.keep", "")
    assert load([]).steps == 7
    assert load(["steps=8"]).steps == 8


def test_own_experiment(home: Path) -> None:
    write(home, "model/mine.yaml", "name: mine\nconfig: {hidden_size: 64}\n")
    write(
        home,
        "experiment/e.yaml",
        "# @package _global_\ndefaults:\n  - override /model: mine\n  - override /optimizer: sumo\n"
        "steps: 7\noptimizer:\n  rank: 8\n",
    )
    config = load(["experiment=e", "seed=3"])
    assert (config.model.name, config.optimizer.name, config.steps, config.seed) == ("mine", "sumo", 7, 3)
    assert config.optimizer.options == {"rank": 8}


BROKEN = [
    ("model/m.yaml", "name: m\nattentoin: sdpa\n", ["model=m"], "did you mean model.attention?"),
    ("optimizer/o.yaml", "name: sumo\nrnk: 4\n", ["optimizer=o"], "did you mean optimizer.rank?"),
    (
        "model/m.yaml",
        "name: m\nconfig: {hiden_size: 4}\n",
        ["model=m"],
        "did you mean model.config.hidden_size?",
    ),
    ("model/m.yaml", "name: [m\n", ["model=m"], "is not YAML"),
    ("experiment/e.yaml", "# @package _global_\nstepss: 7\n", ["experiment=e"], "did you mean steps?"),
    ("experiment/e.yaml", "# @package _global_\nsteps: many\n", ["experiment=e"], "steps: many is wrong"),
    (
        "experiment/e.yaml",
        "# @package _global_\nsteps: 1\nsteps: 2\n",
        ["experiment=e"],
        "duplicate key steps",
    ),
    (
        "experiment/e.yaml",
        "# @package _global_\noptimizer: sumo\n",
        ["experiment=e"],
        "override /optimizer: sumo",
    ),
    ("experiment/e.yaml", "steps: 7\n", ["experiment=e"], "# @package _global_"),
    (
        "experiment/e.yaml",
        "# @package _global_\ndefaults: [override /model: nope]\n",
        ["experiment=e"],
        "nope",
    ),
    ("optbench.yaml", "steps: [\n", [], "is not YAML"),
]


@pytest.mark.parametrize(("name", "content", "words", "part"), BROKEN, ids=[part for *_, part in BROKEN])
def test_mistakes_in_files_are_errors(
    home: Path, name: str, content: str, words: list[str], part: str
) -> None:
    write(home, "experiment/.keep", "")
    path = write(home, name, content)
    with pytest.raises(InputError) as caught:
        load(words)
    message = str(caught.value)
    assert part in message
    # A missing option is Hydra's own message: it names the experiment, not the path.
    assert path.name in message or "experiment/e" in message or "experiment=e" in message


def test_a_word_beats_the_file_in_the_blame(home: Path) -> None:
    write(home, "experiment/e.yaml", "# @package _global_\nsteps: many\n")
    with pytest.raises(InputError, match=r"^steps: few is wrong; allowed") as caught:
        load(["experiment=e", "steps=few"])
    assert "e.yaml" not in str(caught.value)


def test_every_shipped_file_loads() -> None:
    groups = ("model", "data", "optimizer", "engine", "schedule")
    columns = {group: options(group) for group in groups}
    assert all(find(group, option) is not None for group, column in columns.items() for option in column)
    # One load takes one option of each group: as many loads as the longest group has options.
    for place in range(max(map(len, columns.values()))):
        load([f"{group}={column[place % len(column)]}" for group, column in columns.items()])
