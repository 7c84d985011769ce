"""A report is there whole or not at all, and one that can't be written fails in one line."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis.comparison import document, results_table
from analysis.pages import matplotlib_figures, screenshot
from analysis.report import command as report_command
from analysis.report import report, report_page
from harness import cli
from harness.errors import InputError
from tests.analysis import synthetic

FILES = ["comparison.csv", "comparison.json", "comparison.md", "report.html"]


@pytest.fixture(autouse=True)
def no_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture has tests of its own."""
    monkeypatch.setattr(screenshot, "browser", lambda: None)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return synthetic.group(tmp_path / "runs", ["adamw", "sumo"], [0, 1], has_moments=False, log_every=50)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files of this process can't grow beyond ``size``, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_full_disk_leaves_the_report_of_before(runs: Path, tmp_path: Path, size: int) -> None:
    out = tmp_path / "out"
    found = document.judge_folder(runs)
    report.write(found, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with largest_file(size), pytest.raises(InputError, match="can't be written to") as caught:
        report.write(found, out)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_full_disk_leaves_no_half_of_a_first_report(runs: Path, tmp_path: Path) -> None:
    with largest_file(100_000), pytest.raises(InputError):
        report.write(document.judge_folder(runs), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("place", ["file", "below", "link", "/proc/optbench"])
def test_a_place_that_cannot_be_written_is_one_line(
    runs: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("file")
    out = {"below": tmp_path / "file" / "out"}.get(place, tmp_path / place)
    assert cli.main(["report", str(runs), "--out", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "can't be written to" in lines[0]
    assert "--out" in lines[0]
    assert (tmp_path / "file").read_text() == "mine"


def test_what_a_killed_report_left_is_removed_and_a_living_one_s_is_not(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    for pid in (int(gone.stdout), os.getppid()):
        (out / f".report-{pid}").mkdir(parents=True)
    (out / "comparison.png").write_bytes(b"of an earlier report")
    report.write(document.judge_folder(runs), out)
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, f".report-{os.getppid()}"])


@pytest.mark.parametrize("rounds", [2, pytest.param(15, marks=pytest.mark.slow)])
def test_a_report_that_is_killed_at_any_time_is_whole_or_the_one_before(
    runs: Path, tmp_path: Path, rounds: int
) -> None:
    out, rng = tmp_path / "out", random.Random(rounds)
    report.write(document.judge_folder(runs), out)
    code = (
        "import sys; from pathlib import Path; from analysis.compare import document, picture, report\n"
        "screenshot.browser = lambda: None; found = document.judge_folder(sys.argv[1]); print('ready', flush=True)\n"
        "while True: report.write(found, Path(sys.argv[2]))"
    )
    for _ in range(rounds):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(runs), str(out)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(rng.uniform(0.0, 1.0))
            writer.send_signal(signal.SIGKILL)
        assert (out / "report.html").read_text().rstrip().endswith("</html>")
        assert len(json.loads((out / "comparison.json").read_text())["runs"]) == 4
        assert (out / "comparison.md").read_text().count("\n| ") >= 3
        assert len(list(csv.reader((out / "comparison.csv").open()))) == 3
    report.write(document.judge_folder(runs), out)
    assert sorted(path.name for path in out.iterdir()) == FILES


def test_figures_are_drawn_without_a_browser(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = document.judge_folder(runs)
    written = report.write(found, tmp_path / "out", figures=True)
    names = sorted(path.name for path in (tmp_path / "out" / "figures").iterdir())
    assert names == ["set0-main.png", "set0-memory.png", "set0-step-time.png", "set0-training-loss.png"]
    assert {path for path in written.files if path.parent.name == "figures"} == {
        tmp_path / "out" / "figures" / name for name in names
    }
    assert written.remarks == []
    for path in [*(tmp_path / "out" / "figures").iterdir(), tmp_path / "out" / "comparison.png"]:
        with Image.open(path) as image:
            assert min(image.size) >= 600
            assert np.asarray(image.convert("L")).std() > 5, f"{path.name} is blank"


def test_figures_hold_any_name(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    hostile = "_$x^2$ <b>[r]</b> \\frac{ 🚀 \u202e\x1b[1m"
    synthetic.group(tmp_path, [hostile.replace("/", "-"), "sumo"], [0, 1], has_moments=False, log_every=50)
    (judged,) = document.judge_folder(tmp_path).sets
    for plot in report_page.build_plots(judged.comparison).in_order():
        assert matplotlib_figures.png(plot).startswith(b"\x89PNG")


def test_figures_without_matplotlib_name_what_to_install(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # An installation without it can't be made here in reasonable time.
    monkeypatch.setattr(matplotlib_figures, "is_available", lambda: False)
    assert cli.main(["report", str(runs), "--figures", "png", "--out", str(tmp_path / "out")]) == 2
    assert "pip install" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="allowed: png"):
        report_command.main([str(runs), "--figures=svg"])


def test_files_of_hostile_names_are_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "=cmd|'/c calc'!A1<script>\x1b[31m\u202e"
    root = tmp_path / "runs"
    synthetic.group(root, ["adamw", "sumo"], [0, 1], has_moments=False, log_every=50)
    for folder in root.iterdir():
        facts = json.loads((folder / "summary.json").read_text())
        named = hostile if facts["optimizer"] == "sumo" else "-1.5"
        facts |= {"optimizer": named, "lr_source": hostile, "reason": hostile}
        (folder / "summary.json").write_text(json.dumps(facts))
    assert report_command.main([str(root), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    texts = {name: (tmp_path / "out" / name).read_text() for name in FILES}
    for text in (shown, texts["comparison.md"], texts["comparison.csv"], texts["comparison.json"]):
        assert "\x1b" not in text
        assert "\u202e" not in text
    assert "<script>" not in texts["comparison.md"]
    rows = list(csv.DictReader(io.StringIO(texts["comparison.csv"])))
    assert {row["optimizer"][:2] for row in rows} == {"'=", "-1"}
    assert all(float(row["loss [nats/token]"]) > 0 for row in rows)
    assert all(cell[:1] not in ("=", "+", "@") for row in rows for cell in row.values())
    assert results_table.markdown([(document.judge_folder(root).sets[0].table, hostile)]).count("<") == 0
