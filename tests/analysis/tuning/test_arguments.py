"""What `optbench sweep` understands, and every word that it refuses before anything is spent."""

import subprocess
import sys
from pathlib import Path

import pytest

from analysis.compare import sessions
from analysis.compare.progress import Verbosity
from analysis.tuning import arguments
from analysis.tuning.space import Axis
from analysis.tuning.study import Tuning
from harness.config import checks, compose
from harness.errors import InputError


def test_defaults_are_a_ladder_of_five_and_three_fresh_seeds() -> None:
    study = arguments.read(["adamw", "sumo", "steps=9", "group=g", "--json"])
    assert (study.trials, study.seed, study.extend, study.dry_run) == (5, 0, 2, False)
    assert study.plan.seeds == [1, 2, 3]
    assert study.spaces == {"adamw": (), "sumo": ()}
    assert study.plan.shared == ["steps=9"]
    assert (study.plan.group, study.trials_group, study.plan.as_json) == ("g", "g-trials", True)
    assert study.plan.command == "optbench sweep adamw sumo steps=9 group=g"


def test_the_seed_of_the_trials_is_not_compared() -> None:
    study = arguments.read(["adamw", "seed=4", "seeds=2"])
    assert study.seed == 4
    assert study.plan.seeds == [5, 6]


def test_spaces_for_all_and_for_one() -> None:
    study = arguments.read(["adamw", "sumo", "lr=1e-3,1e-2", "sumo.lr=3e-3,3e-2", "sumo.rank=8", "seeds=1"])
    assert study.spaces["adamw"] == (Axis("lr", ("1e-3", "1e-2")),)
    assert study.spaces["sumo"] == (Axis("lr", ("3e-3", "3e-2")),)
    assert study.trials == 2, "as many as the list has"
    assert study.extend == 0, "a space that was given is left as it is"
    assert "optimizer.rank=8" in study.plan.arms[1].overrides
    assert arguments.read(["adamw", "optimizer.lr=1e-3..1e-1", "trials=4"]).spaces["adamw"][0].high == 0.1


def test_an_option_for_all_is_an_option_of_each() -> None:
    study = arguments.read(["adamw", "sumo", "optimizer.lr=0.01", "sumo.lr=0.02"])
    assert study.plan.arms[0].overrides == ("optimizer=adamw", "optimizer.lr=0.01")
    assert study.plan.arms[1].overrides == ("optimizer=sumo", "optimizer.lr=0.02")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"sweep: nothing names no optimizer.*fix: optbench sweep adamw sumo"),
        (["adamw", "sumoo"], r"sumoo is not an optimizer; did you mean sumo\?"),
        (["adamw", "trials=1"], r"trials: 1 .*allowed: a whole number from 2"),
        (["adamw", "trials=few"], r"trials: few"),
        (["adamw", "tune_by=accuracy"], r"tune_by: accuracy .*allowed: loss, metric; fix: tune_by=loss"),
        (["adamw", "tune_by=loss", "tune_by=metric"], r"tune_by: metric was already set to loss"),
        (["adamw", "trials=3", "trials=4"], r"trials: 4 was already set to 3"),
        (["adamw", "seed=-1"], r"seed: -1"),
        (["adamw", "seeds=0"], r"seeds: 0"),
        (["adamw", "--dry"], r"--dry is not an option.*did you mean --dry-run"),
        (["adamw", "steps=10,20"], r"steps: 10,20 has several values, but is not an option"),
        (["adamw", "lr=1e-3,1e-2", "adamw.lr=1e-3"], r"adamw.lr: 1e-3 is both fixed and tuned"),
        (["adamw", "sumo.lr=1e-3,1e-2"], r"belongs to sumo, which is not compared"),
        (["adamw", "lr=1e-2..1e-3"], r"lr: 1e-2..1e-3 is not a range"),
        (["adamw", "weight_decay=0,0.1", "extend=1"], r"extend: 1 extends learning rates only, and adamw"),
        (["adamw", "study=nope"], r"study: nope .*quickstart"),
    ],
)
def test_words_that_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        arguments.read(words)


@pytest.mark.parametrize(
    "words",
    [
        ["adamw", "sumo", "trials=3", "adamw.lr=1e-3,1e-2"],
        ["adamw", "sumo", "adamw.lr=1e-3,1e-2,1e-1", "sumo.lr=1e-3,1e-2"],
        ["adamw", "sumo", "trials=4", "lr=1,2,3,4", "adamw.lr=1,2,3,4,5"],
    ],
)
def test_unequal_budgets_are_refused_and_named(words: list[str]) -> None:
    with pytest.raises(InputError, match=r"(adamw|sumo) space: .* tuning budgets must be equal"):
        arguments.read(words)


def test_a_study_from_a_file_and_the_command_line_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "configs" / "study"
    folder.mkdir(parents=True)
    text = "optimizers: [adamw, sumo]\ntrials: 2\nseeds: 4\ntune_by: metric\nrun: {steps: 7, sumo.rank: 8}\n"
    text += "space: {lr: [0.1, 0.2]}\n"
    (folder / "mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    study = arguments.read(["study=mine", "steps=9", "group=g"])
    assert [arm.label for arm in study.plan.arms] == ["adamw", "sumo"]
    assert (study.trials, study.plan.seeds, study.tune_by) == (2, [1, 2, 3, 4], "metric")
    assert study.plan.shared == ["steps=9"]
    assert study.spaces["sumo"] == (Axis("lr", ("0.1", "0.2")),)
    assert [
        arm.label for arm in arguments.read(["muon", "study=mine", "sumo.name=sumo", "sumo"]).plan.arms
    ] == [
        "muon",
        "sumo",
    ]
    # What the file says of an optimizer that is not chosen is left out.
    only = arguments.read(["study=mine", "adamw"]).plan
    assert ([arm.label for arm in only.arms], only.shared) == (["adamw"], ["steps=7"])
    for bad, message in (
        ("trails: 3", "unknown key"),
        ("optimizers: adamw", "a list"),
        ("a: [", "YAML"),
        ("", "keys"),
    ):
        (folder / "bad.yaml").write_text(bad)
        with pytest.raises(InputError, match=message):
            arguments.read(["adamw", "study=bad"])


def test_the_study_that_is_shipped_is_one() -> None:
    study = arguments.read(["study=quickstart"])
    assert [arm.label for arm in study.plan.arms] == ["adamw", "muon", "galore", "sumo"]
    assert study.plan.shared == ["experiment=quickstart"]


def test_the_study_of_memorization_compares_three_ranks_over_five_seeds_or_more() -> None:
    study = arguments.read(["study=memorization"])
    assert [arm.label for arm in study.plan.arms] == ["adamw", "muon", "galore", "sumo4", "sumo16", "sumo64"]
    for arm in study.plan.arms[3:]:
        assert {"optimizer=sumo", f"optimizer.rank={arm.label[4:]}"} <= set(arm.overrides)
    assert len(study.plan.seeds) >= 5
    assert study.seed not in study.plan.seeds
    config = checks.check(compose.load(study.plan.overrides(study.plan.arms[-1], 1)), devices=0)
    assert (config.optimizer.options["rank"], config.data.canaries.copies) == (64, [1, 4, 16])


def test_no_torch_is_imported_and_no_scipy_before_it_is_needed() -> None:
    code = "import sys, analysis.tuning.{}; sys.exit({} in sys.modules)"
    for module, package in (("study", "'torch'"), ("arguments", "'scipy'")):
        done = subprocess.run([sys.executable, "-c", code.format(module, package)], check=False)
        assert done.returncode == 0


def test_the_loss_selects_unless_a_task_has_a_metric_that_is_asked_for() -> None:
    assert arguments.read(["adamw"]).tune_by == "loss"
    study = arguments.read(["adamw", "tune_by=metric", "preset=quickstart", "world_size=1"])
    with pytest.raises(InputError, match="tune_by: metric needs a task with a metric; allowed: loss"):
        Tuning(study, sessions.Trainer(as_json=True, verbosity=Verbosity.QUIET))
