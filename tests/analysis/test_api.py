"""`from harness import train, compare, load_runs`: the keys of the command line, data frames, lazy imports."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import harness
from analysis import api
from analysis.pages import screenshot
from harness.config import overrides
from harness.errors import InputError
from harness.jobs import launch
from tests.analysis import synthetic
from tests.analysis.stand_in import Launcher

SMALL: dict[str, Any] = {
    "steps": 20,
    "world_size": 1,
    "batch_size": 2,
    "seq_len": 32,
    "eval": {"tokens": 512},
    "wandb.mode": "disabled",
}


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    fake = Launcher()
    monkeypatch.setattr(launch, "start", fake.start)
    monkeypatch.setattr(screenshot, "browser", lambda: None)
    return fake


def test_the_functions_come_from_harness_and_cost_nothing_before_they_are_asked_for() -> None:
    code = (
        "import sys, harness; assert not {'pandas', 'torch', 'numpy', 'analysis'} & set(sys.modules), 'not lazy'\n"
        "from harness import train, compare, load_runs, InputError\n"
        "assert callable(train) and callable(compare) and callable(load_runs)\n"
        "from harness.jobs import launch\n"
        "from harness import train as again\n"
        "assert callable(again) and again.main is train.main\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"train", "compare", "load_runs"} <= set(dir(harness))
    with pytest.raises(ImportError):
        exec("from harness import no_such_function")


@pytest.mark.parametrize(
    "value",
    [
        *(
            True,
            None,
            3,
            1e-3,
            2.5e-05,
            "sumo",
            "runs/a b",
            "a,b",
            "x=y",
            "[a]",
            'say "hi"',
            "back\\slash",
            "end\\",
        ),
        *('\\"', "naïve", "a:b", [1, 2], ["a b", "c,d"], {"a": 1}, "it's", " lead", "#", "", "{x}", "(y)"),
    ],
    ids=repr,
)
def test_every_value_arrives_as_it_was_given(value: Any) -> None:
    (word,) = api._overrides({"key": [value] if isinstance(value, dict) else value})
    (assignment,) = overrides.parse([word], lambda *_: None)
    assert assignment.value == ([value] if isinstance(value, dict) else value)


def test_nested_mappings_numpy_numbers_and_paths_are_keys_too(tmp_path: Path) -> None:
    given = {"model": {"name": "x", "config": {"hidden_size": np.int64(64)}}, "optimizer.lr": np.float64(0.5)}
    assert api._overrides({**given, "runs_dir": tmp_path}) == [
        "model.name=x",
        "model.config.hidden_size=64",
        "optimizer.lr=0.5",
        f"runs_dir={tmp_path}",
    ]


def test_train_returns_the_rows_and_reads_a_finished_run_again(launcher: Launcher, tmp_path: Path) -> None:
    keys = {**SMALL, "runs_dir": tmp_path, "name": "mine"}
    rows = harness.train("optimizer=sumo", **keys)  # pyright: ignore[reportCallIssue]
    assert isinstance(rows, pd.DataFrame)
    assert {"step", "train/loss", "val/loss", "lr"} <= set(rows.columns)
    assert rows.attrs["state"] == "finished"
    assert rows.attrs["folder"] == str(tmp_path / "default" / "mine")
    assert rows.attrs["summary"]["val/loss"] == pytest.approx(rows["val/loss"].dropna().iloc[-1])
    again = api.train(optimizer="sumo", progress=False, **keys)
    pd.testing.assert_frame_equal(rows, again)
    assert launcher.started == ["mine"]


def test_bad_input_and_broken_runs_are_exceptions(launcher: Launcher, tmp_path: Path) -> None:
    with pytest.raises(harness.InputError, match="did you mean steps"):
        api.train(stepz=3)
    with pytest.raises(InputError, match="is not an optimizer"):
        api.compare("adamw", "sumoo")
    with pytest.raises(InputError, match="is not a folder"):
        api.load_runs(tmp_path / "none")
    launcher.fate = {"bad": "failed", "refused": InputError("optimizer.rank", 500, "is larger than a side")}
    with pytest.raises(harness.RunFailed, match="failed"):
        api.train(**SMALL, runs_dir=tmp_path, name="bad")
    with pytest.raises(InputError, match="larger than a side"):
        api.train(**SMALL, runs_dir=tmp_path, name="refused")
    launcher.fate = {"diverged": "diverged"}
    assert api.train(**SMALL, runs_dir=tmp_path, name="diverged").attrs["state"] == "diverged"


def test_compare_returns_the_runs_and_leaves_the_report(
    launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = api.compare(
        ["adamw", "sumo"], **SMALL, seeds=2, group="g", runs_dir=tmp_path, sumo={"rank": 16}, progress=False
    )
    assert list(runs["optimizer"]) == ["adamw", "adamw", "sumo", "sumo"]
    assert list(runs["seed"]) == [0, 1, 0, 1]
    assert not runs["val/loss"].isna().to_numpy().any()
    assert Path(runs.attrs["report"]).is_file()
    assert runs.attrs["exit_code"] == 0
    assert len(runs.attrs["verdict"]) == 1
    assert capsys.readouterr().out == ""
    assert set(runs["state"]) == {"finished"}


def test_load_runs_reads_metrics_of_all_runs(tmp_path: Path) -> None:
    synthetic.group(tmp_path, seeds=[0])
    runs, rows = api.load_runs(tmp_path), api.load_runs(str(tmp_path), metrics=True)
    assert set(rows["run"]) == set(runs.index)
    assert list(rows.columns[:3]) == ["run", "optimizer", "seed"]
    for name, part in rows.groupby("run"):
        last = part["val/loss"].dropna().iloc[-1]
        assert runs.loc[name, "val/loss"] == pytest.approx(last)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert len(api.load_runs(empty)) == 0
    assert len(api.load_runs(empty, metrics=True)) == 0


def test_signals_are_forwarded_on_the_main_thread_only(tmp_path: Path) -> None:
    """A notebook server may run a cell in another thread, where Python sets no handlers."""
    problems: list[BaseException] = []

    def enter() -> None:
        try:
            with launch.SignalForwarder(tmp_path):
                pass
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert problems == []
