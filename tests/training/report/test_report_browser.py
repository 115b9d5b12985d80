"""The page of `mohge report` in a real browser, without network, on a telephone and on a wide screen."""

import re
import shutil
from urllib.parse import urlsplit

import pytest
from report_runs import EDGES, TEXT, save_model, train_run

from mohge.commands.main import main


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no chromium or google-chrome on this machine")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

SCREENS = {"narrow": (390, 844), "wide": (1440, 900)}
SMALLEST = 11
"""Font size, in CSS pixels, below which a text counts as unreadable."""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Page of a run that was really trained, and of a model without a record that has many groups and layers."""
    root = tmp_path_factory.mktemp("pages")
    train_run(root / "run")
    save_model(root / "model", **EDGES["many groups"] | {"num_hidden_layers": 6})
    for name in ("run", "model"):
        assert main(["report", str(root / name), "--text", str(root / "text.txt"), "--tokens", "2000"]) == 0
    return {name: root / name / "report.html" for name in ("run", "model")}


class Visit:
    """A page as a browser shows it, with what went wrong."""

    def __init__(self, browser, path, screen, scheme="light"):
        width, height = SCREENS[screen]
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.context.set_offline(True)
        self.requests, self.problems = [], []
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(path.as_uri())

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.context.close()


@pytest.fixture(params=["run", "model"])
def path(pages, request):
    return pages[request.param]


@pytest.fixture(params=SCREENS)
def visit(browser, path, request):
    with Visit(browser, path, request.param) as visit:
        yield visit


def test_page_asks_for_nothing_and_complains_of_nothing(visit):
    assert visit.problems == []
    assert {urlsplit(url).scheme for url in visit.requests} <= {"file", "data"}
    assert sum(url.startswith("file:") for url in visit.requests) == 1


def test_every_figure_is_shown_in_the_drawing_for_the_screen(visit):
    width = visit.page.viewport_size["width"]
    screen = next(name for name, size in SCREENS.items() if size[0] == width)
    figures = visit.page.eval_on_selector_all(
        "figure svg", "all => all.map(e => [e.classList[0], e.getBoundingClientRect().width, e.ariaLabel])"
    )
    assert len(figures) >= 10
    for drawn_for, shown, text in figures:
        assert len(text) > 40
        assert (shown > 300) == (drawn_for == screen)
    identifiers = visit.page.eval_on_selector_all("[id]", "all => all.map(e => e.id)")
    assert len(set(identifiers)) == len(identifiers)
    lefts = visit.page.eval_on_selector_all("figure", "all => all.map(e => e.getBoundingClientRect().left)")
    assert len(set(lefts)) == (2 if screen == "wide" else 1)  # columns


def test_page_does_not_scroll_sideways_even_with_all_tables_open(visit):
    measure = "() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scrolled, visible = visit.page.evaluate(measure)
    assert scrolled <= visible
    visit.page.eval_on_selector_all("details", "all => all.forEach(details => details.open = true)")
    scrolled, visible = visit.page.evaluate(measure)
    assert scrolled <= visible
    boxes = visit.page.eval_on_selector_all(
        ".scroll", "all => all.map(box => [box.scrollWidth, box.clientWidth, getComputedStyle(box).overflowX])"
    )
    assert all(overflow == "auto" and inside > 0 for _, inside, overflow in boxes)
    if visible == SCREENS["narrow"][0]:
        assert any(content > inside for content, inside, _ in boxes)  # wide tables do scroll, in their own box


def test_every_text_is_large_enough(visit):
    visit.page.eval_on_selector_all("details", "all => all.forEach(details => details.open = true)")
    sizes = visit.page.evaluate(
        """() => [...document.body.querySelectorAll("*")]
            .filter(e => !e.closest("svg")) // those are measured below, as they are drawn
            .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
            .map(e => [e.tagName, parseFloat(getComputedStyle(e).fontSize)])"""
    )
    assert len(sizes) > 50
    assert [entry for entry in sizes if entry[1] < SMALLEST] == []
    drawn = visit.page.eval_on_selector_all(
        "figure svg",
        """all => all.filter(e => e.getBoundingClientRect().width).flatMap(e => {
            const scale = e.getBoundingClientRect().width / e.viewBox.baseVal.width;
            return [...e.querySelectorAll("text")].map(t => scale * parseFloat(getComputedStyle(t).fontSize));
        })""",
    )
    assert len(drawn) > 50
    assert min(drawn) >= SMALLEST


def test_texts_of_a_figure_are_inside_it_and_do_not_overlap(visit):
    drawings = visit.page.eval_on_selector_all(
        "figure svg",
        """all => all.filter(e => e.getBoundingClientRect().width).map(e => {
            const box = (t, whole = e.getBoundingClientRect(), own = t.getBoundingClientRect()) =>
                [own.left - whole.left, own.top - whole.top, own.right - whole.left, own.bottom - whole.top];
            const texts = [...e.querySelectorAll("text")].map(t => [t.textContent, ...box(t)]);
            return [e.ariaLabel, ...box(e).slice(2), texts];
        })""",
    )
    for name, width, height, boxes in drawings:
        for text, left, top, right, bottom in boxes:
            assert -1 <= left < right <= width + 1, (name, text)
            assert -1 <= top < bottom <= height + 1, (name, text)
        for number, (one, *a) in enumerate(boxes):
            for other, *b in boxes[:number]:
                across, down = (min(a[2 + i], b[2 + i]) - max(a[i], b[i]) for i in (0, 1))
                assert across <= 1 or down <= 4, (name, one, other)  # boxes are higher than their letters


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(browser, pages, scheme):
    """Contrast of at least 4.5, as WCAG 2 asks for."""
    with Visit(browser, pages["run"], "wide", scheme) as visit:
        colors = visit.page.evaluate(
            """() => [...document.body.querySelectorAll("*")]
                .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
                .map(e => {
                    const paper = e => getComputedStyle(e).backgroundColor;
                    let behind = e;
                    while (behind.parentElement && paper(behind) === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
                    return [e.className || e.tagName, getComputedStyle(e).color, paper(behind)];
                })"""
        )
        body = visit.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (luminance(body) > 0.5) == (scheme == "light")
    for name, ink, paper in colors:
        dark, light = sorted([luminance(ink), luminance(paper)])
        assert (light + 0.05) / (dark + 0.05) >= 4.5, name


def luminance(color: str) -> float:
    """Relative luminance of a CSS color without transparency."""
    channels = [int(value) / 255 for value in re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", color).groups()]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_page_of_a_small_run_is_not_heavy(pages):
    assert 100_000 < pages["run"].stat().st_size < 3_000_000
    assert TEXT[:200] not in pages["run"].read_text(encoding="utf-8")
