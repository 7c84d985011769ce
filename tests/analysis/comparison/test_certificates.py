"""The report says of every run what is known of its optimizer on its engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from analysis.comparison import document
from analysis.report import report_page
from analysis.runs.loading import load
from tests.analysis import synthetic

PASSED = {"passed": True, "replay_error": 1.2e-6, "current": True}


def certify(folder: Path, certificate: dict[str, Any] | None) -> None:
    path = folder / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "certificate": certificate}))


@pytest.mark.parametrize(
    ("certificate", "words"),
    [
        (PASSED, "passed, replay error 1.2e-06"),
        ({**PASSED, "current": False}, "passed, replay error 1.2e-06, of other sources"),
        ({"passed": None, "reason": "uncertified cell"}, "none: uncertified cell"),
        ({"passed": False, "replay_error": None, "current": True}, "failed"),
        (None, ""),
    ],
)
def test_a_run_tells_its_certificate(certificate: dict[str, Any] | None, words: str, tmp_path: Path) -> None:
    folder = synthetic.write(tmp_path, synthetic.Recipe())
    certify(folder, certificate)
    assert load(tmp_path)[0].certificate == words


def test_the_report_shows_it_and_a_failed_one_is_grave(tmp_path: Path) -> None:
    synthetic.group(tmp_path, ["adamw", "sumo"], seeds=[0, 1])
    for folder in tmp_path.iterdir():
        failed = folder.name.startswith("sumo")
        certify(folder, {"passed": False, "current": True} if failed else PASSED)
    found = document.judge_folder(tmp_path)
    severe = [
        c.message for judged in found.sets for c in judged.warnings if c.code == "certificate" and c.severe
    ]
    assert severe == ["The optimizer failed its certificate on this engine: sumo (seeds 0 and 1)."]
    page = report_page.render(found)
    assert "<td>passed, replay error 1.2e-06</td>" in page
    assert severe[0] in page


@pytest.mark.parametrize(
    ("certificates", "text"),
    [
        ([PASSED, {**PASSED, "replay_error": 3e-6}], "✓ 3.0e-06"),
        ([PASSED, {**PASSED, "current": False}], "✓ 1.2e-06 (stale)"),
        ([PASSED, {"passed": None, "reason": "uncertified cell"}], "none"),
        ([PASSED, None], "none"),
        ([{"passed": None, "reason": "uncertified cell"}, {"passed": False}], "✗ failed"),
    ],
)
def test_an_arm_is_as_certified_as_its_worst_run(
    certificates: list[dict[str, Any] | None], text: str, tmp_path: Path
) -> None:
    for seed, certificate in enumerate(certificates):
        certify(synthetic.write(tmp_path, synthetic.Recipe(seed=seed)), certificate)
    (judged,) = document.judge_folder(tmp_path).sets
    assert judged.table.rows[0].cells["certificate"].text == text
