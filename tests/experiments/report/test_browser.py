"""The page in a real browser: opened from disk, narrow and wide, light and dark, and printed.

Needs a Chromium (``apt-get install chromium``, or CHROMIUM=path) and playwright (the extra ``browser``).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.report_files import edit, writer

from harness_rect import cli

api = pytest.importorskip(
    "playwright.sync_api", reason="needs the test extra browser: pip install playwright"
)
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium")
QUIET = ("--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update")
LONG = "organisation/a-model-with-a-name-that-is-far-too-long-for-a-narrow-screen-7b"


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=CHROMIUM,
            chromium_sandbox=False,
            args=[*QUIET, "--disable-sync", "--disable-quic"],
        )
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    add = writer(folder / "runs")
    docs = [{"question": "wide" * 100}] * 10
    add(9, model=LONG, samples=True, docs=docs)
    for n in (5, 20):
        for keep in (0.2, 0.4, 0.6, 0.8):
            report = edit(n, (keep, keep / 2), regularizer="rect", keep=keep)
            add(5, report, model=LONG, samples=True, docs=docs)
        add(5, edit(n, (0.9, 0.5)), model=LONG, samples=True, docs=docs)
        add(8, edit(n, (0.3, 0.1), regularizer="random", keep=0.4), model=LONG)
    path = folder / "report.html"
    add(5, edit(20, (0.9, 0.5), hparams_origin="/a/" + "long-" * 20 + "name.yaml", hparams={}), model=LONG)
    assert cli.main(["report", str(folder / "runs"), "-o", str(path)]) == 0
    return path


# For every visible figure: is it there, does its text lie within it, and is it large enough to be read?
FIGURES = """() => [...document.querySelectorAll('.panel svg')].map(svg => {
    const box = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].map(text => {
        const t = text.getBoundingClientRect();
        const within = t.left > box.left - 3 && t.right < box.right + 3
            && t.top > box.top - 3 && t.bottom < box.bottom + 3;
        return {said: text.textContent, within, height: Math.min(t.height, t.width)};
    });
    return {name: svg.getAttribute('aria-labelledby'), width: box.width, height: box.height, texts};
})"""
COLORS = """() => {
    const light = color => {
        const [r, g, b] = color.match(/[\\d.]+/g).map(x => x / 255)
            .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const paper = light(getComputedStyle(document.body).backgroundColor);
    const contrast = color => {
        const [a, b] = [light(color), paper].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05);
    };
    const inks = [...document.querySelectorAll('.panel svg text')].map(t => getComputedStyle(t).fill);
    const lines = [...document.querySelectorAll('.legend svg path')].map(p => getComputedStyle(p).stroke)
        .filter(c => c.startsWith('rgb('));
    return {paper, ink: Math.min(...inks.map(contrast)), line: Math.min(...lines.map(contrast))};
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_is_readable(browser, report: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(request.url))
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto(report.as_uri())
    for element in page.query_selector_all("details"):
        element.evaluate("e => e.open = true")
    assert said == []
    assert [url for url in requested if not url.startswith("data:")] == [report.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "scrolls sideways"
    figures = page.evaluate(FIGURES)
    assert len(figures) >= 30
    for figure in figures:
        assert figure["width"] >= 240 and figure["height"] >= 100, figure["name"]
        assert figure["width"] <= width
        for text in figure["texts"]:
            assert text["within"], (figure["name"], text["said"])
            assert text["height"] >= 6, (figure["name"], text["said"])  # digits are narrow
    colors = page.evaluate(COLORS)
    assert (colors["paper"] > 0.9) == (scheme == "light")
    assert colors["ink"] >= 7, "text on its background: WCAG's AAA"
    assert colors["line"] >= 2.9, "lines and markers: WCAG's 3:1 for graphics, less rounding"
    context.close()


def test_the_first_table_fits_a_phone(browser, report: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(report.as_uri())
    assert (
        page.evaluate("(e => e.scrollWidth - e.clientWidth)(document.querySelector('header .scroll'))") == 0
    )
    page.close()


def test_the_dark_page_prints_on_white(browser, report: Path) -> None:
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto(report.as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    colors = page.evaluate(COLORS)
    assert colors["paper"] == 1 and colors["ink"] >= 7
    assert page.pdf(format="A4").startswith(b"%PDF")
    context.close()


VISIBLE = """text => {
    const seen = [...document.querySelectorAll('main tr, main svg g')]
        .filter(e => getComputedStyle(e).display !== 'none');
    return {
        rows: seen.filter(e => e.matches('tr') && e.textContent.includes(text)).length,
        drawn: seen.filter(e => e.matches('g')).length,
    };
}"""


def test_an_unchecked_regularizer_is_hidden_in_tables_and_figures(browser, report: Path) -> None:
    page = browser.new_page()
    page.goto(report.as_uri())
    for element in page.query_selector_all("details"):
        element.evaluate("e => e.open = true")
    before = page.evaluate(VISIBLE, "Random 40%")
    page.get_by_label("Random", exact=True).uncheck()
    after = page.evaluate(VISIBLE, "Random 40%")
    assert after["drawn"] < before["drawn"]
    tagged = page.evaluate("document.querySelectorAll('main tr[class]').length")
    assert tagged and before["rows"] - after["rows"] >= 2  # the table of all runs, at 5 and 20 edits
    assert page.evaluate(VISIBLE, "RECT 40%")["rows"] > after["rows"]
    page.close()


FOCUSED = "(e => ((e.labels && e.labels[0]) || e).textContent.trim())(document.activeElement)"


def test_filters_and_copies_need_no_mouse(browser, report: Path) -> None:
    page = browser.new_page()
    page.goto(report.as_uri())

    def tab_to(text: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate(FOCUSED).startswith(text):
                assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
                return
        raise AssertionError(f"no way to {text!r} by the tabulator key")

    tab_to("Show only some")
    page.keyboard.press("Space")
    tab_to("Random")
    before = page.evaluate(VISIBLE, "Random 40%")
    page.keyboard.press("Space")
    assert page.evaluate(VISIBLE, "Random 40%")["drawn"] < before["drawn"]
    tab_to("Copy as Markdown or LaTeX")
    page.keyboard.press("Enter")
    tab_to("| series")
    assert page.evaluate("document.activeElement.getBoundingClientRect().height") > 0
    page.close()


@pytest.mark.parametrize("page", ["report", "index.html", "reference/cli.html"])
def test_axe_finds_nothing(browser, page: str, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("axe_playwright_python", reason="needs the test extra browser")
    root = Path(__file__).parents[3]
    monkeypatch.syspath_prepend(root)  # the tools are not installed
    from tools.page_checks import findings

    path = root / "site" / page
    if page == "report":  # a small one: axe looks at each letter of each figure
        add, path = writer(tmp_path / "runs"), tmp_path / "report.html"
        tasks = ("rect_nli", "rect_sentiment")
        add(9, tasks=tasks, samples=True)
        add(5, edit(5, (0.9, 0.5)), tasks, samples=True)
        add(6, edit(5, (0.7, 0.2), regularizer="rect", keep=0.4), tasks, samples=True)
        assert cli.main(["report", str(tmp_path / "runs"), "-o", str(path)]) == 0
    elif not path.exists():
        pytest.skip("needs the documentation: make docs")
    assert list(findings(browser, path.resolve())) == []
