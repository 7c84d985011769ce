"""`optbench certify` with real ranks: cells are green, a defect is seen, and the answer is the exit code."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import cli
from harness.record.certificates import Cell, sources_sha256
from harness.verify import cells, command, session
from harness.verify.pool import RankLost
from harness.verify.session import Certified, Say, certify, has_noise_floor
from harness.verify.verdict import FIGURES, MOST_TWINS, Result
from tests.harness.verify.reports import report

KEYS = {
    *("rule", "engine", "dtype", "accumulation", "clipping", "world_size", "variant", "options"),
    *("passed", "reasons", "is_control", "control", "is_peer"),
    *FIGURES,
}


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Certified:
    """A replicated cell with the factor of CUDA, a sharded one, a defect, and a cell that no engine can run."""
    broken = Cell("muon", "ddp", dtype="bf17")
    chosen = [
        Cell("sumo", "ddp", variant="dwh"),
        Cell("muon", "fsdp2", accumulation=2),
        broken,
        replace(cells.CONTROLS["shard-local Newton–Schulz"][0], control="shard-local Newton–Schulz"),
    ]
    seen: list[Cell] = []
    found = certify(chosen, tmp_path_factory.mktemp("certify"), lambda result, *_: seen.append(result.cell))
    assert seen == chosen
    return found


def test_cells_are_green(certified: Certified) -> None:
    assert certified.results[0].figures["noise_floor"] is None
    for result in certified.results[:2]:
        assert result.passed, result.reasons
        assert result.figures["replay_error"] < 5e-6
        assert result.figures["end_to_end_error"] < 1e-2
        # Sums in another order round about as much as one ulp in every weight does.
        assert result.cell.variant == "dwh" or 1e-8 < result.figures["noise_floor"] < 1e-2
        assert result.figures["matrices"] == result.figures["orthogonalizations_per_step"] == 21
        assert result.figures["bytes_per_step"] > 0
    assert certified.results[0].figures["replicas_equal"] is True
    assert "torch" in certified.machine["packages"]
    assert certified.sources == sources_sha256()


@pytest.mark.parametrize(
    ("cell", "known"),
    [
        (Cell("sumo", "ddp"), True),
        (Cell("sumo", "fsdp2", accumulation=2, variant="columns"), True),
        (Cell("sumo", "ddp", variant="split"), True),
        (Cell("sumo", "ddp", clipping="off"), False),
        (Cell("sumo", "ddp", variant="dwh"), False),
        (Cell("sumo", "ddp", variant="split, dwh"), False),
        (Cell("sumo", "ddp", options="momentum=0.8"), False),
    ],
    ids=str,
)
def test_a_noise_floor_is_of_cells_with_the_arithmetic_of_its_twins(cell: Cell, known: bool) -> None:
    assert has_noise_floor(cell) is known


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_noise_floor_that_is_not_finite_is_null(
    value: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def answer(target: str, *args: object, **more: object) -> list[object]:
        if target.endswith(":machine"):
            return [{}]
        return [value if target.endswith(":noise_floor") else {}]

    class Pool:
        def __init__(self, *args: object) -> None:
            self.run = answer

        def close(self, kill: bool = False) -> None: ...

    def certify_one(
        pool: Pool, cell: Cell, folder: Path, references: object, floor: float | None
    ) -> tuple[Result, None]:
        return Result(cell, True, (), {"noise_floor": floor}), None

    monkeypatch.setattr(session, "RankPool", Pool)
    monkeypatch.setattr(session, "_certify", certify_one)
    found = certify([Cell("sumo", "ddp")], tmp_path, lambda *_: None)
    assert found.results[0].figures["noise_floor"] is None


def test_a_cell_waits_for_the_twins_that_decide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Twins of the cell's own clipping and options are made; the cell is said once, with its last verdict."""
    asked: list[tuple[Cell, int]] = []
    floors = {"on": [1e-5, 0.03, 1e-5, 1e-5], "off": [1e-4] * 4}

    def answer(target: str, *args: Any, **more: object) -> list[object]:
        if target.endswith(":machine"):
            return [{}]
        if not target.endswith(":noise_floor"):
            return [report(end_to_end_error=0.05)]
        # First for the table of noise floors, which gives no seed.
        if len(args) < 4:
            return [1e-5]
        asked.append((args[0], args[3]))
        return [floors[args[0].clipping][args[3]]]

    class Pool:
        def __init__(self, *args: object) -> None:
            self.run = answer

        def close(self, kill: bool = False) -> None: ...

    monkeypatch.setattr(session, "RankPool", Pool)
    chosen = [Cell("lion", "ddp"), Cell("lion", "ddp", clipping="off")]
    said: list[Result] = []
    found = certify(chosen, tmp_path, lambda result, number, total: said.append(result))
    first, second = map(cells.reference_of, chosen)
    assert asked == [(first, 0), (first, 1), *((second, seed) for seed in range(MOST_TWINS))]
    assert [result.passed for result in found.results] == [True, False]
    assert [result.figures["noise_floor"] for result in found.results] == [0.03, 1e-4]
    assert said == found.results


def test_a_defect_is_red_by_its_arithmetic(certified: Certified) -> None:
    control = certified.results[3]
    assert not control.passed
    assert control.figures["replay_error"] > 0.1


def test_a_cell_that_raises_is_red_and_the_next_one_runs(certified: Certified) -> None:
    broken, after = certified.results[2:]
    assert not broken.passed
    assert "bf17" in broken.reasons[0]
    assert after.figures["matrices"] == 21
    assert not certified.passed


def fake(monkeypatch: pytest.MonkeyPatch, **outcomes: bool) -> list[Cell]:
    """A session that runs nothing: all cells green and controls red, unless ``outcomes`` says otherwise."""
    asked: list[Cell] = []

    def certify_nothing(chosen: Sequence[Cell], folder: Path, say: Say) -> Certified:
        asked.extend(chosen)
        results = []
        for number, cell in enumerate(chosen):
            good = outcomes.get("control" if cell.control else "cell", not cell.control)
            result = Result(
                cell, good, () if good else ("replay error",), {"replay_error": 1e-6, "matrices": 21}
            )
            say(result, number + 1, len(chosen))
            results.append(result)
        return Certified(results, {"packages": {"torch": "2"}, "cpu_cores": 2}, 1.0, "0" * 64)

    monkeypatch.setattr(command, "certify", certify_nothing)
    return asked


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [({}, 0), ({"cell": False}, 1), ({"control": True}, 1)],
    ids=["green", "red", "missed"],
)
def test_the_exit_code_is_the_answer(
    outcomes: dict[str, bool], code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake(monkeypatch, **outcomes)
    assert cli.main(["certify", "rule=sumo", "--include-controls", "--out", str(tmp_path)]) == code


def test_json_is_one_document_and_the_file_holds_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = fake(monkeypatch)
    words = [
        "rule=sumo",
        "engine=ddp",
        "--include-controls",
        "--include-peers",
        f"--out={tmp_path}",
        "--json",
    ]
    assert cli.main(["certify", *words]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "certificates.json").read_text())
    assert document["schema_version"] == 1
    assert len(document["sources_sha256"]) == 64
    assert [set(cell) for cell in document["cells"]] == [KEYS] * len(asked)
    assert sum(cell["is_control"] for cell in document["cells"]) == len(cells.CONTROLS)
    assert sum(cell["is_peer"] for cell in document["cells"]) == len(cells.peers())


def test_the_page_says_what_is_red(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, cell=False, control=True)
    assert cli.main(["certify", "rule=muon", "engine=ddp", "--include-controls", "--out", str(tmp_path)]) == 1
    page, shown = (tmp_path / "certificates.md").read_text(), capsys.readouterr().out
    for text in (page, shown):
        assert "1.0e-6 RED" in text
        assert "stays green" in text
    assert f"0 of {len(cells.CONTROLS)} controls red" in page


def test_a_lost_rank_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose(*args: object) -> Certified:
        raise RankLost("rank 1 of 2 died (exit code -9) in sumo × ddp\nTraceback …")

    monkeypatch.setattr(command, "certify", lose)
    assert cli.main(["certify", "--out", str(tmp_path), "--json"]) == 3
    output = capsys.readouterr()
    assert json.loads(output.out)["error"]["message"] == "rank 1 of 2 died (exit code -9) in sumo × ddp"
    assert "Traceback" in output.err
    assert not (tmp_path / "certificates.json").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--fulll"], "certify: --fulll is not an option; did you mean --full?"),
        (["--out"], "--out: needs a value"),
        (["--out", "/dev/null/here"], "--out: /dev/null/here cannot be written"),
    ],
)
def test_bad_words(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["certify", *words]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(line)
