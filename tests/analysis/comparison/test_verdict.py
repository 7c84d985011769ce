"""What is concluded from runs, and above all what is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from analysis.comparison.sets import ComparisonSet, group_into_sets
from analysis.comparison.verdict import Verdict, judge
from analysis.comparison.warnings import find_warnings
from analysis.runs.loading import load
from tests.analysis import synthetic
from tests.analysis.synthetic import TYPICAL, Recipe


def only(root: Path) -> ComparisonSet:
    (comparison,) = group_into_sets(load(root))
    return comparison


def judged(root: Path) -> Verdict:
    return judge(only(root))


def codes(root: Path, *, severe: bool | None = None) -> set[str]:
    found = find_warnings(only(root))
    return {warning.code for warning in found if severe is None or warning.severe == severe}


def write(root: Path, name: str, seed: int, **changes: Any) -> None:
    synthetic.write(root, Recipe(**{**vars(TYPICAL[name]), "seed": seed, **changes}))


def test_a_clear_winner_is_named_with_interval_n_and_scope(tmp_path: Path) -> None:
    verdict = judged(synthetic.group(tmp_path))
    assert (verdict.kind, verdict.winner, verdict.common_seeds) == ("winner", "sumo", 3)
    assert verdict.headline.startswith("sumo ends lowest")
    assert "below muon" in verdict.headline
    for part in ("95 % interval", "3 common seeds", "Holm-adjusted p"):
        assert part in verdict.detail
    for part in ("llama_tiny", "1.31 M parameters", "200 steps", "kjv"):
        assert part in verdict.scope
    assert codes(tmp_path, severe=True) == {"undertrained"}, "0.3 tokens per parameter, and nothing else"


def test_one_seed_ranks_nothing(tmp_path: Path) -> None:
    verdict = judged(synthetic.group(tmp_path, seeds=[0]))
    assert (verdict.kind, verdict.winner, verdict.ranks) == ("one_seed", None, False)
    assert "nothing is ranked" in verdict.headline
    assert "lowest" not in verdict.sentence
    assert "one_seed" in codes(tmp_path, severe=True)


def test_arms_that_are_alike_are_not_told_apart(tmp_path: Path) -> None:
    verdict = judged(synthetic.group(tmp_path, end=3.4, noise=0.02))
    assert (verdict.kind, verdict.winner) == ("no_difference", None)
    assert verdict.headline.startswith("No difference shown")
    assert verdict.seeds_needed
    assert f"n = {verdict.seeds_needed} seeds would show a difference of 0.01" in verdict.detail


def test_a_shared_lead_names_no_winner(tmp_path: Path) -> None:
    synthetic.group(tmp_path, ["adamw"], range(4))
    synthetic.group(tmp_path, ["muon", "sumo"], range(4), end=3.31)
    verdict = judged(tmp_path)
    assert (verdict.kind, verdict.winner) == ("partial", None)
    assert "ends below adamw" in verdict.detail


@pytest.mark.parametrize("state", ["diverged", "failed", "interrupted", "running"])
def test_a_run_that_did_not_finish_withholds_the_winner(tmp_path: Path, state: str) -> None:
    synthetic.group(tmp_path)
    write(tmp_path, "galore", 3, state=state, stop_at=70)
    verdict = judged(tmp_path)
    assert (verdict.kind, verdict.winner, verdict.ranks) == ("withheld", None, True)
    assert "1 of 13 runs did not finish" in verdict.headline
    assert state in codes(tmp_path, severe=True)


def test_a_sentence_within_a_sentence_starts_small(tmp_path: Path) -> None:
    synthetic.group(tmp_path, end=3.4, noise=0.02)
    write(tmp_path, "galore", 3, state="diverged", stop_at=70)
    assert judged(tmp_path).detail.startswith("Among the runs that finished: no difference shown between")


def test_the_lead_over_many_names_three(tmp_path: Path) -> None:
    synthetic.group(tmp_path, ["sumo", "muon"], end=3.31)
    for index in range(5):
        synthetic.group(tmp_path, [f"worse{index}"], end=3.8 + 0.1 * index, noise=0.0005)
    detail = judged(tmp_path).detail
    assert "ends below" in detail
    assert detail.count("worse") == 3
    assert "and 2 others." in detail


def test_unequal_budgets_withhold_and_rank_nothing(tmp_path: Path) -> None:
    synthetic.group(tmp_path, ["adamw"])
    synthetic.group(tmp_path, ["sumo"], summary={"steps": 150, "tokens": 150 * 2048})
    verdict = judged(tmp_path)
    assert (verdict.kind, verdict.ranks) == ("withheld", False)
    assert "150 to 200" in verdict.headline
    assert "lowest" not in verdict.sentence
    assert "unequal_budget" in codes(tmp_path, severe=True)


def test_nothing_learned_ranks_nothing(tmp_path: Path) -> None:
    synthetic.group(tmp_path, ["adamw"], end=6.4)
    synthetic.group(tmp_path, ["sumo"], end=6.3)
    verdict = judged(tmp_path)
    assert (verdict.kind, verdict.ranks) == ("withheld", False)
    assert "unigram entropy" in verdict.headline
    assert "above_entropy" in codes(tmp_path, severe=True)


def test_a_missing_seed_is_said_and_the_rest_is_used(tmp_path: Path) -> None:
    synthetic.group(tmp_path, ["adamw", "muon"])
    synthetic.group(tmp_path, ["sumo"], [0, 2])
    verdict = judged(tmp_path)
    assert verdict.common_seeds == 2
    assert verdict.kind in ("winner", "partial", "no_difference")
    assert "missing_seed" in codes(tmp_path, severe=True)


def test_different_budgets_are_different_sets(tmp_path: Path) -> None:
    synthetic.group(tmp_path / "short", seeds=[0, 1])
    synthetic.group(tmp_path / "long", seeds=[0, 1, 2], steps=400, overrides={"steps": 400})
    sets = group_into_sets(load(tmp_path))
    assert [len(comparison.runs) for comparison in sets] == [12, 8]
    assert len({comparison.key for comparison in sets}) == 2


def test_arms_of_one_name_are_told_apart_by_their_options(tmp_path: Path) -> None:
    for rank in (16, 32):
        synthetic.group(tmp_path / str(rank), ["sumo"], options={"rank": rank, "side": "short"})
    assert [arm.label for arm in only(tmp_path).arms] == ["sumo (rank=16)", "sumo (rank=32)"]


def test_a_run_made_twice_counts_once(tmp_path: Path) -> None:
    synthetic.group(tmp_path / "a", ["adamw", "sumo"])
    synthetic.group(tmp_path / "b", ["sumo"], [0])
    comparison = only(tmp_path)
    assert [arm.final.n for arm in comparison.arms] == [3, 3]
    assert "set_aside" in codes(tmp_path, severe=False)


def test_warnings_for_what_weakens_the_numbers(tmp_path: Path) -> None:
    synthetic.group(tmp_path, ["adamw"], epochs=2.5, lr_tuned=False)
    synthetic.group(tmp_path, ["sumo"], epochs=2.5, summary={"device": "NVIDIA H100", "skipped_steps": 2})
    expected = {"epochs", "untuned_lr", "unequal_tuning", "undertrained", "different_machines"}
    assert codes(tmp_path, severe=True) == {*expected, "skipped_steps"}


@pytest.mark.parametrize(("tokens", "warned"), [(19.9, True), (20.1, False)])
def test_undertrained_is_below_twenty_tokens_per_parameter(
    tmp_path: Path, tokens: float, warned: bool
) -> None:
    synthetic.group(tmp_path, ["adamw"], summary={"parameters": 200 * 2048 / tokens})
    assert ("undertrained" in codes(tmp_path, severe=True)) is warned


@pytest.mark.parametrize(
    ("source", "tuned", "said"),
    [
        ("given", True, "adamw tuned default; sumo given"),
        ("of another size", False, "adamw tuned default; sumo untuned default"),
        ("tuned at 1 M", True, None),
        (None, None, "adamw tuned default; sumo not recorded"),
    ],
)
def test_unequal_care_for_learning_rates_is_said(
    tmp_path: Path, source: str | None, tuned: bool | None, said: str | None
) -> None:
    synthetic.group(tmp_path, ["adamw"])
    synthetic.group(tmp_path, ["sumo"], summary={"lr_source": source, "lr_tuned": tuned})
    found = [c.message for c in find_warnings(only(tmp_path)) if c.code == "unequal_tuning"]
    assert found == ([f"Unequal tuning of the learning rate: {said}."] if said else [])


@pytest.mark.parametrize(
    ("optimizer", "own", "rate"),
    [
        ("muon", {"aux_lr": 0.0003}, "0.000300"),
        (
            "muon",
            {"aux_lr": None, "lr": 0.001},
            "0.00100",
        ),  # without a rate of their own they take the rule's
        ("muon", {"aux_lr": 0.002}, None),  # control: within a ladder
        ("muon", {}, None),  # control: nothing is known of it
        ("adamw", {"lr": 0.001}, "0.00100"),  # recorded before AdamW had a second rate
        ("adamw", {"lr": 0.001, "aux_lr": None}, "0.00100"),
        ("adamw", {"lr": 0.001, "aux_lr": 0.016}, None),
        ("adamw", {"lr": 0.002}, None),
    ],
)
def test_far_rates_of_embeddings_and_head_are_said(
    tmp_path: Path, optimizer: str, own: dict[str, Any], rate: str | None
) -> None:
    synthetic.group(tmp_path, ["sumo"], options={"aux_lr": 0.016})
    synthetic.group(tmp_path, [optimizer], options=own)
    found = [c.message for c in find_warnings(only(tmp_path)) if c.code == "aux_rates"]
    said = f"have AdamW's rate {rate} with {optimizer} and 0.0160 with sumo (aux_lr)"
    assert [said in message for message in found] == ([True] if rate else [])


def attempts(folder: Path, *first_steps: int) -> None:
    path = folder / "status.json"
    entries = [{"first_step": step, "state": "finished"} for step in first_steps]
    path.write_text(json.dumps({**json.loads(path.read_text()), "attempts": entries}))


def test_resumed_is_grave_and_says_where_begun_anew_is_a_note(tmp_path: Path) -> None:
    synthetic.group(tmp_path, ["adamw", "sumo"], [0, 1])
    attempts(tmp_path / "sumo-seed1", 0, 80, 140)
    attempts(tmp_path / "adamw-seed0", 0, 0)
    found = {c.code: c for c in find_warnings(only(tmp_path)) if c.code in ("resumed", "record")}
    assert found["resumed"].severe
    assert (
        found["resumed"].message
        == "Resumed: sumo seed 1 at step 80 and 140. Seconds are summed over attempts."
    )
    assert not found["record"].severe
    assert found["record"].message.startswith("adamw-seed0: restarted from step 0 1 time")


def test_an_uncertified_cell_is_grave(tmp_path: Path) -> None:
    synthetic.group(tmp_path, ["adamw", "muon", "sumo"], [0, 1])
    for folder in sorted(tmp_path.iterdir()):
        environment = json.loads((folder / "environment.json").read_text())
        if folder.name.startswith("muon"):
            environment["certificate"] = {"passed": None, "reason": "options that differ: side"}
        if folder.name.startswith("sumo"):
            del environment["certificate"]
        (folder / "environment.json").write_text(json.dumps(environment))
    found = [c.message for c in find_warnings(only(tmp_path)) if c.code == "uncertified" and c.severe]
    assert found == [
        "No certificate for muon: options that differ: side.",
        "No certificate is recorded for sumo.",
    ]


def test_no_finished_run(tmp_path: Path) -> None:
    synthetic.group(tmp_path, state="diverged", stop_at=50)
    assert judged(tmp_path).kind == "nothing"


def test_a_single_arm_is_compared_with_nothing(tmp_path: Path) -> None:
    verdict = judged(synthetic.group(tmp_path, ["sumo"]))
    assert verdict.kind == "one_arm"
    assert "95 % interval over 3 seeds" in verdict.headline
