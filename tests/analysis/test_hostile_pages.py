"""Every kind of HTML page in a real browser with hostile names: nothing of them runs, loads or breaks the page."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from analysis.comparison import document
from analysis.dashboards import definition, preview
from analysis.pages import job_page, screenshot
from analysis.pages.figures import Plot, figure
from analysis.report import report_page
from analysis.text_tables import TextTable
from tests.analysis import synthetic
from tests.analysis.synthetic import Recipe

pytestmark = pytest.mark.browser
if screenshot.browser() is None:
    pytest.skip("Chromium is not installed (apt-get install chromium)", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

HOSTILE = (
    "</script></style></title><script>window.owned = 1</script><img src=x onerror='window.owned = 2'>"
    "<a href='javascript:window.owned=3'>a</a><svg onload=window.owned=4>\u202e\x1b[31m\x00{{7*7}}${owned=5}`"
)
PAGES = ("report", "picture", "job", "preview")


@dataclass
class _Picture:
    title: str
    caption: str
    png: bytes


def _job_page() -> str:
    """As margin and reconstruct write theirs."""
    trace = go.Scatter(x=[1, 2], y=[3, 1], name=HOSTILE, hovertemplate=f"{HOSTILE}<extra>{HOSTILE}</extra>")
    plots = [
        Plot(f"p{index}", HOSTILE, HOSTILE, figure([trace], xaxis={"title": {"text": HOSTILE}}))
        for index in range(6)
    ]
    dot = b"\x89PNG\r\n\x1a\n"
    return job_page.render(
        command="margin",
        kicker=HOSTILE,
        title=HOSTILE,
        headline=HOSTILE,
        scope=HOSTILE,
        notes=[HOSTILE],
        tables=[TextTable([HOSTILE], [[HOSTILE]], HOSTILE, HOSTILE)],
        plots=plots,
        settings={HOSTILE: HOSTILE},
        pictures=[_Picture(HOSTILE, HOSTILE, dot)],
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    synthetic.group(
        root / "runs", ["adamw", "sumo"], [0, 1], log_every=50, layers=1, overrides={"group": HOSTILE}
    )
    synthetic.write(root / "runs", Recipe("muon", state="failed", stop_at=60))
    for folder in (root / "runs").iterdir():
        path = folder / "summary.json"
        facts = json.loads(path.read_text())
        texts = dict.fromkeys(
            ("reason", "lr_source", "command", "device", "engine", "corpus_sha256"), HOSTILE
        )
        path.write_text(
            json.dumps({**facts, **texts, "optimizer": facts["optimizer"] + HOSTILE, "warnings": [HOSTILE]})
        )
        rows = json.loads((folder / "parameters.json").read_text())
        (folder / "parameters.json").write_text(
            json.dumps([{**row, "rule": HOSTILE, "reason": HOSTILE} for row in rows])
        )
    (root / "runs" / f"{HOSTILE[:20].replace('/', '-')}.csv").write_text(
        f'step,val/loss,optimizer,seed,comparison_key\n1,8.0,"{HOSTILE}",0,k\n200,3.0,"{HOSTILE}",0,k\n'
    )
    found = document.judge_folder(root / "runs")
    texts = {
        "report": report_page.render(found),
        "picture": report_page.render_picture(found.sets[0]),
        "job": _job_page(),
        "preview": preview.render(found, definition.find_scope(found, None)),
    }
    for name, text in texts.items():
        (root / f"{name}.html").write_text(text)
    return {name: root / f"{name}.html" for name in PAGES}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=screenshot.browser(),
            args=[*screenshot.sandbox_flags(), "--disable-gpu", "--no-first-run"],
        )
        yield launched
        launched.close()


def opened(browser: Any, path: Path) -> tuple[Any, list[str], list[str]]:
    """The page with all figures drawn, without having been scrolled; what its console said; what it asked for."""
    page = browser.new_context(viewport={"width": 1280, "height": 700}).new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    for _ in range(600):
        if page.evaluate("document.documentElement.dataset.complete") == "yes":
            break
        page.wait_for_timeout(50)
    return page, said, asked


@pytest.mark.parametrize("name", PAGES)
def test_hostile_names_do_nothing(browser: Any, pages: dict[str, Path], name: str) -> None:
    page, said, asked = opened(browser, pages[name])
    assert [text for text in said if "image" not in text.lower()] == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.evaluate("[typeof window.owned, typeof owned]") == ["undefined", "undefined"]
    assert page.locator("img[src=x], a[href^=javascript], svg[onload]").count() == 0
    drawn, all_ = page.evaluate(
        "[document.querySelectorAll('[data-drawn]').length, document.querySelectorAll('[data-figure]').length]"
    )
    assert drawn == all_ > 0
    text = page.evaluate("document.body.innerText")
    assert "\x1b" not in text
    assert "\u202e" not in text
    page.context.close()


@pytest.mark.parametrize(
    "name", ["job", *(pytest.param(name, marks=pytest.mark.slow) for name in PAGES if name != "job")]
)
def test_the_policy_stops_what_escaping_would_miss(
    browser: Any, pages: dict[str, Path], name: str, tmp_path: Path
) -> None:
    """A script put into the page's own text does not run; without the policy it does."""
    text = pages[name].read_text()
    evil = "<script>window.owned = 1</script><img src='data:,' onerror='window.owned = 1'></body>"
    (tmp_path / "with.html").write_text(text.replace("</body>", evil))
    page, said, _ = opened(browser, tmp_path / "with.html")
    assert page.evaluate("typeof window.owned") == "undefined"
    assert any("Content Security Policy" in line for line in said)
    page.context.close()
    (tmp_path / "without.html").write_text(
        text.replace("</body>", evil).replace("Content-Security-Policy", "x", 1)
    )
    page, _, _ = opened(browser, tmp_path / "without.html")
    assert page.evaluate("typeof window.owned") == "number"
    page.context.close()


def test_a_printed_page_holds_all_plots(pages: dict[str, Path], tmp_path: Path) -> None:
    """Chromium prints at once: without a scroll, and before the figures below the screen were drawn."""
    chromium = screenshot.browser()
    assert chromium is not None
    page = tmp_path / "page.html"
    # What is drawn when the page is printed is told by the page itself, in its title.
    count = (
        "addEventListener('beforeprint', () => {"
        " document.title = String(document.querySelectorAll('[data-drawn]').length); });"
    )
    text = pages["report"].read_text()
    page.write_text(
        text.replace("</body>", f"<script>{count}</script></body>").replace("Content-Security-Policy", "x", 1)
    )
    target = tmp_path / "page.pdf"
    subprocess.run(
        [
            chromium,
            "--headless=new",
            *screenshot.sandbox_flags(),
            "--disable-gpu",
            "--no-pdf-header-footer",
            f"--user-data-dir={tmp_path}/profile",
            f"--print-to-pdf={target}",
            page.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    content = target.read_bytes()
    shutil.rmtree(tmp_path / "profile", ignore_errors=True)
    assert content.startswith(b"%PDF")
    expected = text.count('data-figure="')
    titles = [line for line in content.split(b"\n") if b"/Title" in line]
    assert any(f"({expected})".encode() in line for line in titles), titles


def test_chromium_keeps_its_sandbox_unless_we_are_root(monkeypatch: pytest.MonkeyPatch) -> None:
    # Another user can't be had in every place where the tests run.
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert screenshot.sandbox_flags() == []
    assert "--no-sandbox" not in screenshot.FLAGS
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert screenshot.sandbox_flags() == ["--no-sandbox"]
