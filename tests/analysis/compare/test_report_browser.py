"""The report in a real browser: no error, no request, no page wider than the screen, usable by keyboard."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.compare import document, picture, report
from tests.analysis import synthetic
from tests.analysis.synthetic import TYPICAL, Recipe

pytestmark = pytest.mark.browser
CHROMIUM = picture.browser()
if CHROMIUM is None:
    pytest.skip("Chromium is not installed (apt-get install chromium)", allow_module_level=True)

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The size that the report is made for: 12 runs of 2,000 logged points, and one that diverged."""
    root = tmp_path_factory.mktemp("report")
    synthetic.group(root / "runs", steps=2000, log_every=1, eval_every=200, overrides={"steps": 2000})
    failed = {"seed": 3, "state": "diverged", "stop_at": 700, "steps": 2000, "overrides": {"steps": 2000}}
    synthetic.write(root / "runs", Recipe(**{**vars(TYPICAL["galore"]), **failed}))
    path = root / "report.html"
    path.write_text(report.render(document.read(root / "runs")))
    return path


class Visit:
    """One opened page with what went wrong in it."""

    def __init__(self, browser: Any, file: Path, *, width: int, scheme: str) -> None:
        self.context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("#set0-main-figure .canvas[data-drawn] .main-svg")

    def scroll_through(self) -> None:
        """Bring every figure into view, so that it is drawn."""
        for canvas in self.page.locator("[data-figure]").all():
            canvas.scroll_into_view_if_needed()
            canvas.locator(".main-svg").first.wait_for()

    def check_clean(self) -> None:
        """No word on the console, no request to a network, nothing wider than the screen."""
        assert self.said == []
        assert [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))] == []
        width = self.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert width[0] <= width[1]

    def until(self, test: Callable[[Any], bool]) -> None:
        """Wait for a state of the page: its policy refuses the eval of playwright's own polling."""
        for _ in range(100):
            if test(self.page):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError("the page did not get there in 5 s")

    def ground(self) -> str:
        return self.page.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.fixture(scope="module")
def wide(browser: Any, page_file: Path) -> Visit:
    """The page on a wide light screen; its tests leave the controls as they like."""
    return Visit(browser, page_file, width=1280, scheme="light")


@pytest.fixture(scope="module")
def narrow(browser: Any, page_file: Path) -> Visit:
    return Visit(browser, page_file, width=390, scheme="dark")


def test_a_wide_light_page_is_clean(wide: Visit) -> None:
    wide.scroll_through()
    wide.check_clean()
    assert wide.ground() == "rgb(255, 255, 255)"


def test_a_narrow_dark_page_is_clean(narrow: Visit) -> None:
    narrow.scroll_through()
    narrow.check_clean()
    assert narrow.ground() == "rgb(17, 21, 27)"


def test_a_change_of_scheme_recolours_the_plots(wide: Visit) -> None:
    colour = "document.querySelector('[data-figure=set0-main]').data.find(t => !t.meta.band).line.color"
    light = wide.page.evaluate(colour)
    wide.page.emulate_media(color_scheme="dark")
    wide.until(lambda page: page.evaluate(colour) != light)
    assert wide.ground() == "rgb(17, 21, 27)"
    wide.page.emulate_media(color_scheme="light")
    wide.until(lambda page: page.evaluate(colour) == light)
    wide.check_clean()


def test_curve_end_labels_do_not_cover_each_other(wide: Visit) -> None:
    for zoom in ("finish", "whole"):
        wide.page.check(f"input[value={zoom}]", force=True)
        wide.page.wait_for_timeout(100)
        boxes = [
            box
            for note in wide.page.locator("#set0-main-figure .annotation").all()
            if (note.text_content() or "").strip() in TYPICAL and (box := note.bounding_box())
        ]
        assert len(boxes) == 4
        boxes.sort(key=lambda box: box["y"])
        for above, below in pairwise(boxes):
            # Boxes carry a pixel of padding above and below the letters.
            assert above["y"] + above["height"] <= below["y"] + 4


def test_controls_change_the_plot_by_keyboard(wide: Visit) -> None:
    page = wide.page
    page.check("input[value=finish]", force=True)
    title = page.locator("#set0-main-figure .xtitle")
    assert title.text_content() == "training tokens"
    page.focus("input[value=tokens]")
    for expected in ("optimizer steps", "training time (s)", "model FLOPs"):
        page.keyboard.press("ArrowRight")
        sync_api.expect(title).to_have_text(expected)
    page.focus("input[value=finish]")
    assert "unigram entropy" not in (page.locator("#set0-main-figure .infolayer").text_content() or "")
    page.keyboard.press("ArrowRight")
    sync_api.expect(page.locator("#set0-main-figure .infolayer")).to_contain_text("unigram entropy")


def test_the_heat_map_follows_its_choice(wide: Visit) -> None:
    canvas = wide.page.locator("[data-figure=set0-heat]")
    canvas.scroll_into_view_if_needed()
    canvas.locator(".main-svg").first.wait_for()
    shown = "document.querySelector('[data-figure=set0-heat]').data.map(t => t.visible).join()"
    assert wide.page.evaluate(shown) == "true,false,false,false"
    wide.page.select_option("#set0-heat-figure select", "3")
    wide.until(lambda page: page.evaluate(shown) == "false,false,false,true")


def test_wide_tables_scroll_in_their_box_and_take_the_keyboard(narrow: Visit) -> None:
    box = narrow.page.locator(".scroll").first
    assert box.get_attribute("tabindex") == "0"
    box.focus()
    narrow.page.keyboard.press("ArrowRight")
    narrow.until(lambda page: box.evaluate("element => element.scrollLeft") > 0)


def test_the_picture_is_a_png_of_the_plot(page_file: Path, tmp_path: Path) -> None:
    from PIL import Image

    (judged,) = document.read(page_file.parent / "runs").sets
    target = tmp_path / "comparison.png"
    remark = picture.photograph(report.render_picture(judged), target, width=1200, height=640)
    assert remark is None
    with Image.open(target) as image:
        assert image.size == (2400, 1280)
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    # The first arm's line in its full colour: the plot was drawn, not only the page around it.
    assert (pixels == (0x00, 0x72, 0xB2)).all(1).any()
