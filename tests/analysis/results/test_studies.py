"""Run folders of studies become summaries, and the page follows from these alone."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.results import __main__ as results
from analysis.results import budget_section, grid_section, studies, study_summary
from analysis.tuning import arguments
from harness.errors import InputError
from tests.analysis import synthetic
from tests.analysis.synthetic import TYPICAL, Recipe

ENDS = {"adamw": 3.50, "galore": 3.46, "sumo": 3.30, "sumo_ns5": 3.30}
LOW_RANK = {"moment": 900, "basis": 600, "aux": 4000}
STATE = {"galore": {**LOW_RANK, "second_moment": 900}}


def study(root: Path, name: str, ends: dict[str, float], **changes: Any) -> Path:
    """Write the run folders of a study as `optbench sweep` leaves them: five rates, five fresh seeds."""
    folder, arms = root / name, []
    folder.mkdir(parents=True)
    for label, end in ends.items():
        options = changes.get("options", {}).get(label, {})
        for seed in range(1, 6):
            base = vars(TYPICAL.get(label, Recipe(label)))
            own = {"end": end, "seed": seed, "options": options, "optimizer": changes.get("optimizer", label)}
            own |= {"state_bytes": STATE.get(label, LOW_RANK), "steps": changes.get("steps", 40)}
            own |= {"log_every": 1, "eval_every": own["steps"] // 10, "has_moments": False}
            recipe = Recipe(**{**base, **own})
            synthetic.write(folder, recipe, f"{label}-seed{seed}")
        summaries = [folder / f"{label}-seed{seed}" / "summary.json" for seed in range(1, 6)]
        identities = [json.loads(path.read_text())["identity"] for path in summaries]
        trials = [
            {"number": i, "values": {"lr": 2.0**i}, "state": "finished", "reason": "", "seconds": 10.0,
             "loss": end + 0.03 * (i - 3) ** 2, "run": f"{label}-trial{i}", "identity": f"{label}{i}", "added": False,
             "score": None}
            for i in range(1, 6)
        ]  # fmt: skip
        arms.append(
            {"label": label, "optimizer": changes.get("optimizer", label), "space": {"lr": "ladder"}, "trials": trials,
             "best": 3, "edges": {}, "seed": 0, "confirmed": identities}
        )  # fmt: skip
    (folder / "tuning.json").write_text(json.dumps({"schema_version": 1, "arms": arms}))
    return folder


def page(runs: Path, docs: Path) -> str:
    assert results.main(["--studies", str(runs), "--docs", str(docs)]) == 0
    text = (docs / results.PAGE).read_text()
    assert text == results.render(docs / results.FOLDER), "without the runs"
    return text


def row(text: str, start: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_section_of_a_family_states_what_its_runs_say(tmp_path: Path) -> None:
    study(tmp_path / "runs", "family_tiny", ENDS)
    text = page(tmp_path / "runs", tmp_path)
    summary = json.loads((tmp_path / "results" / "family_tiny.json").read_text())
    (sumo,) = (arm for arm in summary["arms"] if arm["arm"] == "sumo")
    finals = [run["final"] for run in sumo["runs"]]
    cells = row(text, "sumo")
    assert cells[1:4] == ["lr 8", "5", "5"]
    assert float(cells[4]) == pytest.approx(np.mean(finals), abs=5e-5)
    assert all(run["spikes"] == 0 for run in sumo["runs"])
    # The loss is end + c·exp(−rate·t/T): the ratio of the steps to galore's end follows from the recipe.
    assert row(text, "SUMO needs fewer steps than GaLore to the same loss")[3] == "supported"
    assert row(text, "exact SVD in the subspace is better than five Newton–Schulz steps")[3] == "open", (
        "the control"
    )
    memory = [line for line in text.splitlines() if line.startswith("| 20% less memory than GaLore")]
    assert "14.1 %" in memory[0]
    assert "not supported" in memory[0]
    assert "37.5 %" in memory[1]
    assert "| supported |" in memory[1]
    assert row(text, "SUMO's loss has fewer spikes than galore's")[3] == "open"
    assert row(text, "SUMO tolerates a wider range of rates than galore")[3] == "open", "equal parabolas"
    assert "optbench sweep study=family_tiny group=family_tiny" in text
    assert "| eight optimizers on llama_9m" in text, "what has no runs has its command"
    assert "on a Llama of 8.8 M" not in text


def test_a_claim_without_its_arm_is_left_out(tmp_path: Path) -> None:
    study(tmp_path / "runs", "family_9m", {"sumo": 3.3, "adamw": 3.4})
    text = page(tmp_path / "runs", tmp_path)
    assert "Claims that need sumo_ns5 and galore are left out" in text
    assert "than GaLore" not in text.split("### What these runs say")[1]
    assert "fewer spikes than adamw's" in text


def test_the_grid_finds_the_effects_that_are_there_and_no_others(tmp_path: Path) -> None:
    """Rank changes the loss by 0.2, the interval by nothing."""
    ends = {f"r{r}_k{k}": 3.5 - 0.1 * i for i, r in enumerate((8, 32, 128)) for k in (10, 40, 160)}
    options = {f"r{r}_k{k}": {"rank": r, "refresh_interval": k} for r in (8, 32, 128) for k in (10, 40, 160)}
    study(tmp_path / "runs", "rank_interval", ends, options=options, optimizer="sumo")
    text = page(tmp_path / "runs", tmp_path)
    summary = json.loads((tmp_path / "results" / "rank_interval.json").read_text())
    ranks, intervals, losses = grid_section.grid(summary)
    assert (ranks, intervals, losses.shape) == ([8, 32, 128], [10, 40, 160], (3, 3, 5))
    assert np.isfinite(losses).all()
    effect, frequency, interaction = grid_section.contrasts(losses, ranks, intervals).values()
    # Runs of one name and seed have the same noise in the recipe; at the last step e⁻⁶ of the start is left.
    assert effect.value == pytest.approx(0.2 * (1 - np.exp(-6)))
    assert frequency.outcome() == interaction.outcome() == "open"
    assert row(text, "128")[1] == row(text, "128")[3]


def test_contrasts_have_the_sign_of_their_claim() -> None:
    noise = np.random.default_rng(3).normal(0, 0.001, (2, 2, 6))
    losses = np.array([[3.0, 3.3], [2.9, 3.0]])[:, :, None] + noise
    found = grid_section.contrasts(losses, [4, 16], [10, 100]).values()
    assert [estimate.value for estimate in found] == pytest.approx([0.2, 0.2, 0.2], abs=0.01)
    assert [estimate.outcome() for estimate in found] == ["supported"] * 3
    flipped = grid_section.contrasts(losses[::-1, ::-1], [4, 16], [10, 100]).values()
    assert [estimate.outcome() for estimate in flipped] == ["not supported", "not supported", "supported"]


def test_an_order_that_reverses_with_the_budget_is_named(tmp_path: Path) -> None:
    short = {"adamw": 3.6, "sumo": 3.4, "galore": 3.7}
    study(tmp_path / "runs", "budget_1", short, steps=20)
    study(tmp_path / "runs", "budget_20", {"adamw": 3.0, "sumo": 3.2, "galore": 3.3}, steps=80)
    text = page(tmp_path / "runs", tmp_path)
    assert "The order reverses between 0.031 and 0.12 tokens per parameter for adamw – sumo." in text
    assert "Of 3 pairs, 2 keep their order at every budget, and 0 are open." in " ".join(text.split())
    assert row(text, "adamw − sumo")[3] == "reverses"
    assert row(text, "sumo − galore")[3] == "is kept"
    assert "## Over several workloads" in text
    scores = text.split("## Over several workloads")[1]
    # Galore ends last in both, and the others reach its loss earlier.
    assert float(row(scores, "galore")[3]) < float(row(scores, "sumo")[3])


def test_a_pair_that_is_shown_at_one_budget_only_is_open() -> None:
    assert not budget_section.Order(("a", "b"), [-1, 0], [-0.1, 0.01]).is_reversed
    assert not budget_section.Order(("a", "b"), [-1, 0], [-0.1, 0.01]).is_kept
    assert budget_section.Order(("a", "b"), [1, 0, -1], [0.1, 0.0, -0.1]).is_reversed


def test_bad_runs_overwrite_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    folder = study(runs, "budget_1", {"adamw": 3.6, "sumo": 3.4})
    before = page(runs, tmp_path)
    # The study's file was edited: other steps, so that the runs are of two settings.
    synthetic.write(folder, Recipe("adamw", seed=9, steps=30), "adamw-seed9")
    assert results.main(["--studies", str(runs), "--docs", str(tmp_path)]) == 2
    assert "holds runs of 2 settings" in capsys.readouterr().err
    assert (tmp_path / results.PAGE).read_text() == before
    (folder / "tuning.json").unlink()
    with pytest.raises(InputError, match="holds no tuning"):
        study_summary.summarize(folder, "budget_1")
    assert results.main(["--studies", str(tmp_path / "results"), "--docs", str(tmp_path)]) == 2
    assert "make studies" in capsys.readouterr().err


def test_runs_that_the_ledger_does_not_know_are_refused(tmp_path: Path) -> None:
    folder = study(tmp_path, "budget_1", {"adamw": 3.6})
    synthetic.write(folder, Recipe("adamw", seed=7, steps=40), "adamw-seed7")
    with pytest.raises(InputError, match="its ledger does not know"):
        study_summary.summarize(folder, "budget_1")


def test_an_arm_without_a_finite_trial_is_named_and_a_study_without_any_has_no_section(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = study(tmp_path / "runs", "budget_1", {"adamw": 3.6, "sumo": 3.4})
    ledger = json.loads((folder / "tuning.json").read_text())
    lost = {**ledger["arms"][0], "label": "galore", "optimizer": "galore", "best": None, "confirmed": []}
    lost["trials"] = [{**trial, "state": "diverged", "loss": None} for trial in lost["trials"]]
    ledger["arms"].append(lost)
    (folder / "tuning.json").write_text(json.dumps(ledger))
    all_lost = tmp_path / "runs" / "family_tiny"
    all_lost.mkdir()
    (all_lost / "tuning.json").write_text(json.dumps({**ledger, "arms": [lost]}))
    text = page(tmp_path / "runs", tmp_path / "new" / "docs")
    assert "No trial of galore ended with a finite loss" in text
    assert row(text, "adamw")
    assert "family_tiny: no run on a fresh seed has ended" in capsys.readouterr().err
    assert "study=family_tiny" in text.split("## Length of training")[0]


def test_unequal_tuning_edges_and_lost_arms_are_stated(tmp_path: Path) -> None:
    folder = study(tmp_path / "runs", "family_tiny", ENDS)
    shutil.rmtree(folder / "sumo-seed5")
    ledger = json.loads((folder / "tuning.json").read_text())
    ledger["arms"][0]["trials"][4]["state"] = "failed"
    ledger["arms"][1]["edges"] = {"lr": "highest"}
    (folder / "tuning.json").write_text(json.dumps(ledger))
    text = page(tmp_path / "runs", tmp_path)
    assert "Tuning budgets are unequal (trials that ended: adamw 4, galore 5, sumo 5 and sumo_ns5 5)" in text
    assert "The best rate is on the edge of what was tried for galore (highest)" in text
    assert "unequal numbers of finished runs (adamw 5, galore 5, sumo 4 and sumo_ns5 5)" in text


@pytest.mark.parametrize("plan", studies.STUDIES, ids=lambda plan: plan.name)
def test_the_files_of_the_studies_give_the_runs_that_are_announced(plan: studies.StudyPlan) -> None:
    read = arguments.read(studies.command(plan.name)[1:])
    arms = len(read.plan.arms)
    assert plan.runs == arms * (read.trials + len(read.plan.seeds))
    assert len(read.plan.seeds) >= 5
    assert read.plan.group == plan.name


def test_the_runner_goes_on_and_keeps_the_first_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = iter([0, 3, 0])
    started: list[list[str]] = []
    monkeypatch.setattr(studies, "_run", lambda words, limit: (started.append(words), next(codes))[1])
    only = ["budget_1", "budget_5", "budget_20"]
    assert studies.main(["--runs", "here", "--only", *only, "--concurrency", "2"]) == 3
    assert all({"runs_dir=here", "concurrency=2"} <= set(words) for words in started)
    assert [words[1] for words in started] == [f"study={name}" for name in only]
    assert "[2/3] budget_5: about" in capsys.readouterr().out
    monkeypatch.setattr(studies, "_run", lambda words, limit: 75)
    assert studies.main(["--only", *only]) == 75
    assert "stopped in budget_1" in capsys.readouterr().out
    assert studies.main(["--dry-run"]) == 0


def test_a_limit_interrupts_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    seen = tmp_path / "signal"
    program.write_text(f"#!/bin/sh\ntrap 'echo int > {seen}; exit 0' INT\nwhile :; do sleep 0.05; done\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    # Long enough for the shell to set its trap on a busy machine.
    assert studies._run(["sweep"], 3.0) == 75
    assert seen.read_text() == "int\n"
    assert studies._run(["sweep"], 0.0) == 75
    assert signal.getsignal(signal.SIGINT) is not None
