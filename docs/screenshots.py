"""Takes docs/figures/report_*.png: `python docs/screenshots.py`, with the extra `browser` and a chromium of the system's.

Generated slides only, so that every pixel is the project's own.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from wsiscale.cli import main as wsiscale

HERE = Path(__file__).parent
SAMPLES = HERE.parent / "sample_slides"
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


def main() -> None:
    sys.path.insert(0, str(HERE.parent / "tests"))
    from reports import small_slide, twelve_slides

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        here = Path(folder)
        slide = small_slide(here / "contradicted.svs", mpp=0.5, true_mpp=0.25, seed=9, side=1600)
        for path in (SAMPLES / "tissue_mpp0.25.svs", slide):
            wsiscale(["estimate", str(path), "--report", folder])
        slides = twelve_slides(here / "slides", SAMPLES, None)
        wsiscale(["run", str(slides), "-o", str(here / "cohort"), "--report"])
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=list(FLAGS))
        sample, cohort = here / "tissue_mpp0.25.svs.html", here / "cohort" / "report" / "index.html"
        take(browser, sample, "slide", width=1200, height=1290)
        take(browser, sample, "network", width=1200, height=1500, at="What the network answers there")
        take(browser, sample, "check", width=1200, height=900, at="The slide", scheme="dark")
        take(browser, here / "contradicted.svs.html", "contradicted", width=1200, height=420)
        take(browser, cohort, "cohort", width=1600, height=1240)
        take(browser, cohort, "table", width=1600, height=700, at="All slides", scheme="dark")
        take(browser, sample, "narrow", width=400, height=900)
        browser.close()


def take(browser: Any, page: Path, name: str, *, width: int, height: int, at: str | None = None, scheme: str = "light") -> None:
    """What one sees of `page` from the heading `at` on."""
    tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    tab.goto(page.as_uri())
    top = 0 if at is None else tab.get_by_role("heading", name=at, exact=True).bounding_box()["y"] - 24
    path = HERE / "figures" / f"report_{name}.png"
    tab.screenshot(path=path, full_page=True, clip={"x": 0, "y": top, "width": width, "height": height})
    tab.close()
    # 256 colours, chosen for each, are a third of the bytes and look the same.
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
