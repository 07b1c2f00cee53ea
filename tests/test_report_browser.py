"""The pages in a real browser: no request, no error, readable at any width, in either colour scheme, and on paper.

Needs the extra `browser` and a chromium of the system's; no browser is fetched.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from reports import made_up_cohort, page_of, small_slide, twelve_slides

from wsiscale.cli import main
from wsiscale.report.cohort import write_cohort_page

ROOT = Path(__file__).parents[1]
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'wsiscale[browser]'")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe: pip install 'wsiscale[browser]'")

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
WIDTHS = (400, 1600)
SCHEMES = ("light", "dark")
RULES = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium; apt-get install chromium to run this")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=list(FLAGS))
        yield opened
        opened.close()


@contextmanager
def shown(browser: Any, path: Path, *, width: int = 1600, scheme: str = "light") -> Iterator[Any]:
    """The page at `path`; afterwards that nothing went wrong on it and nothing was asked for but itself."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(10_000)
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(path.as_uri())
    yield page
    context.close()
    assert not wrong
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]


def is_sound(browser: Any, path: Path, *, paper: int = 690) -> None:
    """What holds for every page. `paper` is how wide A4 is between its margins, upright or not."""
    backgrounds = set()
    for width in WIDTHS:
        for scheme in SCHEMES:
            with shown(browser, path, width=width, scheme=scheme) as page:
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                found = axe.Axe().run(page, options=RULES)
                assert found.violations_count == 0, found.generate_report()
                assert page.evaluate(LEFT_OUT) == []
                backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert backgrounds == {"rgb(255, 255, 255)", "rgb(20, 23, 27)"}
    with shown(browser, path, scheme="dark") as page:
        page.emulate_media(media="print")
        page.set_viewport_size({"width": paper, "height": 1000})
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate(BEYOND, paper) == []
        assert len(page.pdf(prefer_css_page_size=True)) > 10_000


# What would be cut off on paper.
BEYOND = """width => [...document.querySelectorAll('main *')]
  .filter(e => e.getBoundingClientRect().right > width + 2)
  .map(e => e.tagName + ' ' + e.className + ' ' + e.getBoundingClientRect().right)
  .slice(0, 5)"""

# Text of plots that lies outside of its plot, or over other text of it; and pictures that did not load.
LEFT_OUT = """() => {
  const wrong = [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.alt);
  for (const svg of document.querySelectorAll('.plot svg')) {
    const box = svg.getBoundingClientRect();
    if (!box.width) continue;
    const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    texts.forEach(([said, a], n) => {
      if (a.left < box.left - 2 || a.right > box.right + 2 || a.bottom > box.bottom + 2) wrong.push('outside: ' + said);
      for (const [other, b] of texts.slice(n + 1))
        if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
          wrong.push(said + ' over ' + other);
    });
  }
  return wrong;
}"""


def cells(page: Any, column: int) -> list[str]:
    shown_rows = "[...document.querySelectorAll('#slides tbody tr')].filter(row => !row.hidden)"
    found: list[str] = page.evaluate(f"n => {shown_rows}.map(row => row.cells[n].textContent)", column)
    return found


def head(page: Any, name: str) -> Any:
    return page.locator("#slides").get_by_role("columnheader", name=name, exact=True)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cohort") / "out"
    made_up_cohort(out, slides=60)
    return write_cohort_page(out)


@pytest.mark.slow
def test_a_slides_page_is_sound(browser: Any, tmp_path: Path) -> None:
    slide = small_slide(tmp_path / "slide.svs")
    page_of(slide, tmp_path / "page.html", places=8, precision=None, mpp_range=(0.35, 1.4), per_octave=4)

    is_sound(browser, tmp_path / "page.html")


@pytest.mark.slow
def test_a_cohorts_page_is_sound(browser: Any, cohort: Path) -> None:
    is_sound(browser, cohort, paper=1010)


def test_plots_take_their_colours_from_the_page(browser: Any, cohort: Path) -> None:
    colours = set()
    for scheme in SCHEMES:
        with shown(browser, cohort, scheme=scheme) as page:
            colours.add(page.evaluate("getComputedStyle(document.querySelector('.plot .wide text')).fill"))

    assert len(colours) == 2


def test_numbers_sort_as_numbers_both_ways_and_nothing_comes_last(browser: Any, cohort: Path) -> None:
    with shown(browser, cohort) as page:
        for name, column in (("Tiles", 10), ("Best µm/px", 3), ("90 % interval", 4), ("Seconds", 13)):
            column_head = head(page, name)
            for direction, sign in (("ascending", 1), ("descending", -1)):
                column_head.get_by_role("button").click()
                assert column_head.get_attribute("aria-sort") == direction
                said = cells(page, column)
                filled = [float(text.split()[0]) for text in said if text]
                assert filled == sorted(filled, key=lambda number: sign * number), name
                assert all(text == "" for text in said[len(filled) :])
                assert 0 < len(filled) < len(said) == 60 or name == "Seconds"
        assert page.locator("[aria-sort]").count() == 1


def test_words_sort_as_people_do(browser: Any, cohort: Path) -> None:
    with shown(browser, cohort) as page:
        head(page, "Slide").get_by_role("button").click()
        down = cells(page, 0)
        head(page, "Slide").get_by_role("button").press("Enter")
        up = cells(page, 0)

    assert down == up[::-1]
    assert up.index("s9") < up.index("s10") < up.index("s11")


def test_rows_are_found_and_chosen(browser: Any, cohort: Path) -> None:
    with shown(browser, cohort) as page:
        assert page.locator("#shown").inner_text() == "60 of 60 slides"
        page.get_by_label("Status").select_option("abstained")
        assert cells(page, 0) == ["s2"]
        page.get_by_label("Status").select_option("")
        page.get_by_label("Tag", exact=True).select_option("conflicts")
        assert cells(page, 0) == ["s1"]
        page.get_by_label("Tag", exact=True).select_option("")
        page.get_by_label("Find").fill("NOT_found")
        assert cells(page, 0) == ["s3"]
        assert page.locator("#shown").inner_text() == "1 of 60 slides"
        page.get_by_label("Find").fill("")
        assert len(cells(page, 0)) == 60


def test_without_scripts_the_table_is_all_there(browser: Any, cohort: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(cohort.as_uri())

    assert page.locator("#slides tbody tr").count() == 60
    assert not page.locator("#filters").is_visible()
    context.close()


@pytest.mark.slow
def test_five_thousand_slides_sort_and_filter(browser: Any, tmp_path: Path) -> None:
    made_up_cohort(tmp_path, slides=5000)

    with shown(browser, write_cohort_page(tmp_path), width=400) as page:
        head(page, "Tiles").get_by_role("button").click()
        first = [float("".join(text.split())) for text in cells(page, 10) if text]
        assert page.locator("#shown").inner_text() == "the first 500 of 5000 slides"
        page.get_by_role("button", name="Show all").click()
        every = [float("".join(text.split())) for text in cells(page, 10) if text]
        page.get_by_label("Find").fill("s4999")
        assert cells(page, 0) == ["s4999"]
    assert len(first) == 500
    assert len(every) == 4997  # three have none
    assert every == sorted(every)
    assert first == every[:500]


@pytest.mark.slow
def test_the_page_of_a_real_slide_is_sound(browser: Any, real_data: Path, tmp_path: Path) -> None:
    code = main(["estimate", str(real_data / "slides" / "CMU-1-Small-Region.svs"), "--report", str(tmp_path)])

    page = tmp_path / "CMU-1-Small-Region.svs.html"
    assert code == 0
    assert page.stat().st_size < 3_000_000
    is_sound(browser, page)


@pytest.mark.slow
def test_the_pages_of_twelve_slides_are_sound(browser: Any, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    from conftest import DATA

    twelve_slides(tmp_path / "slides", ROOT / "sample_slides", DATA if DATA.is_dir() else None)

    code = main(["run", str(tmp_path / "slides"), "-o", str(tmp_path / "out"), "--report"])

    index = tmp_path / "out" / "report" / "index.html"
    assert code == 1  # two are no slides
    with shown(browser, index) as page:
        assert len(cells(page, 0)) == 12
        assert set(cells(page, 1)) >= {"ok", "no_tissue", "bad_input"}
        assert "conflicts" in cells(page, 7)
        linked = page.locator("#slides a").evaluate_all("links => links.map(link => link.href)")
    assert len(linked) == 10
    is_sound(browser, index, paper=1010)
    for link in linked:
        path = tmp_path / "out" / "report" / "slides" / link.rpartition("/")[2].replace("%20", " ")
        is_sound(browser, path)
