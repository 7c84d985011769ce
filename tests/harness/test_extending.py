"""More steps for a run that there is: it goes on where its schedule lets the past be, and is refused where not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness import preparation
from harness.config.identity import identity
from harness.config.schema import RunConfig
from harness.errors import InputError
from harness.record import readers
from harness.record.folder import SUPERSEDED, RunFolder
from tests.faults.checkpoints import assert_same, assert_whole, status
from tests.faults.forked import trained
from tests.harness.running import small, write_documents


def identity_of(config: RunConfig) -> str:
    return identity(config, "corpus", "tokenizer")


def config(schedule: dict[str, Any], **changes: Any) -> RunConfig:
    values = {
        "world_size": 1,
        "micro_batch_size": 4,
        "steps": 100,
        "name": "mine",
        "schedule": schedule,
        **changes,
    }
    return RunConfig.model_validate({**values, "optimizer": {"lr": 0.1}})


def finished(path: Path, shorter: RunConfig, *checkpoints: int) -> None:
    """A run folder as a run of that many steps leaves it; the checkpoints are names only."""
    RunFolder(path, shorter, identity_of(shorter)).end("finished", step=shorter.steps, reason="")
    for step in checkpoints:
        (path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)


@pytest.mark.parametrize(
    ("schedule", "checkpoints", "shared"),
    [
        ({"name": "constant"}, [100], 100),
        ({"name": "constant", "warmup": 7}, [100], 100),
        ({"name": "constant", "warmup": 0}, [40], 100),
        ({"name": "wsd"}, [80, 100], 80),
        ({"name": "wsd", "decay": 30}, [70, 100], 70),
        ({"name": "wsd", "decay": 0}, [100], 100),
        ({"name": "cosine", "min_lr_ratio": 1.0, "warmup": 0}, None, None),
        ({"name": "linear"}, None, None),
    ],
)
def test_what_it_goes_on_from(
    schedule: dict[str, Any], checkpoints: list[int] | None, shared: int | None, tmp_path: Path
) -> None:
    finished(tmp_path / "mine", config(schedule), *(checkpoints or [100]))
    longer = config(schedule, steps=250)
    if checkpoints is None:
        with pytest.raises(InputError, match=f"a {schedule['name']} schedule"):
            preparation.plan_extension(tmp_path / "mine", longer, identity_of)
        return
    pinned, runs = preparation.plan_extension(tmp_path / "mine", longer, identity_of)
    assert [(run.identity, run.steps, run.shared_steps) for run in runs] == [
        (identity_of(config(schedule)), 100, shared)
    ]
    # A share of the run stays what it was there: 0.1 of 100 steps.
    assert pinned.schedule.warmup == {7: 7, 0: 0}.get(schedule.get("warmup"), 10)  # type: ignore[call-overload]
    assert pinned.steps == 250
    # The same words again while it trains, and then still more steps: each time the same plan from the folder alone.
    RunFolder(tmp_path / "mine", pinned, identity_of(pinned), runs).end("interrupted", step=120, reason="")
    assert preparation.plan_extension(tmp_path / "mine", longer, identity_of) == (pinned, runs)
    again, chain = preparation.plan_extension(tmp_path / "mine", config(schedule, steps=400), identity_of)
    assert again.schedule.warmup == pinned.schedule.warmup
    assert [run.steps for run in chain] == [100, 250]


def test_provenance_is_in_the_folder(tmp_path: Path) -> None:
    path, schedule = tmp_path / "mine", {"name": "constant"}
    finished(path, config(schedule), 100)
    (path / "summary.json").write_text(json.dumps({"val/loss": 2.5, "state": "finished"}))
    pinned, runs = preparation.plan_extension(path, config(schedule, steps=250), identity_of)
    folder = RunFolder(path, pinned, identity_of(pinned), runs)
    assert not (path / "DONE").exists()
    folder.end("interrupted", step=120, reason="")
    found = status(path)
    (entry,) = found["extended_from"]
    assert (entry["identity"], entry["steps"], entry["val/loss"]) == (identity_of(config(schedule)), 100, 2.5)
    assert found["identity"] == identity_of(pinned) != entry["identity"]
    assert [attempt["state"] for attempt in found["attempts"]] == ["finished", "interrupted"]
    assert "steps: 100\n" in (path / "config.steps100.yaml").read_text()
    assert json.loads((path / "summary.steps100.json").read_text())["val/loss"] == 2.5


def test_cosine_says_what_would_change_and_what_to_do(tmp_path: Path) -> None:
    schedule = {"name": "cosine"}
    finished(tmp_path / "mine", config(schedule), 100)
    with pytest.raises(InputError) as caught:
        preparation.plan_extension(tmp_path / "mine", config(schedule, steps=200), identity_of)
    line = str(caught.value)
    # Step 100 ends at a tenth of the peak of 0.1; over 200 steps with 20 of warm-up, (t-20)/180 of the way.
    assert "step 100 had lr 0.01 and would have 0.0628" in line
    assert f"optbench export {tmp_path / 'mine'} MODEL, then optbench train model.path=MODEL" in line


def test_a_run_without_a_name_hears_of_a_shorter_one(tmp_path: Path) -> None:
    schedule = {"name": "constant"}
    for steps, seed in ((50, 0), (100, 0), (150, 7), (300, 0)):
        shorter = config(schedule, steps=steps, seed=seed)
        finished(tmp_path / f"llama-sumo-seed0-{steps:06d}", shorter)
    (tmp_path / "llama-sumo-seed0-broken").mkdir()
    (tmp_path / "llama-sumo-seed0-broken" / "status.json").write_text("[")
    wanted, folder = config(schedule, steps=200), tmp_path / "llama-sumo-seed0-abcdef"
    found = preparation.find_shorter_run(folder, wanted, identity_of)
    assert found == (tmp_path / "llama-sumo-seed0-000100", 100)
    assert preparation.find_shorter_run(folder, config({"name": "wsd"}, steps=200), identity_of) is None


@pytest.mark.parametrize("checkpoints", [[], [100]])
def test_wsd_whose_decay_has_begun_is_refused_without_an_older_checkpoint(
    checkpoints: list[int], tmp_path: Path
) -> None:
    finished(tmp_path / "mine", config({"name": "wsd"}), *checkpoints)
    with pytest.raises(InputError, match=r"same up to step 80; .*fix: optbench export"):
        preparation.plan_extension(tmp_path / "mine", config({"name": "wsd"}, steps=200), identity_of)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 50},
        {"steps": 200, "seed": 7},
        {"steps": 200, "overwrite": True},
        {"steps": 200, "resume": False},
    ],
)
def test_what_is_no_longer_run_of_the_same_settings_is_left_alone(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    finished(tmp_path / "mine", config({"name": "constant"}), 100)
    wanted = config({"name": "constant"}, **changes)
    assert preparation.plan_extension(tmp_path / "mine", wanted, identity_of) == (wanted, ())


@pytest.mark.parametrize(
    ("schedule", "first"), [(["schedule=constant"], 6), (["schedule=wsd", "schedule.decay=2"], 4)]
)
def test_the_longer_run_is_what_it_would_have_been_from_the_beginning(
    schedule: list[str], first: int, tmp_path: Path
) -> None:
    """Bit by bit, though the decayed end of the shorter wsd run is in the same folder."""
    corpus = write_documents(tmp_path)
    words = [*small(corpus, tmp_path), *schedule, "schedule.warmup=0.34", "log_every=1", "moments.every=null"]
    words = [word for word in words if not word.startswith(("steps=", "log_every=2"))]
    said = tmp_path / "said.txt"
    assert trained([*words, "steps=6", "name=mine"], 1, said) == [0], said.read_text()
    assert trained([*words, "steps=12", "name=mine"], 1, said) == [0], said.read_text()
    pinned = [word for word in words if not word.startswith("schedule.warmup")]
    assert trained([*pinned, "steps=12", "schedule.warmup=2", "name=whole"], 1, said) == [0], said.read_text()
    mine, whole = tmp_path / "default" / "mine", tmp_path / "default" / "whole"
    assert_same(whole, mine, 12)
    assert status(mine)["identity"] == status(whole)["identity"]
    assert [attempt["first_step"] for attempt in status(mine)["attempts"]] == [0, first]
    assert assert_whole(mine)[0] == 12
    rows, others = (readers.metrics(run / "metrics.jsonl")[0] for run in (mine, whole))
    assert [(row["step"], row["train/loss"]) for row in rows] == [
        (row["step"], row["train/loss"]) for row in others
    ]
    assert (mine / SUPERSEDED).exists() == (first < 6)
    summary = json.loads((mine / "summary.json").read_text())
    assert [entry["steps"] for entry in summary["extended_from"]] == [6]
    assert (mine / "DONE").exists()
    assert trained([*words, "steps=12", "name=mine"], 1, said) == [2]
    assert "is a finished run with these settings" in said.read_text().splitlines()[-1]
