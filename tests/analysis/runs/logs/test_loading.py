"""Public logs: what is read from them, and that what spoils a folder's mean is found and named."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from analysis.comparison import document
from analysis.report.command import main, parse
from analysis.runs.logs import loading
from analysis.runs.logs.loading import LogFinding
from analysis.runs.run import LoadedRun
from harness.errors import InputError
from tests.analysis.runs.logs.synthetic import track3_log, write_arm

REAL = Path("/work/shared/data/track3")
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not here")


def load(
    root: Path, name: str = "track3", *, every_run: bool = False
) -> tuple[list[LoadedRun], list[LogFinding]]:
    findings: list[LogFinding] = []
    return loading.load(root, name, [], findings, every_run=every_run), findings


def codes(findings: list[LogFinding]) -> list[str]:
    return [finding.code for finding in findings]


def test_a_folder_is_an_arm_and_a_file_a_run(tmp_path: Path) -> None:
    write_arm(tmp_path / "muonh", [3.278, 3.279, 3.277])
    write_arm(tmp_path / "adamh", [3.281, 3.283])
    runs, findings = load(tmp_path)
    assert [(run.optimizer, run.final_loss) for run in runs] == [
        ("adamh", 3.281), ("adamh", 3.283), ("muonh", 3.278), ("muonh", 3.279), ("muonh", 3.277),
    ]  # fmt: skip
    assert findings == []
    run = runs[0]
    assert run.metrics["step"].tolist() == [0, 100, 200, 300]
    assert run.metrics["wall_s"].tolist() == [0, 50, 100, 150]
    assert run.fact("tokens") == 300 * 524288
    content = (tmp_path / "adamh" / "0.txt").read_bytes()
    assert run.summary["source"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert run.summary["source"]["bytes"] == len(content)
    assert not run.has_seed


def test_files_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    write_arm(tmp_path / "a", [3.0 + index / 100 for index in range(12)])
    runs, _ = load(tmp_path)
    assert [run.where for run in runs] == [f"a/{index}.txt" for index in range(12)]
    assert [run.seed for run in runs] == list(range(12))


def test_a_log_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    write_arm(tmp_path / "a", [3.1, 3.3])
    (tmp_path / "a" / "2.txt").write_text((tmp_path / "a" / "0.txt").read_text())
    # Only its last line, as some submissions keep beside the log.
    (tmp_path / "a" / "3.txt").write_text((tmp_path / "a" / "1.txt").read_text().splitlines()[-1] + "\n")
    runs, findings = load(tmp_path)
    assert codes(findings) == ["duplicate_log"]
    assert "2.txt repeats 0.txt" in findings[0].message
    assert "3.txt repeats 1.txt" in findings[0].message
    (judged,) = document.judge_folder(tmp_path, log_format="track3").sets
    (arm,) = judged.comparison.arms
    assert len(runs) == 4
    assert (arm.final.n, arm.final.mean) == (2, pytest.approx(3.2))


def test_equal_last_losses_of_two_runs_are_no_copy(tmp_path: Path) -> None:
    """The control: five digits make equal losses common, and equal seconds are what shows a copy."""
    write_arm(tmp_path / "a", [3.1, 3.3])
    line = (tmp_path / "a" / "0.txt").read_text().splitlines()[-1]
    (tmp_path / "a" / "2.txt").write_text(line.replace("150.000s", "151.000s") + "\n")
    _, findings = load(tmp_path)
    assert "duplicate_log" not in codes(findings)


def test_settings_that_differ_in_a_folder_are_arms_of_their_own(tmp_path: Path) -> None:
    write_arm(tmp_path / "a", [3.1, 3.2])
    (tmp_path / "a" / "7.txt").write_text(track3_log(3.9, planned=400))
    (tmp_path / "a" / "8.txt").write_text(track3_log(3.8, steps=(0, 100, 200)))
    _, findings = load(tmp_path)
    (mixed,) = findings
    assert mixed.code == "mixed_settings"
    assert "3 settings" in mixed.message
    (judged,) = document.judge_folder(tmp_path, log_format="track3").sets
    found = {arm.label: arm.final.mean for arm in judged.comparison.arms}
    assert found == {
        "a (last_step=300, steps_planned=300)": pytest.approx(3.15),
        "a (last_step=300, steps_planned=400)": pytest.approx(3.9),
        "a (last_step=200, steps_planned=300)": pytest.approx(3.8),
    }


def test_runs_one_after_the_other_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.txt").write_text(track3_log(3.1) + track3_log(3.2, seconds=0.6))
    last, findings = load(tmp_path)
    every, _ = load(tmp_path, every_run=True)
    assert [run.final_loss for run in last] == [3.2]
    assert [run.final_loss for run in every] == [3.1, 3.2]
    assert codes(findings) == ["several_runs"]
    assert "holds 2 runs" in findings[0].message


def test_what_is_not_a_log_and_what_is_damaged_are_named(tmp_path: Path) -> None:
    write_arm(tmp_path / "a", [3.1])
    (tmp_path / "a" / "notes.txt").write_text("nothing\n")
    (tmp_path / "a" / "1.txt").write_text(track3_log(3.2, seconds=0.7) + "step:400/300 val_loss:3.x\n")
    (tmp_path / "a" / "2.txt").write_text(track3_log(math.nan, seconds=0.8))
    remarks: list[str] = []
    runs = loading.load(tmp_path, "track3", remarks, [])
    assert remarks == ["a/notes.txt is not read: it has no line of the format track3"]
    assert any("line 7 is not read" in note for note in runs[1].notes)
    assert runs[2].state == "diverged"


def test_runs_without_seeds_are_compared_with_welchs_test(tmp_path: Path) -> None:
    from scipy import stats

    first, second = [3.1, 3.12, 3.09, 3.11], [3.2, 3.28, 3.24]
    write_arm(tmp_path / "a", first)
    write_arm(tmp_path / "b", second)
    found = document.to_json(document.judge_folder(tmp_path, log_format="track3"))
    (only,) = found["comparison"]["sets"]
    (pair,) = only["pairs"]
    oracle = stats.ttest_ind(first, second, equal_var=False)
    assert pair["test"] == "welch"
    assert pair["p"] == pytest.approx(oracle[1], rel=1e-9)
    assert only["verdict"]["kind"] == "winner"
    assert "Welch" in only["verdict"]["detail"]
    assert {row["arm"] for row in only["track3"]} == {"a", "b"}
    assert not any(w["code"] == "missing_seed" for w in found["warnings"])


def test_a_run_that_diverged_fails_the_rule_of_track_3(tmp_path: Path) -> None:
    write_arm(tmp_path / "a", [3.27, 3.271])
    write_arm(tmp_path / "b", [3.27, 3.271])
    text = track3_log(3.272, seconds=0.8)
    (tmp_path / "b" / "2.txt").write_text(text.replace("val_loss:3.27200", "val_loss:nan"))
    # One that ends where it diverged is a run of the same setting.
    early = track3_log(3.272, steps=(0, 100, 200), seconds=0.9)
    (tmp_path / "b" / "3.txt").write_text(early.replace("val_loss:3.27200", "val_loss:nan"))
    (only,) = document.to_json(document.judge_folder(tmp_path, log_format="track3"))["comparison"]["sets"]
    rows = {row["arm"]: (row["n"], row["diverged"], row["passed"]) for row in only["track3"]}
    assert rows == {"a": (2, 0, True), "b": (2, 2, False)}
    assert [row["first_passing_step"] for row in only["track3"]] == [300, None]


def test_the_command_prints_the_document_and_writes_nothing_among_the_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no browser: the picture is left out
    write_arm(tmp_path / "logs" / "a", [3.1, 3.2])
    before = sorted(tmp_path.joinpath("logs").rglob("*"))
    assert main(["logs", "--format", "track3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"schema_version", "runs", "comparison", "warnings"} <= found.keys()
    assert len(found["runs"]) == 2
    assert sorted(tmp_path.joinpath("logs").rglob("*")) == before
    assert (tmp_path / "runs" / "logs" / "report.html").is_file()


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(InputError, match="track3"):
        parse(["logs", "--format", "track4"])
    with pytest.raises(InputError, match="--format"):
        parse(["team/project", "--export", "x", "--format", "wandb"])


@needs_real
def test_the_published_means_of_track_3() -> None:
    runs, findings = load(REAL)
    assert len(runs) == 379
    assert len({run.optimizer for run in runs}) == 41

    def losses(arm: str) -> list[float]:
        return [run.final_loss for run in runs if run.optimizer == arm]

    for arm, n, mean in (("20260430_muonh", 10, 3.2782), ("20260501_contra_muon", 16, 3.2785)):
        assert (len(losses(arm)), round(float(np.mean(losses(arm))), 4)) == (n, mean)
    normuonh = [run.metrics for run in runs if run.optimizer == "20260430_normuonh"]
    at_3250 = [m["val/loss"][m["step"] == 3250][0] for m in normuonh]
    # The table says 3.2778; the ten logs give 3.27798, closer than a fifth of a run's deviation.
    assert abs(float(np.mean(at_3250)) - 3.2778) < 0.0011 / 5
    named = " ".join(finding.message for finding in findings)
    assert "20260506_trustlight holds 9 logs twice" in named
    assert "20260508_muown holds runs of 2 settings" in named
