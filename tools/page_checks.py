"""Look at pages as Lighthouse does, in a Chromium: python -m tools.page_checks site/ report.html

Every page is opened from disk at 390 and 1200 px, light and dark. Checked are the rules of axe-core
(contrast, names of links and buttons, alternative texts, landmarks, targets of 24 px, ...), sideways
scrolling, and that nothing is requested from elsewhere. Exit status 1 if there are findings. Needs the extra
``browser``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

WIDTHS = (390, 1200)
SCHEMES = ("light", "dark")
#: What axe-core checks: WCAG 2.2 AA, and its best practices.
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
#: Of these, what can differ between the colour schemes.
OF_COLOUR = ["color-contrast", "link-in-text-block"]
QUIET = ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]

#: What is wider than the window and not inside something that scrolls by itself.
WIDE = """() => {
    if (document.documentElement.scrollWidth <= innerWidth) return [];
    const scrolls = e => e && (['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX)
        || scrolls(e.parentElement));
    return ['the page scrolls sideways', ...[...document.querySelectorAll('body *')]
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e.parentElement))
        .slice(0, 3).map(e => e.outerHTML.slice(0, 100))];
}"""


def pages(paths: Sequence[Path]) -> list[Path]:
    """The pages that are named, and those in the folders that are."""
    found = [page for path in paths for page in ([path] if path.is_file() else sorted(path.rglob("*.html")))]
    found = [page for page in found if page.name != "404.html"]  # links from the root of a server
    if not found:
        sys.exit(f"error: no pages in {', '.join(map(str, paths))}")
    return [page.resolve() for page in found]


def findings(browser: Any, page: Path) -> Iterator[tuple[str, str, str]]:
    """(what is wrong, where, at which width in which scheme) of one page."""
    from axe_playwright_python.sync_playwright import Axe

    tab = browser.new_page(reduced_motion="reduce")
    said: list[str] = []
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: said.append(request.url))
    tab.goto(page.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(element => { element.open = true })")
    for width in WIDTHS:
        tab.set_viewport_size({"width": width, "height": 900})
        for scheme in SCHEMES:
            tab.emulate_media(color_scheme=scheme)
            tab.wait_for_timeout(100)  # the theme follows by a script
            seen = f"{page.name} at {width} px, {scheme}"
            yield from (("sideways scrolling", one, seen) for one in tab.evaluate(WIDE))
            kind, values = ("tag", TAGS) if scheme == "light" else ("rule", OF_COLOUR)
            options = {"runOnly": {"type": kind, "values": values}, "resultTypes": ["violations"]}
            for violation in Axe().run(tab, options=options).response["violations"]:
                for node in violation["nodes"]:
                    checks = node["any"] + node["all"] + node["none"]
                    detail = checks[0]["message"] if checks else ""
                    what = f"{violation['id']}: {violation['help']}"
                    yield what, f"{node['html'][:100]} {detail[:160]}", seen
    yield from (("asked for from elsewhere, or an error", one, page.name) for one in said if not _local(one))
    tab.close()


def _local(url: str) -> bool:
    return url.startswith(("file:", "data:", "blob:", "about:"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="+", type=Path, help="pages, or folders of pages")
    paths = pages(parser.parse_args(argv).pages)
    from playwright.sync_api import sync_playwright

    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    with sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, chromium_sandbox=False, args=QUIET)
        for page in paths:
            for what, where, seen in findings(browser, page):
                found[what][where].append(seen)
            print(page.name, file=sys.stderr, flush=True)
        browser.close()
    for what, places in sorted(found.items()):
        print(what)
        for where, times in places.items():
            print(f"    {where}\n        {len(times)} times, first in {times[0]}")
    print(f"{len(paths)} pages at {WIDTHS} px, light and dark: {sum(map(len, found.values()))} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
