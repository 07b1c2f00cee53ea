"""A slide's page says what was found, to the digit; shows what the network sees; keeps quiet about who it is of."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reports import HOSTILE, Page, page_of, small_slide

import wsiscale as ws
from wsiscale.cli import main
from wsiscale.errors import SlideError, StoreError
from wsiscale.judging import place_scores
from wsiscale.report.looking import columns_for, nuclei_at, overview, rows_for
from wsiscale.report.pages import number, write_page
from wsiscale.report.slide import REASONS, write_slide_page
from wsiscale.responses import SavedResponse
from wsiscale.tissue import find_tissue
from wsiscale.types import Abstention, Pyramid, ScaleCurve, ScaleEstimate

TIMES = "\N{MULTIPLICATION SIGN}"
ROOT = Path(__file__).parents[1]
QUICK: dict[str, Any] = {"places": 8, "precision": None, "mpp_range": (0.35, 1.4), "per_octave": 4}


@dataclass(frozen=True)
class Made:
    slide: Path
    estimate: ScaleEstimate
    answers: SavedResponse
    html: str

    @property
    def page(self) -> Page:
        return Page(self.html)

    def again(self, path: Path, estimate: ScaleEstimate, network: Any = None) -> Page:
        """The page of the same slide, had the estimate been another."""
        with ws.open_slide(self.slide) as opened:
            write_slide_page(path, opened, network or ws.load_network(), estimate, self.answers)
        return Page(path.read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("report") / "Jane Doe"
    folder.mkdir()
    heard: list[SavedResponse] = []
    slide, page = small_slide(folder / "one slide.svs"), folder / "page.html"
    with ws.open_slide(slide) as opened:
        network = ws.load_network()
        found = ws.estimate(opened, network, answered=heard.append, **QUICK)
        write_slide_page(page, opened, network, found, heard[0])
    assert found.scale is not None
    return Made(slide, found, heard[0], page.read_text())


def test_the_answer_on_the_page_is_the_estimate(made: Made) -> None:
    found, page = made.estimate, made.page
    assert found.mpp is not None
    assert found.ci90 is not None
    assert found.slide_mpp is not None

    assert page.value("mpp") == found.mpp
    assert page.value("ci-low") == found.ci90[0] * found.slide_mpp
    assert page.value("ci-high") == found.ci90[1] * found.slide_mpp
    ((_, lead),) = page.all("p", class_="lead")
    assert f"{found.mpp:.3g} µm/px" in lead
    assert f"about {found.magnification:.2g}{TIMES}" in lead
    for fact in (found.criterion, f"{found.places} places", f"{found.forwards} tiles", "seed 0", "0.35 µm/px"):
        assert fact in page.text, fact
    for layer in found.layers:
        assert layer in page.text


def test_fields_are_shown_at_five_scales_with_the_chosen_one_marked_and_bars_in_micrometres(made: Made) -> None:
    page = made.page

    heads = [text for attributes, text in page.all("th", scope="col")]
    chosen = [text for text in heads if "estimate" in text and TIMES in text and f"{TIMES} the estimate" not in text]
    assert len(heads) == 10  # what is there, and what the network answers to it
    assert len(chosen) == 2
    assert chosen[0].startswith(f"{made.estimate.mpp:.3g} µm/px")
    pictures = [attributes["alt"] for attributes, _ in page.all("img")]
    assert len(pictures) == len(set(pictures)) >= 2 * 3 * 3  # places at scales, plain and outlined
    assert all("µm" in text for _, text in page.all("span", class_="bar-name"))


def test_a_scale_bar_is_as_long_as_it_says(made: Made) -> None:
    mpp = made.estimate.mpp
    assert mpp is not None

    page = made.page
    widths = [attributes["style"] for attributes, _ in page.all("span", class_="bar-line")]
    names = [text for _, text in page.all("span", class_="bar-name")]

    fields = [
        float(name.removesuffix(" µm")) / float(re.findall(r"[\d.]+", width or "")[0]) * 100
        for name, width in zip(names, widths, strict=True)
    ]
    assert any(field == pytest.approx(128 * mpp, rel=1e-3) for field in fields)
    assert any(field == pytest.approx(128 * mpp * 2, rel=1e-3) for field in fields)


def test_nuclei_are_measured_where_micrometres_are_known(made: Made) -> None:
    with ws.open_slide(made.slide) as slide:
        measured = nuclei_at(slide, made.answers.centers, mpp=0.35)
        unknown = nuclei_at(slide, made.answers.centers, mpp=None)
        coarse = nuclei_at(slide, made.answers.centers, mpp=2.0)

    assert not isinstance(measured, str)
    assert made.page.value("nuclei") == measured.median
    assert 4 < measured.median < 12  # procedural nuclei, most of them 4 to 9 µm across
    assert "not known" in str(unknown)
    assert "too coarse" in str(coarse)


def test_nuclei_are_twice_as_large_where_the_tag_is(made: Made) -> None:
    with ws.open_slide(made.slide, mpp=0.7) as slide:
        larger = nuclei_at(slide, made.answers.centers, mpp=0.7)

    assert not isinstance(larger, str)
    assert larger.median > 1.4 * made.page.value("nuclei")


def test_without_an_estimate_the_page_says_why_and_what_to_do(made: Made, tmp_path: Path) -> None:
    why = Abstention("boundary_optimum", "the finest end of the range is about as good as anything in it")
    nothing = replace(made.estimate, scale=None, ci90=None, abstained=why)

    page = made.again(tmp_path / "page.html", nothing)

    assert "No estimate" in page.text
    assert why.detail in page.text
    assert REASONS["boundary_optimum"][1] in page.text
    assert not page.all("span", class_="badge")
    assert len(page.all("th", scope="col")) == 10  # five scales over the range, none of them chosen


def test_every_reason_of_the_docs_has_words_here() -> None:
    table = (ROOT / "docs" / "methods.md").read_text().partition("## When there is no estimate")[2].partition("\n## ")[0]

    reasons = {
        name for line in table.splitlines() for name in re.findall(r"`([a-z_]+)`", line.split("|")[1] if "|" in line else "")
    }

    assert len(reasons) > 8
    assert set(REASONS) == reasons


def test_a_slide_without_tissue_has_a_page(tmp_path: Path) -> None:
    from wsiscale.testing.slides import write_svs

    write_svs(tmp_path / "glass.svs", np.full((500, 400, 3), 242, np.uint8), mpp=0.5, power=20, levels=(1, 4))

    found = page_of(tmp_path / "glass.svs", tmp_path / "page.html")

    page = Page((tmp_path / "page.html").read_text())
    assert found.abstained is not None
    assert "nothing on the slide looks like tissue" in page.text
    assert "asked nowhere" in page.text
    assert not page.all("table")


def test_without_micrometres_everything_is_relative(tmp_path: Path) -> None:
    slide = small_slide(tmp_path / "slide.svs", mpp=None)
    options = {**QUICK, "profile": None, "mpp_range": None, "scale_range": (1.0, 4.0)}

    found = page_of(slide, tmp_path / "page.html", **options)

    page = Page((tmp_path / "page.html").read_text())
    assert found.scale is not None
    assert page.value("mpp") == found.scale
    assert "level-0 px per px" in page.all("p", class_="lead")[0][1]
    assert all("level-0 px" in text for _, text in page.all("span", class_="bar-name"))
    assert "Not measured: the slide's µm/px is not known" in page.text


def test_a_classifier_answers_with_bars_by_its_cards_names(made: Made, tmp_path: Path) -> None:
    from nets import small_classifier

    network = ws.load_network(small_classifier(), tile_size=64)
    network = replace(network, card={"classes": ["fat", "lymph", HOSTILE, "mucus", "stroma"]})

    page = made.again(tmp_path / "page.html", made.estimate, network)

    shown = {text for _, text in page.all("dt")} & {"fat", "lymph", HOSTILE, "mucus", "stroma"}
    assert len(shown) >= 3
    shares = [float(text.rstrip("%\N{NO-BREAK SPACE} ")) for _, text in page.all("dd") if re.fullmatch(r"\d+\s%", text)]
    assert shares
    assert all(0 <= share <= 100 for share in shares)


def test_names_with_markup_stay_names(made: Made, tmp_path: Path) -> None:
    odd = replace(made.estimate, slide=HOSTILE, model=HOSTILE, notes=(HOSTILE,), layers=(HOSTILE,), criterion="confidence")

    page = made.again(tmp_path / "page.html", odd)

    assert page.all("h1")[0][1] == HOSTILE
    assert page.text.count(HOSTILE) >= 4
    assert not page.all("script")
    assert not page.all("b")


def test_the_page_tells_the_files_name_and_nothing_else_of_whose_it_is(made: Made) -> None:
    assert "one slide.svs" in made.html
    assert "Jane Doe" not in made.html
    assert str(made.slide.parent.parent) not in made.html
    # Free text of the file: write_svs says so in its description.
    assert b"synthetic" in made.slide.read_bytes()
    assert "synthetic" not in made.html


def test_the_page_needs_nothing_else_and_forbids_it(made: Made) -> None:
    addresses = re.findall(r'(?:src|href)="([^"]*)"', made.html)

    assert addresses
    assert {address.partition(",")[0].partition("#")[0] for address in addresses} <= {"data:", "data:image/jpeg;base64", ""}
    assert "url(http" not in made.html
    policy = next(a["content"] for a, _ in made.page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert len(made.html) < 3_000_000


def test_ids_are_there_once(made: Made) -> None:
    ids = re.findall(r'\bid="([^"]*)"', made.html)

    assert len(ids) == len(set(ids)) > 50
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', made.html)) <= set(ids)


def test_the_same_again_is_the_same_page(made: Made, tmp_path: Path) -> None:
    made.again(tmp_path / "page.html", made.estimate)

    assert (tmp_path / "page.html").read_text() == made.html


def test_what_a_reader_must_not_miss_is_said_first(made: Made, tmp_path: Path) -> None:
    from wsiscale.profile import Registration

    other = Registration(0.7, (0.6, 0.8), 0.35, None, "tiles", (0.9, 0.5), np.empty(0), np.empty(0), 24)
    assert made.estimate.scale is not None
    astray = replace(
        made.estimate,
        registration=other,
        scale=made.estimate.scale * 2.5,
        notes=("the slide is damaged at 2 of 8 places, which are left out",),
    )

    page = made.again(tmp_path / "page.html", astray)

    warnings = [text for _, text in page.all("p", class_="warning")]
    assert len(warnings) == 3
    assert "0.35 µm/px by the tag, 0.7 µm/px (0.6 to 0.8) by the tissue" in warnings[0]
    assert "own curve is best at" in warnings[1]
    assert "damaged at 2 of 8 places" in warnings[2]
    assert not made.page.all("p", class_="warning")


# --- what is looked at ---------------------------------------------------------------------------------------------------


def estimate_at(scale: float | None, low: float = 1.0, high: float = 16.0) -> ScaleEstimate:
    scales = np.exp2(np.linspace(np.log2(low), np.log2(high), 9))
    curve = ScaleCurve(scales, np.zeros(9), np.zeros(9), np.zeros(9))
    why = None if scale is not None else Abstention("flat_curve", "flat")
    return ScaleEstimate(scale, None, 0.25, why, "confidence", curve, np.empty(0), 8, 0)


@pytest.mark.parametrize(
    ("scale", "side", "shown", "missing"),
    [
        (4.0, 10_000, [1, 2, 4, 8, 16], 0),
        (2.0, 10_000, [1, 2, 4, 8], 1),
        (1.96, 10_000, [1, 1.96, 3.92, 7.84], 1),  # what the scan has stands in for the half that it nearly has
        (1.5, 10_000, [1, 1.5, 3, 6], 1),
        (1.1, 10_000, [1.1, 2.2, 4.4], 2),  # the scan's finest shows the same
        (1.0, 10_000, [1, 2, 4], 2),
        (0.7, 10_000, [0.7, 1.4, 2.8], 2),  # as fine as the answer, and no finer
        (4.0, 1000, [1, 2, 4], 2),  # tiles of 128 px are wider than the scan from 7.8 on
        (None, 10_000, [1, 2, 4, 8, 16], 0),
    ],
)
def test_nothing_is_upsampled_but_what_the_answer_is(scale: float | None, side: int, shown: list[float], missing: int) -> None:
    pyramid = Pyramid(((side, side + 50),), (1.0,), 0.25)

    columns = columns_for(estimate_at(scale), pyramid, size=128)

    given = [column for column in columns if column.missing is None]
    assert [column.scale for column in given] == pytest.approx(shown)
    assert len(columns) - len(given) == missing
    assert [column.scale for column in columns if column.chosen] == ([] if scale is None else [scale])
    assert [column.upsampled for column in given] == [s < 0.99 for s in shown]


def test_fields_are_the_tiles_that_the_network_gets(made: Made) -> None:
    network = ws.load_network()
    with ws.open_slide(made.slide) as slide:
        columns = columns_for(made.estimate, slide.pyramid, size=network.tile_size)
        rows = rows_for(slide, network, columns, made.answers.centers, finest=1.0)
        given = [n for n, column in enumerate(columns) if column.missing is None]
        stack = ws.scale_stack(slide, np.array([rows[1].center]), scales=[columns[n].scale for n in given], size=128)
        tiles = stack.images.compute(scheduler="synchronous")[0]

    for tile, n in zip(tiles, given, strict=True):
        np.testing.assert_array_equal(rows[1].fields[n].pixels, tile)
        marked = rows[1].fields[n].marked
        assert marked is not None
        assert (marked != tile).any()
        assert rows[1].fields[n].share is not None


@dataclass(frozen=True)
class Damaged:
    """A slide that cannot be read around one point."""

    slide: Any
    at: tuple[float, float]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.slide, name)

    def read(self, *, level: int, y: int, x: int, height: int, width: int) -> NDArray[np.uint8]:
        if y <= self.at[0] < y + height and x <= self.at[1] < x + width:
            raise SlideError("a tile is damaged", code="READ_FAILED")
        pixels: NDArray[np.uint8] = self.slide.read(level=level, y=y, x=x, height=height, width=width)
        return pixels


def test_a_damaged_place_is_passed_over(tmp_path: Path) -> None:
    network = ws.load_network()
    centers = np.array([[200.0, 200.0], [200.0, 900.0], [900.0, 200.0], [900.0, 900.0]])
    with ws.open_slide(small_slide(tmp_path / "slide.svs", side=1200)) as slide:
        columns = columns_for(estimate_at(1.0), slide.pyramid, size=64)
        rows = rows_for(Damaged(slide, (200, 200)), replace(network, tile_size=64), columns, centers, finest=1.0)  # type: ignore[arg-type]

    assert [row.center for row in rows] == [tuple(center) for center in centers[1:].tolist()]


def test_outlines_lie_around_the_tissue() -> None:
    from wsiscale.readers.array import ArrayReader

    image = np.full((600, 900, 3), 243, np.uint8)
    image[100:400, 500:800] = (180, 80, 160)
    slide = ArrayReader((image,), mpp=0.5)

    seen = overview(slide, find_tissue(slide))

    (line,) = seen.outlines
    assert seen.pixels.shape[:2] == (480, 720)
    assert line.min(axis=0) * seen.step == pytest.approx([100, 500], abs=20)
    assert line.max(axis=0) * seen.step == pytest.approx([400, 800], abs=20)


def test_a_places_line_adds_up_to_the_curve(made: Made) -> None:
    from wsiscale.criteria import find_criterion

    lines = place_scores(made.answers.response, find_criterion(made.estimate.criterion))

    assert made.estimate.curve is not None
    np.testing.assert_allclose(lines.mean(axis=0), made.estimate.curve.score, rtol=1e-5, atol=1e-8)


# --- files and the command line ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "written"),
    [
        *((0.49883, "0.499"), (0.5, "0.5"), (12.345, "12.3"), (1e-7, "0.0000001"), (0.0, "0")),
        (2220.4, "2\N{NARROW NO-BREAK SPACE}220"),
    ],
)
def test_numbers_have_three_digits_and_no_exponent(value: float, written: str) -> None:
    assert number(value) == written
    assert number(None) == number(float("nan")) == ""


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")

    with pytest.raises(StoreError, match="cannot be written"):
        write_page(tmp_path / "taken" / "page.html", "base.html", title="x")

    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*argv: str) -> tuple[int, str, str]:
        code = main(argv)
        return (code, *capsys.readouterr())

    return run


def test_estimate_writes_its_page_beside_its_answer(cli: Any, made: Made, tmp_path: Path) -> None:
    pages = tmp_path / "new" / "pages"

    code, out, err = cli("estimate", str(made.slide), "--places", "8", "--json", "--report", str(pages))

    record = json.loads(out)
    page = pages / "one slide.svs.html"
    assert code in (0, 3)
    assert str(page) in err
    assert [path.name for path in pages.iterdir()] == [page.name]
    assert Page(page.read_text()).value("mpp") == record["mpp"]


def test_a_report_folder_that_cannot_be_is_one_line_before_any_work(cli: Any, made: Made, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")

    code, out, err = cli("estimate", str(made.slide), "--report", str(tmp_path / "taken"))

    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "taken" in err
